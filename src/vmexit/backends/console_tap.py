"""What goes through a serial port or a console, for the program that has the machine."""

import threading
from collections.abc import Callable

from vmexit.backends.chardev import Chardev
from vmexit.core.listeners import Listeners
from vmexit.core.loop import EventLoop

# How much of what the guest has written is kept, in bytes.
KEPT = 1 << 20

Watch = Callable[[], None]


class ConsoleTap:
    """A place for bytes between the guest and `place`: what is written can be seen, and more typed.

    A vCPU, the event loop and the program may enter at any time; watches are called without a lock.
    """

    def __init__(self, place: Chardev, loop: EventLoop) -> None:
        self.where = place.where
        self._place = place
        self._later = loop.timer(self._readable)
        self._lock = threading.Lock()
        self._written = bytearray()
        self._forgotten = 0  # bytes before those in `_written`
        self._typed = bytearray()
        self._waiting: Callable[[], None] | None = None  # for input
        self._watches: Listeners[Watch] = Listeners()

    # The guest's side.

    def write(self, data: bytes) -> None:
        self._place.write(data)
        with self._lock:
            self._written += data
            if len(self._written) > 2 * KEPT:
                self._forgotten += len(self._written) - KEPT
                del self._written[:-KEPT]
        for watch in self._watches:
            watch()

    def read(self, size: int) -> bytes:
        with self._lock:
            if self._typed:
                data = bytes(self._typed[:size])
                del self._typed[:size]
                return data
        return self._place.read(size)

    def when_readable(self, function: Callable[[], None]) -> None:
        with self._lock:
            self._waiting = function
            there = bool(self._typed)
        if there:
            self._later.set(0)
        else:
            self._place.when_readable(self._readable)

    def _readable(self) -> None:
        with self._lock:
            function, self._waiting = self._waiting, None
        if function is not None:
            function()

    def running(self, runs: bool) -> None:
        self._place.running(runs)

    def size(self) -> tuple[int, int] | None:
        return self._place.size()

    def close(self) -> None:
        self._place.close()

    # The program's side.

    @property
    def end(self) -> int:
        """How many bytes the guest has written so far."""
        with self._lock:
            return self._forgotten + len(self._written)

    def since(self, position: int) -> tuple[int, bytes]:
        """What it has written from `position` on, and where that begins: the last MiB is kept."""
        with self._lock:
            start = max(position, self._forgotten)
            return start, bytes(self._written[start - self._forgotten :])

    def watch(self, watch: Watch) -> Callable[[], None]:
        """Call `watch` whenever the guest has written something; returns what ends that."""
        return self._watches.add(watch)

    def type(self, data: bytes) -> None:
        """The guest reads this before what comes from outside."""
        with self._lock:
            self._typed += data
            waits = self._waiting is not None
        if waits:
            self._later.set(0)
