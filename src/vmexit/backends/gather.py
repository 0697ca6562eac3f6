"""Bytes that come one by one are written together: a system call, and a wake-up of the reader, for
each would cost several times what a device needs for the byte.
"""

import threading
from typing import Protocol

from vmexit.core.clock import Clock

# What waits at most: so many bytes, and so long, in nanoseconds. A line never waits.
_MOST = 512
_LONGEST = 4_000_000
_RETRY = 20_000_000  # where the reader is slow


class Sink(Protocol):
    """Where bytes are written to in the end."""

    def write(self, data: bytes) -> None: ...

    def has_room(self) -> bool:
        """Whether it takes data now, without a wait."""
        ...


class Gathered:
    """Any thread may write. What is slow to take it holds up only those who write."""

    def __init__(self, sink: Sink, clock: Clock) -> None:
        self._sink = sink
        self._clock = clock
        self._timer = clock.timer(self._late)
        self._lock = threading.Lock()
        self._data = bytearray()
        self._armed = False  # the timer is set

    def write(self, data: bytes) -> None:
        """Write it now or soon. Raises HostError."""
        with self._lock:
            waiting = self._data
            waiting += data
            if data.endswith(b"\n") or len(waiting) >= _MOST:
                self._flush()
                return
            arm = not self._armed
            self._armed = True
        if arm:
            self._timer.set(self._clock.now() + _LONGEST)

    def flush(self) -> None:
        """Nothing waits any more after this. Raises HostError."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._data:
            data = bytes(self._data)
            self._data.clear()
            self._sink.write(data)

    def _late(self) -> None:
        """On the thread of the clock, which must not wait: neither for who writes, nor to write."""
        if not self._lock.acquire(blocking=False):
            self._timer.set(self._clock.now() + _LONGEST)
            return
        try:
            self._armed = False
            if not self._data:
                return
            if self._sink.has_room():
                self._flush()
                return
            self._armed = True
        finally:
            self._lock.release()
        self._timer.set(self._clock.now() + _RETRY)
