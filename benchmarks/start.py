"""Rows `start`: from starting a process to the first exit of its guest, against QEMU."""

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from measure import Row, Unavailable, attempt, differences, interleave, ratios, spread
from native import BUILD

QEMU = "qemu-system-x86_64"
TIMEOUT = 60
MEMORY = "128M"

# The same ROM for both: 64 KiB that end at 4 GiB, with the whole guest in the 16 bytes at the
# reset vector. It sends one byte through the UART and ends the run by the debug-exit port, which
# both have at 0xf4 then; the status of both is (0 << 1) | 1.
_GUEST = bytes.fromhex(
    "ba f8 03"  # mov dx, 0x3f8
    "b0 41"  # mov al, 'A'
    "ee"  # out dx, al
    "30 c0"  # xor al, al
    "e6 f4"  # out 0xf4, al
    "f4"  # hlt
    "eb fd"  # jmp to hlt
)
_ROM = bytes(0xFFF0) + _GUEST.ljust(16, b"\x90")


class Times(NamedTuple):
    """Milliseconds from the start of the process to the byte in our pipe, and to its end."""

    first: float
    end: float


def rows(quick: bool) -> Iterator[Row]:
    """KVM against KVM, and the software CPU against TCG."""
    rounds = 3 if quick else 21
    BUILD.mkdir(exist_ok=True)
    rom = BUILD / "first-exit.rom"
    rom.write_bytes(_ROM)
    for ours, theirs in (("kvm", "kvm"), ("soft", "tcg")):
        yield from attempt(f"start {ours}", _compare(rom, ours, theirs, rounds))


def _compare(rom: Path, accel: str, qemu_accel: str, rounds: int) -> Iterator[Row]:
    if shutil.which(QEMU) is None:
        raise Unavailable(f"{QEMU} is not installed")
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise Unavailable("/dev/kvm is missing or may not be opened")
    ours = [*command(), "run", "--accel", accel, "-m", MEMORY, "--firmware", str(rom)]
    theirs = [
        *(QEMU, "-M", "microvm", "-accel", qemu_accel, "-m", MEMORY, "-nodefaults"),
        *("-no-user-config", "-display", "none", "-no-reboot", "-bios", str(rom)),
        *("-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
    ]
    _once(ours), _once(theirs)  # byte code, page cache
    mine, other = interleave(rounds, (lambda: _once(ours), lambda: _once(theirs)))
    for what, field in (("first exit", 0), ("whole process", 1)):
        a, b = [t[field] for t in mine], [t[field] for t in other]
        ratio = ratios(a, b)
        yield Row(
            f"start {accel}, {what}",
            f"`vmexit run --accel {accel} --firmware ROM` against `{QEMU} -M microvm -accel "
            f"{qemu_accel} -nodefaults -bios ROM`, the same ROM, {MEMORY}; "
            + ("until its byte to port 0x3f8 is in our pipe" if field == 0 else "until it is gone"),
            rounds,
            f"{spread(a).median:.0f} ms",
            f"{spread(b).median:.0f} ms",
            f"{ratio.text('x')}",
            "faster" if accel == "kvm" else "-",
            ratio.median < 1 if accel == "kvm" else None,
            accel == "kvm" and ratio.around(1),
            figures={
                "vmexit_ms": spread(a),
                "qemu_ms": spread(b),
                "ratio": ratio,
                "difference_ms": differences(a, b),
            },
        )


def command() -> list[str]:
    """How vmexit is started."""
    script = Path(sys.executable).parent / "vmexit"
    return [str(script)] if script.exists() else [sys.executable, "-m", "vmexit"]


def as_installed() -> dict[str, str]:
    """The environment of a command that may write byte code, which some environments forbid."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def _once(arguments: list[str]) -> Times:
    begin = time.perf_counter()
    with subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=as_installed(),
    ) as process:
        assert process.stdout is not None
        try:
            byte = _read_byte(process.stdout.fileno())
            first = time.perf_counter()
            _, errors = process.communicate(timeout=TIMEOUT)
        except (subprocess.TimeoutExpired, TimeoutError) as error:
            process.kill()
            raise Unavailable(f"{arguments[0]} did not end within {TIMEOUT} s") from error
    end = time.perf_counter()
    if byte != b"A" or process.returncode != 1:
        said = " / ".join(errors.decode(errors="replace").split("\n")).strip(" /")
        raise Unavailable(f"{arguments[0]} failed with status {process.returncode}: {said}")
    return Times((first - begin) * 1e3, (end - begin) * 1e3)


def _read_byte(fd: int) -> bytes:
    if not select.select([fd], [], [], TIMEOUT)[0]:
        raise TimeoutError
    return os.read(fd, 1)
