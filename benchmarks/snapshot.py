"""Rows `snapshot`: clones to their first exit and going back by dirty pages, against C programs;
going back by rings against the log; what clones of a booted Linux take.

As a program, `snapshot.py COUNT` makes so many of these and prints what one takes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import sizeof
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from console import debian
from measure import Row, Unavailable, attempt, interleave, ratios, spread
from native import TIMEOUT, program, run

from vmexit import HostError, Machine, Snapshot, StopReason
from vmexit.abi.kvm import KVM_GET_REGS, KVM_GET_SREGS
from vmexit.abi.kvm_structs import kvm_regs, kvm_sregs
from vmexit.accel.kvm.vcpu import KvmVcpu

MEMORY = 128 << 20
PAGES = (10, 100, 1000)
MUCH_MEMORY, FEW_PAGES, RING = 8 << 30, 10, 4096
CLONE_TARGET, RESET_TARGET, SIZE_TARGET = 1.0, 1.0, 30.0  # ms, times, MiB

_SNAPSHOT_PORT, _END_PORT, _COUNT_AT = 0x10, 0x11, 0x800

# 64-bit: out 0x10, al; rdi = 2 MiB; ecx = [0x800]; then cl to each second page, ecx times, counting
# down; out 0x11, al; from the beginning.
_WRITER = bytes.fromhex(
    "e610 48c7c700002000 8b0c2500080000 85c9 740d 880f 4881c700200000 ffc9 ebef e611 ebdb"
)


def rows(quick: bool) -> Iterator[Row]:
    """On KVM with a guest of 128 MiB and all of a vCPU's state; Linux on the software CPU."""
    for name, processors in (("bare", 0), ("on one processor", 1)):
        with _on(processors):
            yield from attempt(f"clone {name}", _clone(name, *((2, 10) if quick else (20, 20))))
    yield from attempt("clone microvm", _clone_microvm(20 if quick else 300))
    for pages in PAGES:
        yield from attempt(
            f"reset {pages} pages", _reset(pages, *((2, 20) if quick else (20, 100)))
        )
    yield from attempt("reset by rings", _rings(*((2, 20) if quick else (20, 100))))
    yield from attempt("clones soft", _clones(5 if quick else 100))


def _machine(
    pages: int,
    machine: str = "bare",
    end: Callable[[Machine], None] = Machine.stop,
    memory: int = MEMORY,
    ring: int = 0,
) -> Machine:
    """Stopped before it writes to so many pages; after that it is for `end`."""
    try:
        vm = Machine(memory, "kvm", machine=machine, dirty_ring=ring)
    except HostError as error:
        raise Unavailable(str(error)) from error
    vm.load_bytes(_WRITER, mode="long")
    vm.memory.write_u32(_COUNT_AT, pages)
    vm.on_pio(_SNAPSHOT_PORT, write=lambda access: vm.stop())
    vm.on_pio(_END_PORT, write=lambda access: end(vm))
    return vm


