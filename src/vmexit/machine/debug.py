"""Runs that stop at points: breakpoints, watchpoints, and steps of one instruction."""

import threading
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

from vmexit.accel.base import Point, PointKind, Vcpu, Vm, Way, linear_rip
from vmexit.boot.entry import Linked
from vmexit.core.errors import ConfigError
from vmexit.machine.runner import Runner
from vmexit.machine.stop import Stop, StopReason


class Turn(NamedTuple):
    """What the vCPUs are to do: run on, or `step` one of them; all of them, or `only` one."""

    step: int | None = None
    only: int | None = None


ALL = Turn()


_MOST = 1 << 64
_LONGEST = 4096  # bytes that one watchpoint is about


def check_point(point: Point) -> None:
    """Raises ConfigError for what is no breakpoint or watchpoint."""
    if not isinstance(point, Point) or not isinstance(point.kind, PointKind):
        raise ConfigError(f"{point!r} is no breakpoint; use Point(address, PointKind.EXECUTE)")
    gva, _, length = point
    if not isinstance(gva, int) or not isinstance(length, int):
        raise ConfigError(f"{point!r} has no address; use a number")
    if not 0 <= gva < _MOST or not 0 < length <= min(_LONGEST, _MOST - gva):
        raise ConfigError(
            f"{length} bytes at {gva:#x} cannot be watched; use an address of 64 bits and 1 to "
            f"{_LONGEST} bytes"
        )


class DebuggedRunner:
    """Runs the vCPUs, and has them stop at the points that somebody has set."""

    def __init__(
        self, runner: Runner, vm: Vm, vcpus: Sequence[Vcpu], linked: Sequence[Linked] = ()
    ) -> None:
        """`linked` is code that has virtual addresses before they are mapped."""
        self._runner = runner
        self._linked = linked
        self._vm = vm  # which makes its debugger at the first use
        self._vcpus = vcpus
        self._lock = threading.Lock()
        self._points: dict[Point, int] = {}  # with how many want it
        self._ways: dict[Point, Way] = {}
        self._stopped_at: dict[int, int] = {}  # linear addresses of points, by vCPU
        self.armed = False
        """Whether the vCPUs run with points, or a step."""

    def add(self, point: Point) -> None:
        """Stop there in the runs to come. Each `add()` wants its `remove()`."""
        with self._lock:
            self._points[point] = self._points.get(point, 0) + 1

    def remove(self, point: Point) -> None:
        """Undo one `add()`; a point that is not set is none of our business."""
        with self._lock:
            count = self._points.get(point, 0)
            if count > 1:
                self._points[point] = count - 1
            else:
                self._points.pop(point, None)

    def points(self) -> dict[Point, Way | None]:
        """Those that are set, and how the last run stopped at each; None for a new one."""
        with self._lock:
            return {point: self._ways.get(point) for point in self._points}

    def settle(self) -> None:
        """See `Runner.settle()`."""
        self._runner.settle()

    def forget(self) -> None:
        """The vCPUs are elsewhere now: none has been stopped at a breakpoint."""
        self._stopped_at.clear()

    def try_out(self) -> dict[Point, Way]:
        """How each point would be done; raises HostError if all at once cannot be."""
        with self._lock:
            points = tuple(self._points)
        try:
            return self._vm.debugger.arm(points, linked=self._gpa)
        finally:
            self._vm.debugger.disarm()

    def run(self, timeout: float | None, turn: Turn = ALL) -> Stop:
        """As `Runner.run()`; DEBUG is the reason at a point, and once a step is done.

        A vCPU that the last run has left at a breakpoint goes on behind it.
        """
        with self._lock:
            points = tuple(self._points)
        stopped_at, self._stopped_at = self._stopped_at, {}
        if not points and turn == ALL:
            return self._runner.run(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        if turn.step is None:
            left = self._leave_points(points, stopped_at, turn.only, end)
            if left is not None:
                return left
        elif turn.only is not None:
            self._stopped_at = {n: gva for n, gva in stopped_at.items() if n != turn.step}
        while self._is_elsewhere(stop := self._run(points, end, turn)):
            over = self._step_off(stop.vcpu, points, end)
            if over is not None:
                return over
        return stop

    def _leave_points(
        self,
        points: Collection[Point],
        stopped_at: dict[int, int],
        only: int | None,
        end: float | None,
    ) -> Stop | None:
        """Step those that are to run off the breakpoints that they are at; how that ends the run.

        None if it goes on.
        """
        for number, gva in stopped_at.items():
            vcpu = self._vcpus[number]
            if only not in (None, number):
                self._stopped_at[number] = gva  # it stays where it is
            elif linear_rip(vcpu) == gva and Point(gva) in points:
                try:
                    stop = self._step_off(number, points, end)
                except BaseException:
                    self._stopped_at = stopped_at
                    raise
                if stop is not None:
                    self._stopped_at = stopped_at | self._stopped_at  # it may not have stepped
                    return stop
        return None

    def _step_off(self, number: int, points: Collection[Point], end: float | None) -> Stop | None:
        """Have a vCPU execute the instruction that a breakpoint is at; how that ends the run.

        None if it goes on.
        """
        stop = self._run(points, end, Turn(number, number))
        if stop.reason is not StopReason.DEBUG or stop.point is not None:
            return stop
        # Not each accelerator stops at a point where the run begins.
        if (here := Point(linear_rip(self._vcpus[number]))) in points:
            self._stopped_at[number] = here.gva
            return stop._replace(point=here)
        return None

    def _is_elsewhere(self, stop: Stop) -> bool:
        """Whether it came to a breakpoint's code by another address, which has no breakpoint."""
        point = stop.point
        if point is None or point.kind is not PointKind.EXECUTE:
            return False
        return linear_rip(self._vcpus[stop.vcpu]) != point.gva

    def _run(self, points: Collection[Point], end: float | None, turn: Turn) -> Stop:
        """One run, armed; `end` is when it is over, on the monotonic clock."""
        timeout = None if end is None else max(0, end - time.monotonic())
        try:
            self.armed = True
            ways = self._vm.debugger.arm(points, turn.step, turn.only, self._gpa)
            with self._lock:
                self._ways |= ways
            stop = self._runner.run(timeout, turn.only)
        finally:
            self.armed = False
            self._vm.debugger.disarm()
        point = stop.point
        if point is not None and point.kind is PointKind.EXECUTE and not self._is_elsewhere(stop):
            self._stopped_at[stop.vcpu] = point.gva
        return stop

    def _gpa(self, gva: int) -> int | None:
        for code in self._linked:
            if code.gva <= gva < code.gva + code.size:
                return gva - code.gva + code.gpa
        return None
