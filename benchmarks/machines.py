"""Rows `machines`: what 10,000 machines, one after the other, leave behind in a process.

As a program, `machines.py ACCEL COUNT` makes them and prints what there was before, half-way and
after.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from measure import Row

WARM_UP = 200
TIMEOUT = 900

# The allocators take some pages more while they still settle, and a mapping for them; a leak goes
# on growing. So memory is judged by the second half, and of mappings those of guests.
RSS_TARGET = 1024  # KiB

_GUEST = bytes.fromhex("b0 2a e6 10 f4")  # mov al, 42; out 0x10, al; hlt


class Held(NamedTuple):
    """What a process holds: numbers of descriptors, threads, mappings of guest memory and vCPUs,
    mappings altogether, and resident KiB.
    """

    descriptors: int
    threads: int
    guest: int
    mappings: int
    rss: int


def rows(quick: bool) -> Iterator[Row]:
    """One row an accelerator."""
    for accel in ("kvm", "soft"):
        yield _row(accel, 100 if quick else 10_000)


def _row(accel: str, count: int) -> Row:
    name = f"machines {accel}"
    command = [sys.executable, str(Path(__file__)), accel, str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return Row(name, f"not measured: {count} machines took more than {TIMEOUT} s")
    if done.returncode:
        said = done.stderr.strip().split("\n")[-1]
        return Row(name, f"not measured: {said}")
    answer = json.loads(done.stdout)
    before, half, after = (Held(*answer[key]) for key in ("before", "half", "after"))
    more = Held(*(b - a for a, b in zip(before, after, strict=True)))
    lately = after.rss - half.rss
    return Row(
        name,
        f"{count} machines made, run to HLT and closed in one process after {WARM_UP} for "
        f"warming up: what it holds then against before ({answer['ms']:.1f} ms a machine)",
        count,
        _text(after),
        _text(before),
        f"{more.descriptors:+d} fd, {more.threads:+d} threads, {more.guest:+d} guest maps, "
        f"{more.mappings:+d} maps, {more.rss:+d} KiB ({lately:+d} in the 2nd half)",
        f"0, 0, 0, -, 2nd half <= {RSS_TARGET} KiB",
        max(more[:3]) <= 0 and lately <= RSS_TARGET,
        figures={
            "before": before._asdict(),
            "half": half._asdict(),
            "after": after._asdict(),
            "ms": answer["ms"],
        },
    )


def _text(held: Held) -> str:
    return f"{held.descriptors}, {held.threads}, {held.guest}, {held.mappings}, {held.rss}"


def _held() -> Held:
    gc.collect()
    time.sleep(0.2)  # the kernel's part of a thread ends a little after its join()
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    maps = Path("/proc/self/maps").read_text()
    return Held(
        _entries("/proc/self/fd"),
        _entries("/proc/self/task"),
        maps.count("vmexit-ram") + maps.count("anon_inode:kvm"),
        maps.count("\n"),
        rss // 1024,
    )


def _entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def _main(accel: str, count: int) -> None:
    from vmexit import Machine, StopReason

    def once() -> None:
        seen: list[int] = []
        with Machine(accel=accel) as vm:
            vm.load_bytes(_GUEST)
            vm.on_pio(0x10, write=lambda access: seen.append(access.value))
            stop = vm.run(timeout=TIMEOUT)
        assert stop.reason is StopReason.HALT, stop
        assert seen == [42]

    for _ in range(WARM_UP):
        once()
    held, taken = [_held()], 0.0
    for part in (count // 2, count - count // 2):
        begin = time.perf_counter()
        for _ in range(part):
            once()
        taken += time.perf_counter() - begin
        held.append(_held())
    answer = dict(zip(("before", "half", "after"), held, strict=True))
    print(json.dumps(answer | {"ms": taken / count * 1e3}))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
