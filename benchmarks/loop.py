"""Rows `loop`: what the loop around KVM_RUN itself adds to an exit."""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from typing import NamedTuple
from unittest.mock import patch

from counted import PORT, BareVcpu, CountedGuest, Counter, counts
from measure import Row, attempt, differences, interleave, spread
from native import run_loop

from vmexit import Access
from vmexit.abi.kvm import KVM_EXIT_IO, KVM_RUN
from vmexit.accel.kvm import vcpu as vcpu_module
from vmexit.accel.kvm.vcpu import KvmVcpu
from vmexit.core.bus import Bus, Device
from vmexit.core.memory import GuestMemory
from vmexit.machine.hooks import Hook

TARGET = 0.4  # µs

# An ioctl that every descriptor takes and that does next to nothing: set close-on-exec.
FIOCLEX = 0x5451


class Taken(NamedTuple):
    """Microseconds an exit: by the clock, and of the thread's CPU time."""

    wall: float
    cpu: float


def rows(quick: bool) -> Iterator[Row]:
    """The loop on KVM, with each guest, and on a stand-in whose KVM_RUN costs almost nothing."""
    rounds, count = (3, 10_000) if quick else (21, 200_000)
    for guest, exits in counts(quick):
        yield from attempt(f"loop ring {guest.ring}", _on_kvm(guest, rounds, exits))
    for name, what, make in (
        ("device", "a device straight on the bus", _next_device),
        ("on_pio", "what Machine.on_pio() puts there, and its callback", _next_hook),
    ):
        yield _without_kvm(name, what, make, rounds, count)


def _timed(count: int, run: Callable[[], object]) -> Taken:
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    run()
    cpu = time.thread_time_ns() - cpu
    wall = time.perf_counter_ns() - wall
    return Taken(wall / count / 1e3, cpu / count / 1e3)


def _row(name: str, compared: str, target: bool, ours: list[Taken], theirs: list[Taken]) -> Row:
    wall = differences([t.wall for t in ours], [t.wall for t in theirs])
    cpu = differences([t.cpu for t in ours], [t.cpu for t in theirs])
    mine, other = spread([t.wall for t in ours]), spread([t.wall for t in theirs])
    return Row(
        f"loop {name}",
        compared,
        len(ours),
        f"{mine.median:.3f} µs",
        f"{other.median:.3f} µs",
        f"CPU {cpu.text(' µs', 3, '+')}, by the clock {wall.median:+.3f} µs",
        f"<= {TARGET} µs more" if target else "-",
        # By CPU time: both sides never wait, so the clock adds only what others do meanwhile.
        cpu.median <= TARGET if target else None,
        target and cpu.around(TARGET),
        figures={"vmexit_us": mine, "c_us": other, "extra_us": wall, "extra_cpu_us": cpu},
    )


def _on_kvm(guest: CountedGuest, rounds: int, count: int) -> Iterator[Row]:
    c = run_loop()
    with BareVcpu(guest) as bare:
        address = ctypes.addressof(bare.vcpu.kvm_run())

        def in_python() -> Taken:
            bare.start(count)
            taken = _timed(count, bare.vcpu.run)
            assert bare.counter.count == count
            return taken

        def in_c() -> Taken:
            bare.start(count)
            counted = -1

            def run() -> None:
                nonlocal counted
                counted = c(bare.vcpu.fd, address, KVM_RUN, 0)

            taken = _timed(count, run)
            assert counted == count
            return taken

        def in_barest() -> Taken:
            bare.start(count)
            taken = _timed(count, lambda: _barest_loop(bare.vcpu, *last))
            bare.vcpu.kick()  # KVM finishes the last access when it is entered again
            bare.vcpu.run()
            return taken

        # Where in kvm_run the guest's last exit differs from the others: ring 0 ends by HLT,
        # ring 3 by writing to another port.
        last = (2, KVM_EXIT_IO) if guest.ring == 0 else (8, PORT << 16 | 1 << 8 | 1)
        in_python(), in_c(), in_barest()
        ours, barest, theirs = interleave(rounds, (in_python, in_barest, in_c))
    same = (
        f"against a C loop on the very same vCPU, in the same thread; guest {guest.name}, {count} "
        "exits a round, difference per round"
    )
    yield _row(
        f"ring {guest.ring}, device",
        f"Vcpu.run() with a device straight on the bus {same}",
        True,
        ours,
        theirs,
    )
    yield _row(
        f"ring {guest.ring}, barest",
        f"the least that Python can do, which is KVM_RUN and one comparison, {same}",
        False,
        barest,
        theirs,
    )


def _barest_loop(vcpu: KvmVcpu, index: int, value: int) -> None:
    fd, request, run = vcpu.fd, KVM_RUN, ioctl
    words = memoryview(vcpu.kvm_run()).cast("B").cast("I")
    while True:
        run(fd, request)
        if words[index] != value:
            return


class _StandIn(KvmVcpu):
    """A vCPU over a file that says for ever: one byte goes out to port 0x10."""

    def _set_signal_mask(self, blocked: object) -> None:
        """A file knows no signal mask."""


class _Next(Counter):
    """Counts down in C, and ends the loop; costs as much as counting."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._next = iter(range(count)).__next__

    def write(self, offset: int, size: int, value: int) -> None:
        self._next()


def _next_device(count: int) -> Device:
    return _Next(count)


def _next_hook(count: int) -> Device:
    following = iter(range(count)).__next__

    def callback(access: Access) -> None:
        following()

    return Hook(PORT, None, callback)


def _without_kvm(
    name: str, what: str, make: Callable[[int], Device], rounds: int, count: int
) -> Row:
    c = run_loop()
    size = 2 * 4096
    fd = os.memfd_create("bench-kvm-run", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    pio, memory = Bus("port"), GuestMemory([(0, 4096)])
    vcpu = _StandIn(fd, 0, size, memory, pio, Bus("MMIO"), None)
    page = vcpu.kvm_run()
    page.exit_reason = KVM_EXIT_IO
    page.io.direction, page.io.size, page.io.port = 1, 1, PORT
    page.io.count, page.io.data_offset = 1, 4096
    address = ctypes.addressof(page)
    del page
    ioctl(fd, FIOCLEX)

    def run_python() -> None:
        try:
            vcpu.run()
        except StopIteration:
            return
        raise AssertionError("the loop ended by itself")

    def in_python() -> Taken:
        pio.attach(PORT, 1, make(count))
        try:
            with patch.object(vcpu_module, "KVM_RUN", FIOCLEX):
                return _timed(count, run_python)
        finally:
            pio.detach(PORT)

    def in_c() -> Taken:
        return _timed(count, lambda: c(fd, address, FIOCLEX, count))

    in_python(), in_c()
    ours, theirs = interleave(rounds, (in_python, in_c))
    vcpu.close()
    memory.close()
    return _row(
        f"no KVM, {name}",
        f"the same loops around an ioctl that does next to nothing (FIOCLEX), with {what}: no "
        f"guest, so no noise of KVM's; {count} exits a round",
        name == "device",
        ours,
        theirs,
    )
