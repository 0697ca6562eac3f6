"""The pvpanic device: a guest tells that it panics (QEMU, docs/specs/pvpanic)."""

from collections.abc import Callable

from vmexit.core.bus import State

PANICKED, CRASH_LOADED, SHUTDOWN = 1 << 0, 1 << 1, 1 << 2
EVENTS = PANICKED | CRASH_LOADED | SHUTDOWN


class PvPanic:
    """One port, which says what events it knows of and takes them.

    It has no state; any vCPU may enter, and the callbacks must allow that.
    """

    widths = (1,)

    def __init__(
        self,
        panicked: Callable[[], None],
        crash_kernel: Callable[[], None],
        shut_down: Callable[[], None],
    ) -> None:
        """What to call when the guest has panicked and that is its end; when it has panicked and
        a kernel of its own (kdump) sees to that; and when it has shut down.
        """
        self._calls = (
            (PANICKED, panicked),
            (CRASH_LOADED, crash_kernel),
            (SHUTDOWN, shut_down),
        )

    def read(self, offset: int, size: int) -> int:
        return EVENTS

    def write(self, offset: int, size: int, value: int) -> None:
        for bit, call in self._calls:
            if value & bit:
                call()

    def reset(self) -> None:
        """It has no state."""

    def state(self) -> State:
        return {"version": 1}

    def restore(self, state: State) -> None:
        """It has no state."""
