"""A Python function in the place of a device."""

from collections.abc import Callable
from typing import NamedTuple

from vmexit.core.bus import State


class Access(NamedTuple):
    """One access of the guest to a port or to memory that no RAM answers.

    `address` is the port or the GPA, `size` in bytes; `value` is what was written (0 for a read).
    """

    address: int
    size: int
    value: int
    is_write: bool


ReadHook = Callable[[Access], int]
WriteHook = Callable[[Access], object]


class Hook:
    """Calls back on each access; answers all ones where no read function was given.

    The functions run on the thread of the vCPU; with several vCPUs, on several at once.
    """

    widths = (1, 2, 3, 4, 5, 6, 7, 8)

    def __init__(self, base: int, read: ReadHook | None, write: WriteHook | None) -> None:
        self._base = base
        self._read = read
        self._write = write

    def read(self, offset: int, size: int) -> int:
        ones = (1 << 8 * size) - 1
        if self._read is None:
            return ones
        value = self._read(Access(self._base + offset, size, 0, False))
        if not isinstance(value, int):
            raise TypeError(
                f"the read function of {self._base:#x} returned {value!r}; it must return a number"
            )
        return value & ones

    def write(self, offset: int, size: int, value: int) -> None:
        if self._write is not None:
            self._write(Access(self._base + offset, size, value, True))

    def reset(self) -> None:
        """Whatever state there is belongs to the functions."""

    def state(self) -> State:
        return {"version": 1}

    def restore(self, state: State) -> None:
        """Whatever state there is belongs to the functions."""
