"""The debug-exit port: a guest writes a number there to end the run with an exit status."""

from collections.abc import Callable

from vmexit.core.bus import State


class DebugExit:
    """Any vCPU may write at any time; the callback must allow that."""

    widths = (1, 2, 4)

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        """`on_exit` is called with the value written."""
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._on_exit(value)

    def reset(self) -> None:
        """It has no state."""

    def state(self) -> State:
        return {"version": 1}

    def restore(self, state: State) -> None:
        """It has no state."""