@contextmanager
def _on(processors: int) -> Iterator[None]:
    """What begins within runs on so many processors; 0 for all that there are."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:processors] or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _clone(name: str, rounds: int, block: int) -> Iterator[Row]:
    c = program("kvm_clone")
    with _machine(0) as vm, _kept(vm) as state:
        _run(vm)
        with vm.snapshot() as snapshot:

            def in_python() -> float:
                return spread([_first_exit(snapshot) for _ in range(block)]).median

            def in_c() -> float:
                lines = run(c, state, str(block)).splitlines()
                return spread([int(line) / 1e6 for line in lines]).median

            in_python()
            ours, theirs = interleave(rounds, (in_python, in_c))
    times, ratio = spread(ours), ratios(ours, theirs)
    yield Row(
        f"clone {name}",
        f"snapshot.clone() to the first exit of its guest on KVM, {MEMORY >> 20} MiB, without "
        "interrupt controllers; against C that loads all state, in one thread; on "
        f"{len(os.sched_getaffinity(0))} processors; taking it apart is not counted",
        rounds * block,
        times.text(" ms"),
        spread(theirs).text(" ms"),
        ratio.text("x"),
        f"<= {CLONE_TARGET:.0f} ms",
        times.median <= CLONE_TARGET,
        times.around(CLONE_TARGET),
        figures={"ms": times, "c_ms": spread(theirs), "ratio": ratio},
    )


def _clone_microvm(rounds: int) -> Iterator[Row]:
    with _machine(0, "microvm") as vm:
        _run(vm)
        with vm.snapshot() as snapshot:
            _first_exit(snapshot)
            times = spread([_first_exit(snapshot) for _ in range(rounds)])
    yield Row(
        "clone microvm",
        "the same with interrupt controllers and all that a PC has, nothing to compare with",
        rounds,
        times.text(" ms"),
        result=times.text(" ms"),
        figures={"ms": times},
    )


def _first_exit(snapshot: Snapshot) -> float:
    begin = time.perf_counter()
    with snapshot.clone() as twin:
        twin.on_pio(_END_PORT, write=lambda access: twin.stop())
        _run(twin)
        return (time.perf_counter() - begin) * 1e3


def _run(vm: Machine) -> None:
    stop = vm.run(timeout=TIMEOUT)
    assert stop.reason is StopReason.STOPPED, stop


class _Looping:
    """A machine whose guest writes to so many pages and goes back, again and again."""

    def __init__(self, pages: int, memory: int = MEMORY, ring: int = 0) -> None:
        self.vm = _machine(pages, end=self._at_end, memory=memory, ring=ring)
        self._snapshot: Snapshot | None = None
        self._times: list[float] = []
        self._rounds = 0  # to go on within the run

    def begin(self) -> None:
        """To where each round begins."""
        _run(self.vm)
        self._snapshot = self.vm.snapshot()

    def _at_end(self, vm: Machine) -> None:
        self._times.append(time.perf_counter())
        if self._rounds:
            self._go_back()
        if len(self._times) > self._rounds:
            vm.stop()

    def _go_back(self) -> None:
        assert self._snapshot is not None
        self.vm.reset_to(self._snapshot)

    def in_callback(self, rounds: int) -> float:
        """The microseconds of one, all within one run."""
        self._times.clear()
        self._rounds = rounds
        _run(self.vm)
        return spread([(b - a) * 1e6 for a, b in pairwise(self._times)]).median

    def by_run(self, rounds: int) -> float:
        """The same with a run for each."""
        self._rounds = 0
        took = []
        for _ in range(rounds):
            begin = time.perf_counter()
            _run(self.vm)
            self._go_back()
            took.append((time.perf_counter() - begin) * 1e6)
        return spread(took).median

    def __enter__(self) -> "_Looping":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._snapshot is not None:
            self._snapshot.close()
        self.vm.close()


def _reset(pages: int, rounds: int, block: int) -> Iterator[Row]:
    c = program("kvm_reset")
    with _Looping(pages) as looping, _kept(looping.vm) as state:
        looping.begin()

        def in_c() -> float:
            lines = run(c, state, str(block)).splitlines()
            return spread([int(line.split()[0]) / 1e3 for line in lines]).median

        for _ in range(3):  # from then on the pages are known, and there
            looping.by_run(block)
        ours, theirs, runs = interleave(
            rounds,
            (partial(looping.in_callback, block), in_c, partial(looping.by_run, block)),
        )
    speed = ratios(theirs, ours)
    yield Row(
        f"reset {pages} pages",
        f"the guest writes to {pages} scattered pages, and a callback has reset_to() it, in one "
        "run(); against C with KVM_GET_DIRTY_LOG, memcpy and the same state of the vCPU; with a "
        f"run() for each it is {ratios(theirs, runs).text('x')}",
        rounds * block,
        spread([1e6 / time for time in ours]).text("/s", 0),
        spread([1e6 / time for time in theirs]).text("/s", 0),
        speed.text("x"),
        f">= {RESET_TARGET:.0f}x",
        speed.median >= RESET_TARGET,
        speed.around(RESET_TARGET),
        figures={
            "vmexit_us": spread(ours),
            "by_run_us": spread(runs),
            "c_us": spread(theirs),
            "ratio": speed,
        },
    )


def _rings(rounds: int, block: int) -> Iterator[Row]:
    """KVM's dirty rings against its dirty log, in much memory."""

    with (
        _Looping(FEW_PAGES, MUCH_MEMORY, RING) as rings,
        _Looping(FEW_PAGES, MUCH_MEMORY) as log,
    ):
        for one in (rings, log):
            one.begin()
            one.in_callback(block)
        by_rings, by_log = interleave(
            rounds, (partial(rings.in_callback, block), partial(log.in_callback, block))
        )
    speed = ratios(by_log, by_rings)
    yield Row(
        "reset by rings",
        f"{FEW_PAGES} pages of {MUCH_MEMORY >> 30} GiB, as above: with dirty_ring={RING}, and "
        "with the log",
        rounds * block,
        spread([1e6 / time for time in by_rings]).text("/s", 0),
        spread([1e6 / time for time in by_log]).text("/s", 0),
        speed.text("x"),
        figures={"rings_us": spread(by_rings), "log_us": spread(by_log), "ratio": speed},
    )


