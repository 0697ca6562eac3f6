"""The debug console: what the guest writes to its port goes out as it is.

Bochs began it at port 0xe9; SeaBIOS and OVMF write their log to one at 0x402.
"""

from collections.abc import Callable

from vmexit.core.bus import State

PRESENT = 0xE9  # what a read gives: firmware looks for it before it writes


class Debugcon:
    """Any vCPU may write at any time; `write` of the backend must allow that."""

    widths = (1,)

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write

    def read(self, offset: int, size: int) -> int:
        return PRESENT

    def write(self, offset: int, size: int, value: int) -> None:
        self._write(bytes((value,)))

    def reset(self) -> None:
        """It has no state."""

    def state(self) -> State:
        return {"version": 1}

    def restore(self, state: State) -> None:
        """It has no state."""
