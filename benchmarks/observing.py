"""Rows `observing`: that exits cost the same while nobody observes, and what observers cost."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

from counted import PORT, RING0, BareVcpu, counts
from loop import FIOCLEX
from measure import Row, Unavailable, attempt, differences, interleave, spread

from vmexit import ChromeTrace, ExitObserver, ExitStats, JsonTrace, Machine
from vmexit.abi.kvm import KVM_EXIT_IO
from vmexit.accel.kvm import vcpu as vcpu_module
from vmexit.accel.soft import processor
from vmexit.cli import _Output
from vmexit.core.bus import Bus
from vmexit.core.chrome_trace import TraceInfo
from vmexit.core.memory import GuestMemory
from vmexit.machine.hooks import Hook

ROOT = Path(__file__).resolve().parent.parent

# The last state of the accelerators in which exits had no beginning and no end.
BEFORE = "85dd78b"

TARGET = 0.1  # µs

# 32-bit code that stores EAX where no memory is, COUNT times, or puts it out to a port.
_MMIO = 0xD000_0000
_STORE, _OUT = b"\xa3" + _MMIO.to_bytes(4, "little"), bytes((0xE7, PORT))


class Taken(NamedTuple):
    """Microseconds an exit: by the clock, and of the thread's CPU time."""

    wall: float
    cpu: float


Side = Callable[[], Taken]


def rows(quick: bool) -> Iterator[Row]:
    """On KVM, on a stand-in whose KVM_RUN costs almost nothing, and on the software CPU."""
    rounds = 3 if quick else 21
    yield from attempt("observing no KVM", _without_kvm(rounds, quick))
    yield from attempt("observing kvm", _on_kvm(rounds, dict(counts(quick))[RING0]))
    for name, code in (("port", _OUT), ("MMIO", _STORE)):
        yield from attempt(f"observing soft {name}", _on_soft(rounds, quick, name, code))


