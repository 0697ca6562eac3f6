"""Time, as devices see it."""

from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """Calls a function once, when its time has come."""

    def set(self, deadline: int | None) -> None:
        """Call at `deadline` (nanoseconds on the clock that made it), or never: None.

        It replaces what was set before. A call that is under way already still happens, so the
        function must look by itself whether it is due.
        """
        ...


class Clock(Protocol):
    """A clock that never goes back, in nanoseconds, and timers on it. Any thread may use it."""

    def now(self) -> int:
        """Nanoseconds since some moment in the past."""
        ...

    def timer(self, function: Callable[[], None]) -> Timer:
        """A timer, not set yet. `function` is called from the thread of the clock, without locks;
        it must be short and may not raise.
        """
        ...
