"""Rows `boot`: Debian's kernel on the software CPU, against QEMU's TCG, to the same lines."""

import shutil
from collections.abc import Iterator
from typing import NamedTuple

from console import boot, debian, row
from measure import Row, Unavailable, attempt, interleave
from start import QEMU, command

from vmexit.fetch.debian import Fetched

MEMORY = "256M"
TIMEOUT = 20
TRIES = 4
TARGET = 1.5

# What both are waited for: the kernel is up, and the shell is.
_KERNEL, _SHELL = b"Run /init as init process", b"BusyBox v"


class Times(NamedTuple):
    """Seconds from the start of the process to either line."""

    kernel: float
    shell: float


def rows(quick: bool) -> Iterator[Row]:
    """One vCPU, the same kernel, initrd and command line."""
    yield from attempt("boot", _compare(2 if quick else 9))


def _compare(rounds: int) -> Iterator[Row]:
    if shutil.which(QEMU) is None:
        raise Unavailable(f"{QEMU} is not installed")
    files = debian()
    ours, theirs = _ours(files), _theirs(files)
    _once(ours), _patiently(theirs)  # byte code, page cache
    mine, other = interleave(rounds, (lambda: _once(ours), lambda: _patiently(theirs)))
    for what, field in (("kernel is up", 0), ("shell", 1)):
        yield row(
            f"boot soft, {what}",
            f"`vmexit run --accel soft` against `{QEMU} -M microvm -accel tcg`, Debian's cloud "
            f"kernel, {MEMORY}; until its console shows `{(_KERNEL, _SHELL)[field].decode()}`",
            [times[field] for times in mine],
            [times[field] for times in other],
            TARGET,
        )


def _ours(files: Fetched) -> list[str]:
    return [
        *command(), "run", "--accel", "soft", "-m", MEMORY, "--kernel", str(files.kernel),
        "--initrd", str(files.initrd), "--append", "console=ttyS0",
    ]  # fmt: skip


def _theirs(files: Fetched) -> list[str]:
    return [
        QEMU, "-M", "microvm", "-accel", "tcg", "-m", MEMORY, "-nodefaults", "-no-user-config",
        "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(files.kernel),
        "-initrd", str(files.initrd), "-append", "console=ttyS0",
    ]  # fmt: skip


def _patiently(command: list[str]) -> Times:
    """QEMU's guest now and then fails to calibrate its TSC, and hangs: such a boot is repeated."""
    for _ in range(TRIES - 1):
        try:
            return _once(command)
        except Unavailable:
            continue
    return _once(command)


def _once(command: list[str]) -> Times:
    return Times(*boot(command, (_KERNEL, _SHELL), TIMEOUT))
