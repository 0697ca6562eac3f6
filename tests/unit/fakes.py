"""What the devices under test are connected to: a recording interrupt controller, a clock."""

from collections.abc import Callable

from vmexit.core.irq import IrqLine


class Pins:
    """An IrqChip that keeps the levels, and a log of what it was told."""

    def __init__(self) -> None:
        self.levels: dict[int, bool] = {}
        self.log: list[tuple[int, bool]] = []
        self.edges = 0  # low to high

    def set_level(self, gsi: int, level: bool) -> None:
        self.edges += level and not self.levels.get(gsi, False)
        self.levels[gsi] = level
        self.log.append((gsi, level))

    def line(self, gsi: int) -> IrqLine:
        return IrqLine(self, gsi)


class ManualClock:
    """A clock that stands still until it is advanced, and then calls what is due, in order."""

    def __init__(self, now: int = 1_000_000_000_000) -> None:
        self.time = now
        self.calls = 0
        self._timers: list[ManualTimer] = []

    def now(self) -> int:
        return self.time

    def timer(self, function: Callable[[], None]) -> "ManualTimer":
        timer = ManualTimer(function)
        self._timers.append(timer)
        return timer

    @property
    def armed(self) -> list[int]:
        """The deadlines that are set."""
        deadlines = [timer.deadline for timer in self._timers]
        return sorted(deadline for deadline in deadlines if deadline is not None)

    def advance(self, nanoseconds: int) -> None:
        end = self.time + nanoseconds
        while (armed := self.armed) and armed[0] <= end:  # a device may be used meanwhile
            self.time = max(self.time, armed[0])
            self.fire()
        self.time = end

    def sleep(self, nanoseconds: int) -> None:
        """Advance as a busy host does: what is due is called once, and late."""
        self.time += nanoseconds
        self.fire()

    def fire(self) -> None:
        """Call what is due."""
        for timer in self._timers:
            deadline = timer.deadline
            if deadline is not None and deadline <= self.time:
                timer.deadline = None
                self.calls += 1
                timer.function()


class ManualTimer:
    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.deadline: int | None = None

    def set(self, deadline: int | None) -> None:
        self.deadline = deadline
