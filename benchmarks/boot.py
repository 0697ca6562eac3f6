"""Rows `boot`: Debian's kernel on the software CPU, against QEMU's TCG, to the same lines."""

import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import NamedTuple

from measure import Row, Unavailable, attempt, differences, interleave, ratios, spread
from start import QEMU, as_installed, command

from vmexit.core.errors import VmexitError
from vmexit.fetch.debian import Fetched, fetch

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
    try:
        files = fetch("cloud-amd64", (), lambda what, done: None)
    except VmexitError as error:
        raise Unavailable(str(error)) from error
    ours, theirs = _ours(files), _theirs(files)
    _once(ours), _patiently(theirs)  # byte code, page cache
    mine, other = interleave(rounds, (lambda: _once(ours), lambda: _patiently(theirs)))
    for what, field in (("kernel is up", 0), ("shell", 1)):
        a, b = [t[field] for t in mine], [t[field] for t in other]
        ratio = ratios(a, b)
        yield Row(
            f"boot soft, {what}",
            f"`vmexit run --accel soft` against `{QEMU} -M microvm -accel tcg`, Debian's cloud "
            f"kernel, {MEMORY}; until its console shows `{(_KERNEL, _SHELL)[field].decode()}`",
            rounds,
            f"{spread(a).median:.2f} s",
            f"{spread(b).median:.2f} s",
            f"{ratio.text('x')}",
            f"{TARGET}x",
            ratio.median <= TARGET,
            ratio.around(TARGET),
            figures={
                "vmexit_s": spread(a),
                "qemu_s": spread(b),
                "ratio": ratio,
                "difference_s": differences(a, b),
            },
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
    begin = time.perf_counter()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=as_installed(),
    ) as process:
        assert process.stdout is not None
        try:
            return Times(*_arrivals(process.stdout.fileno(), begin, (_KERNEL, _SHELL)))
        except TimeoutError as error:
            raise Unavailable(f"{command[0]} did not boot within {TIMEOUT} s") from error
        finally:
            process.kill()


def _arrivals(fd: int, begin: float, lines: tuple[bytes, ...]) -> list[float]:
    text, times = b"", []
    for line in lines:
        while line not in text:
            left = begin + TIMEOUT - time.perf_counter()
            ready, _, _ = select.select([fd], [], [], max(left, 0))
            data = os.read(fd, 1 << 16) if ready else b""
            if not data:
                raise TimeoutError
            text += data
        times.append(time.perf_counter() - begin)
    return times
