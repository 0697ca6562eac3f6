"""One port of a console device: what goes out to its backend, and what its terminal is like."""

import threading
from collections.abc import Callable
from typing import Protocol

from vmexit.core.clock import Clock
from vmexit.core.errors import ConfigError, quoted

# What waits for a slow backend; more waits in the guest. One buffer may go beyond it.
_MOST_WAITING = 64 << 10

_LARGEST = 0xFFFF


class PortBackend(Protocol):
    """The host side of a port. Only `write()` and `running()` may wait."""

    def write(self, data: bytes) -> None: ...

    def read(self, size: int) -> bytes:
        """What is there now."""
        ...

    def when_readable(self, function: Callable[[], None]) -> None:
        """Call `function` once, later and from the event loop, when `read` may give something."""
        ...

    def size(self) -> tuple[int, int] | None:
        """Columns and rows of the terminal that it is, 0 if nobody has set them; None if none."""
        ...

    def running(self, runs: bool) -> None:
        """A run begins, or has ended."""
        ...


class Outlet:
    """Output on its way to a backend. Only the thread of `clock` waits for that: neither a vCPU
    nor the event loop, which other devices need, does.
    """

    def __init__(self, write: Callable[[bytes], None], clock: Clock) -> None:
        self._write = write
        self._clock = clock
        self._timer = clock.timer(self.flush)
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # one at a time writes, so that the order is kept
        self._data = bytearray()
        self._armed = False
        self._refused = False  # there was no room
        self.when_room: Callable[[], None] | None = None
        """Called from any thread, when there is room again where there was none."""

    def has_room(self) -> bool:
        """Whether it takes data now; if not, `when_room` is called in time."""
        with self._lock:
            room = len(self._data) < _MOST_WAITING
            self._refused |= not room
            return room

    def put(self, data: bytes) -> None:
        """Write it soon."""
        with self._lock:
            self._data += data
            arm, self._armed = not self._armed, True
        if arm:
            self._timer.set(self._clock.now())

    def flush(self) -> None:
        """Write what there is. Raises HostError."""
        with self._writing:
            with self._lock:
                data, self._data = bytes(self._data), bytearray()
                refused, self._refused = self._refused, False
                self._armed = False
            if data:
                self._write(data)
        if refused and self.when_room is not None:
            self.when_room()


class Port:
    """A console, or with a name a plain port. Its device guards it."""

    def __init__(self, backend: PortBackend, clock: Clock, name: str = "") -> None:
        """The thread of `clock` waits for the backend."""
        self.backend = backend
        self.name = name
        self.outlet = Outlet(backend.write, clock)
        self.size: tuple[int, int] | None = None
        """Columns and rows, if they are known."""
        self._seen: tuple[int, int] | None = None  # the terminal's, the last time
        self.forget()

    def forget(self) -> None:
        """There is no driver any more."""
        self.open = False
        """Whether the guest has opened it, and takes input."""
        self.told: tuple[int, int] | None = None
        """The size that the driver knows."""

    def set_size(self, columns: int, rows: int) -> None:
        """Raises ConfigError for what cannot be."""
        if not (0 < columns <= _LARGEST and 0 < rows <= _LARGEST):
            raise ConfigError(
                f"a console of {quoted(columns)} columns and {quoted(rows)} rows cannot be; use 1 "
                f"to {_LARGEST} of each"
            )
        self.size = columns, rows

    def look(self) -> bool:
        """Take over the size of the terminal, if it is another one than the last time."""
        size = self.backend.size()
        if size is None or 0 in size or size == self._seen:
            return False
        before, self._seen, self.size = self.size, size, size
        return before != size

    def look_anew(self) -> None:
        """Whatever the size is next time, it is another one."""
        self._seen = None
