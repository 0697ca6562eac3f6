"""Rows `stop`: how soon a busy guest ends that is told to, by stop() and by Ctrl-C."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

from counted import GUESTS
from measure import Row, Unavailable, attempt, spread
from start import command

# A guest that only computes, one that writes to memory, and one that exits all the time.
_BUSY = {
    "jmp": b"\xeb\xfe",
    "memory": b"\x40\xa3\x00\x50\xeb\xfa",
    "exits": b"\xe6\x10\xeb\xfc",
}
TARGET_MS = 50


def rows(quick: bool) -> Iterator[Row]:
    """On each accelerator."""
    for accel in ("kvm", "soft"):
        yield from attempt(f"stop {accel}", _stop(accel, 5 if quick else 40))


def _stop(accel: str, rounds: int) -> Iterator[Row]:
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise Unavailable("/dev/kvm is missing or may not be opened")
    by_stop = [_by_stop(accel, code) for code in _BUSY.values() for _ in range(rounds)]
    yield _row(
        f"stop {accel}, stop()",
        "from stop() in another thread to the return of run(), for a guest that jumps to itself, "
        "one that writes to memory and one that makes exits",
        by_stop,
    )
    by_signal = [_by_signal(accel) for _ in range(rounds)]
    yield _row(
        f"stop {accel}, Ctrl-C",
        "from SIGINT to the end of the process `vmexit run`, whose guest makes exits",
        by_signal,
    )


def _row(name: str, what: str, times: list[float]) -> Row:
    found = spread(times)
    return Row(
        name,
        what,
        len(times),
        found.text(" ms"),
        "-",
        f"longest {max(times):.2f} ms",
        f"<= {TARGET_MS} ms, all",
        max(times) <= TARGET_MS,
        figures={"ms": found, "longest_ms": max(times)},
    )


def _by_stop(accel: str, code: bytes) -> float:
    from vmexit import Machine

    started = threading.Event()
    ends: list[float] = []
    with Machine("1M", accel) as vm:
        vm.on_pio(0x80, write=lambda access: started.set())
        vm.on_pio(0x10, write=lambda access: None)
        vm.load_bytes(b"\xe6\x80" + code)

        def run() -> None:
            vm.run()
            ends.append(time.perf_counter())

        thread = threading.Thread(target=run)
        thread.start()
        started.wait()
        begin = time.perf_counter()
        vm.stop()
        thread.join()
    return (ends[0] - begin) * 1e3


def _by_signal(accel: str) -> float:
    arguments = [*command(), "run", "--accel", accel, str(GUESTS / "out-loop.bin")]
    with subprocess.Popen(
        [*arguments, "--debugcon", "0x10"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        begin = time.perf_counter()
        process.send_signal(signal.SIGINT)
        process.wait(60)
        return (time.perf_counter() - begin) * 1e3
