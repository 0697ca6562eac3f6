"""What happens to a machine, and who is told."""

import time
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from vmexit.core.listeners import Listeners
from vmexit.machine.stop import Stop


class RunState(Enum):
    """What a machine is doing."""

    CREATED = "created"  # nothing has run yet
    RUNNING = "running"
    PAUSED = "paused"  # no vCPU runs, and all could go on
    SHUTDOWN = "shutdown"  # the guest has ended: halted, switched off, reset, its debug-exit port
    CRASHED = "crashed"
    CLOSED = "closed"


class EventKind(Enum):
    """What happened."""

    RESUMED = "resumed"
    PAUSED = "paused"
    DEBUG = "debug"  # paused at a breakpoint or watchpoint, or after a step
    RESET = "reset"
    POWERDOWN = "powerdown"  # the power button was pressed
    SHUTDOWN = "shutdown"
    CRASHED = "crashed"
    CRASH_KERNEL = "crash-kernel"  # the guest panics, and sees to it itself (pvpanic)
    BALLOON = "balloon"  # it has taken memory, or given it back


class Event(NamedTuple):
    """One event; `time` is in seconds since 1970.

    `stop` is how the guest stopped, if it did; for RESET None means that not the guest wanted it.
    """

    kind: EventKind
    time: float
    stop: Stop | None = None
    held: bool = False
    """The machine is paused where SHUTDOWN and CRASHED would have ended its run."""
    value: int = 0
    """How many bytes the balloon has, for BALLOON."""


Subscriber = Callable[[Event], object]


class Subscribers:
    """Tells each event to all who want to know, in the thread where it happens."""

    def __init__(self, fail: Callable[[Exception], None]) -> None:
        """`fail` gets what a subscriber raises."""
        self._fail = fail
        self._functions: Listeners[Subscriber] = Listeners()

    def add(self, function: Subscriber) -> Callable[[], None]:
        """From now on `function` is told; returns what ends that."""
        return self._functions.add(function)

    def tell(
        self, kind: EventKind, stop: Stop | None = None, *, held: bool = False, value: int = 0
    ) -> None:
        """One that raises keeps the others from nothing."""
        if self._functions:
            event = Event(kind, time.time(), stop, held, value)
            for function in self._functions:
                try:
                    function(event)
                except Exception as error:
                    self._fail(error)
