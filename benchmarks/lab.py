#!/usr/bin/env python3
"""Rows `lab`, which `make bench-lab` prints: Debian's kernel booted on KVM, against QEMU's microvm.

For the KVM lab (docs/kvm-lab.md), where everything is slow, and a guest or QEMU itself now and then
crashes: such a boot of either side is repeated, and the table says how often.
"""

import argparse
import compileall
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import virtio
from console import boot, debian, row
from measure import Row, Unavailable, attempt, interleave, table
from start import QEMU, command

from vmexit.fetch.debian import Fetched

ROOT = Path(__file__).resolve().parent.parent
MEMORY = "256M"
ROUNDS = 3
PART = 8  # of what the benchmark of virtio does otherwise
TIMEOUT = 150  # seconds; several times what the slowest boot takes in the lab
TRIES = 3
TARGET = 1.0

# What the guest's /init prints first, when it has loaded what there is to load.
_INIT = b"vmexit guest: a busybox shell."

# How each of the kernel's messages begins. What QEMU's BIOS lets the kernel's loader say comes
# long before.
_MESSAGE = b"[  "

# How much the kernel says makes the difference: each byte is an exit of its own, and another to
# see whether the port is free.
_LOGS = {"quiet": "console=ttyS0 quiet", "full log": "console=ttyS0"}


class Times(NamedTuple):
    """Seconds from the start of the process to the kernel's first message, and to its /init."""

    first: float
    init: float

    @property
    def since_first(self) -> float:
        """The part that is the guest's, without the start of the process and its machine."""
        return self.init - self.first


@dataclass
class Side:
    """One of the two commands, and how many of its boots had to be repeated."""

    command: list[str]
    repeated: int = 0

    def boot(self) -> Times:
        """Boot once; raises Unavailable when it fails again and again."""
        for _ in range(TRIES - 1):
            try:
                return self._once()
            except Unavailable:
                self.repeated += 1
        return self._once()

    def _once(self) -> Times:
        times = Times(*boot(self.command, (_MESSAGE, _INIT), TIMEOUT))
        name = Path(self.command[0]).name
        print(f"{name}: {times.first:.2f} s, {times.init:.2f} s", file=sys.stderr, flush=True)
        return times


def rows(rounds: int) -> Iterator[Row]:
    """One vCPU, the same kernel, initrd and command line."""
    if shutil.which(QEMU) is None:
        raise Unavailable(f"{QEMU} is not installed")
    if os.environ.get("VMEXIT_IN_LAB") != "1":
        raise Unavailable("this is not the KVM lab; use make bench-lab")
    files = debian()
    for side in _sides(files, _LOGS["quiet"]):
        side.boot()  # for what the lab has not read yet from outside, and byte code
    for log, append in _LOGS.items():
        yield from attempt(f"lab {log}", _compare(log, _sides(files, append), rounds))
    yield from attempt("virtio kvm", virtio.against_qemu("kvm", "kvm", rounds, 400, PART))


def _sides(files: Fetched, append: str) -> tuple[Side, Side]:
    kernel, initrd = str(files.kernel), str(files.initrd)
    ours = [
        *command(), "run", "--accel", "kvm", "-m", MEMORY,
        "--kernel", kernel, "--initrd", initrd, "--append", append,
    ]  # fmt: skip
    theirs = [
        QEMU, "-M", "microvm,rtc=on", "-accel", "kvm", "-cpu", "host", "-m", MEMORY,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
        "-kernel", kernel, "-initrd", initrd, "-append", append,
    ]  # fmt: skip
    return Side(ours), Side(theirs)


def _compare(log: str, sides: tuple[Side, Side], rounds: int) -> Iterator[Row]:
    ours, theirs = sides
    mine, other = interleave(rounds, (ours.boot, theirs.boot))
    repeated = f"; {ours.repeated} and {theirs.repeated} boots were repeated"
    yield row(
        f"lab {log}, process to init",
        f"`vmexit run --accel kvm` against `{QEMU} -M microvm,rtc=on -accel kvm -cpu host`, "
        f"Debian's cloud kernel, {MEMORY}; until its console shows `{_INIT.decode()}`{repeated}",
        [times.init for times in mine],
        [times.init for times in other],
        TARGET,
    )
    yield row(
        f"lab {log}, kernel to init",
        "the same boots, from the kernel's first message on: with `quiet` that is an error",
        [times.since_first for times in mine],
        [times.since_first for times in other],
        TARGET,
    )


def main() -> int:
    """Print one table; a missed target is a finding, not a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--prepare", action="store_true", help="only fetch the kernel")
    arguments = parser.parse_args()
    if arguments.prepare:
        for folder in ("src", "benchmarks"):
            compileall.compile_dir(ROOT / folder, quiet=2)
        with suppress(Unavailable):  # the table will say it
            debian()
            virtio.prepare()
        return 0
    measured = list(attempt("lab", rows(arguments.rounds)))
    print(f"\nPython {platform.python_version()}, Linux {platform.release()}, in the KVM lab\n")
    print(table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