@contextmanager
def _kept(vm: Machine) -> Iterator[str]:
    """A file with what the C programs read."""
    (vcpu,) = vm._vcpus()
    assert isinstance(vcpu, KvmVcpu)
    sregs, regs = bytearray(sizeof(kvm_sregs)), bytearray(sizeof(kvm_regs))
    vcpu.get("system registers", KVM_GET_SREGS, sregs)
    vcpu.get("registers", KVM_GET_REGS, regs)
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(sregs + regs) + vm.memory.read(0, MEMORY))
        file.flush()
        yield file.name


# Clones of Linux.


class Taken(NamedTuple):
    """KiB of this process, shared pages by their share, and those of guests' memory."""

    all: int
    guests: int


def _clones(count: int) -> Iterator[Row]:
    debian()
    command = [sys.executable, str(Path(__file__)), str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{count} clones took more than 900 s") from error
    if done.returncode:
        raise Unavailable(done.stderr.strip().split("\n")[-1])
    answer = json.loads(done.stdout)
    each: float = answer["mib"]
    yield Row(
        "clones soft",
        f"{count} clones of Debian's kernel at its shell on the software CPU, each of which has "
        f"run a command: what one takes beside the {answer['guest_mib']:.1f} MiB that its guest "
        f"has written ({answer['ms']:.1f} ms to make one)",
        count,
        f"{each:.1f} MiB",
        target=f"< {SIZE_TARGET:.0f} MiB",
        result=f"{each:.1f} MiB a clone",
        met=each < SIZE_TARGET,
        figures=answer,
    )


_NAME = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")


def _taken() -> Taken:
    total = guests = 0
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := _NAME.match(line):
            name = found[1]
        elif line.startswith("Pss:"):
            total += int(line.split()[1])
        elif line.startswith("Anonymous:") and "memfd:vmexit" in name:
            guests += int(line.split()[1])
    return Taken(total, guests)


def _main(count: int) -> None:
    files = debian()
    kernel: dict[str, str | os.PathLike[str]] = {"kernel": files.kernel, "initrd": files.initrd}
    with Machine("256M", "soft", append="console=ttyS0", serial="null", **kernel) as vm:  # type: ignore[arg-type]
        vm.shell("true", timeout=120)
        snapshot = vm.snapshot()
        clones: list[Machine] = []
        times: list[float] = []

        def another() -> None:
            begin = time.perf_counter()
            clones.append(snapshot.clone())
            times.append(time.perf_counter() - begin)
            said = clones[-1].shell("echo $((6 * 7))", timeout=120).strip()
            assert said == "42", repr(said)

        another()
        before = _taken()
        for _ in range(count):
            another()
        after = _taken()
        guests = after.guests - before.guests
        answer = {
            "mib": (after.all - before.all - guests) / count / 1024,
            "guest_mib": guests / count / 1024,
            "ms": spread(times).median * 1e3,
        }
        for clone in clones:
            clone.close()
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
