"""A Python function in the place of a device."""

import threading
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


class Within(threading.local):
    """Whether this thread is in a read function: its vCPU waits for the answer."""

    read = False


class Hook:
    """Calls back on each access; answers all ones where no read function was given.

    The functions run on the thread of the vCPU; with several vCPUs, on several at once.
    """

    widths = (1, 2, 3, 4, 5, 6, 7, 8)

    def __init__(
        self,
        base: int,
        read: ReadHook | None,
        write: WriteHook | None,
        within: Within | None = None,
    ) -> None:
        """`within`, if given, tells the others that the function is called."""
        self._within = Within() if within is None else within
        self._base = base
        self._read = read
        self._write = write

    def read(self, offset: int, size: int) -> int:
        ones = (1 << 8 * size) - 1
        if self._read is None:
            return ones
        self._within.read = True
        try:
            value = self._read(Access(self._base + offset, size, 0, False))
        finally:
            self._within.read = False
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