def _before(path: str) -> ModuleType:
    """A module of vmexit as it was. Raises Unavailable."""
    command = ["git", "show", f"{BEFORE}:src/vmexit/{path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"git does not have {path} of {BEFORE}")
    module = ModuleType(f"before_{Path(path).stem}")
    try:
        exec(compile(done.stdout, f"{BEFORE}:{path}", "exec"), module.__dict__)
    except ImportError as error:
        raise Unavailable(f"{path} of {BEFORE} does not fit any more: {error}") from error
    return module


def _observers(stack: ExitStack) -> dict[str, ExitObserver]:
    """Those of the command, which write to files."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def output(name: str) -> _Output:
        return stack.enter_context(_Output.to_file(str(folder / name)))

    chrome = ChromeTrace(output("chrome"))
    chrome.begin(TraceInfo("", "", 1, (), lambda mmio, address: "device"))
    stack.callback(chrome.close)
    return {
        "--stats": ExitStats(),
        "--trace": JsonTrace(output("json")),
        "--trace-format chrome": chrome,
    }


def _timed(count: int, run: Callable[[], object]) -> Taken:
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    run()
    cpu = time.thread_time_ns() - cpu
    wall = time.perf_counter_ns() - wall
    return Taken(wall / count / 1e3, cpu / count / 1e3)


def _rows(where: str, what: str, rounds: int, off: Side, sides: dict[str, Side]) -> Iterator[Row]:
    """`before` among `sides` is compared with `off`, and `off` with the others."""
    everyone = {"off": off, **sides}
    for side in everyone.values():
        side()
    taken = dict(zip(everyone, interleave(rounds, list(everyone.values())), strict=True))
    for name in sides:
        ours, theirs = ("off", name) if name == "before" else (name, "off")
        wall = differences([t.wall for t in taken[ours]], [t.wall for t in taken[theirs]])
        cpu = differences([t.cpu for t in taken[ours]], [t.cpu for t in taken[theirs]])
        same = name == "before"
        yield Row(
            f"observing {ours}, {where}",
            f"{what}, {'against the same before' if same else 'against nobody who observes'}",
            rounds,
            f"{spread([t.wall for t in taken[ours]]).median:.3f} µs",
            f"{spread([t.wall for t in taken[theirs]]).median:.3f} µs",
            f"CPU {cpu.text(' µs', 3, '+')}, by the clock {wall.median:+.3f} µs",
            f"<= {TARGET} µs more" if same else "-",
            # By CPU time: no side waits, so the clock adds only what others do meanwhile.
            cpu.median <= TARGET if same else None,
            same and cpu.around(TARGET),
            figures={"extra_us": wall, "extra_cpu_us": cpu},
        )


def _on_kvm(rounds: int, count: int) -> Iterator[Row]:
    before = _before("accel/kvm/vcpu.py")
    with ExitStack() as stack:
        bare = stack.enter_context(BareVcpu(RING0))

        def side(run: Callable[[], object]) -> Side:
            def measure() -> Taken:
                bare.start(count)
                return _timed(count, run)

            return measure

        sides = {"before": side(bare.another(before.KvmVcpu).run)}
        for name, observer in _observers(stack).items():
            sides[name] = side(bare.another(observer=observer).run)
        what = f"Vcpu.run() on one KVM vCPU, guest {RING0.name}, {count} exits a round"
        yield from _rows("kvm", what, rounds, side(bare.vcpu.run), sides)


def _endless(stack: ExitStack, module: ModuleType, count: int) -> Side:
    """The loop of `module` around an ioctl that does next to nothing: no guest, so no noise."""

    class StandIn(module.KvmVcpu):
        def _set_signal_mask(self, blocked: object) -> None:
            """A file knows no signal mask."""

    fd = os.memfd_create("bench-kvm-run", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * 4096)
    memory = GuestMemory([(0, 4096)])
    stack.callback(memory.close)
    pio = Bus("port")
    vcpu = StandIn(fd, 0, 2 * 4096, memory, pio, Bus("MMIO"), None)
    stack.callback(vcpu.close)
    page = vcpu.kvm_run()
    page.exit_reason = KVM_EXIT_IO
    page.io.direction, page.io.size, page.io.port = 1, 1, PORT
    page.io.count, page.io.data_offset = 1, 4096
    del page

    def measure() -> Taken:
        def run() -> None:
            with suppress(StopIteration):
                vcpu.run()

        following = iter(range(count)).__next__
        pio.attach(PORT, 1, Hook(PORT, None, lambda access: following()))
        try:
            with patch.object(module, "KVM_RUN", FIOCLEX):
                return _timed(count, run)
        finally:
            pio.detach(PORT)

    return measure


def _without_kvm(rounds: int, quick: bool) -> Iterator[Row]:
    count = 10_000 if quick else 100_000
    with ExitStack() as stack:
        off = _endless(stack, vcpu_module, count)
        before = _endless(stack, _before("accel/kvm/vcpu.py"), count)
        what = (
            f"the loop around an ioctl that does next to nothing (FIOCLEX), {count} exits a round"
        )
        yield from _rows("no KVM", what, rounds, off, {"before": before})


class _Ignore:
    """A device that does nothing."""

    widths = (1, 2, 4)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        return


def _on_soft(rounds: int, quick: bool, name: str, instruction: bytes) -> Iterator[Row]:
    count = 1_000 if quick else 20_000
    back = 0x100 - len(instruction) - 3
    loop = b"\xb9" + count.to_bytes(4, "little") + instruction + bytes((0x49, 0x75, back, 0xF4))
    ports, mmio = _before("accel/soft/port_io.py").PortIo, _before("accel/soft/mmio.py").Mmio

    def side(observer: ExitObserver | None, *, old: bool = False) -> Side:
        def measure() -> Taken:
            with ExitStack() as stack:
                if old:
                    stack.enter_context(patch.object(processor, "PortIo", ports))
                    stack.enter_context(patch.object(processor, "Mmio", mmio))
                vm = stack.enter_context(Machine("1M", "soft", observer=observer))
                vm._parts.pio.attach(PORT, 4, _Ignore())
                vm._parts.mmio.attach(_MMIO, 4, _Ignore())
                vm.load_bytes(loop, mode="protected")
                executor = vm._parts.vm.executors[0]
                return _timed(count, executor.run)

        return measure

    with ExitStack() as stack:
        sides = {"before": side(None, old=True)}
        sides |= {what: side(observer) for what, observer in _observers(stack).items()}
        what = f"the software CPU, a guest that writes to {name} in a loop, {count} exits a round"
        yield from _rows(f"soft {name}", what, rounds, side(None), sides)
