"""Waiting for descriptors, never past the end of a run, and what went wrong with them in words."""

import math
import os
import select
import stat
import time
from collections.abc import Callable
from contextlib import suppress

from vmexit.core.errors import HostError, shown

# So much goes into a pipe that has room at all, without waiting (POSIX: PIPE_BUF is at least this).
_PIECE = 512

PATIENCE = 1.0  # seconds for a slow reader
_SLICE = 0.02  # seconds between two looks at `ending`

# Whether the run is to end: then nothing is waited for any more.
Ending = Callable[[], bool]


def never() -> bool:
    """There is no run that could end."""
    return False


def ready(fd: int, event: int, seconds: float = 0) -> bool:
    """Whether `fd` has the event (or an error to report) now, or within `seconds`."""
    poll = select.poll()  # unlike select(), for any number of open descriptors
    poll.register(fd, event)
    return bool(poll.poll(seconds * 1000))


def wait_writable(fd: int, patience: float, ending: Ending) -> bool:
    """Wait until `fd` takes data; False after `patience` seconds, or when the run ends."""
    until = time.monotonic() + patience
    while not ready(fd, select.POLLOUT, min(_SLICE, patience)):
        if ending() or time.monotonic() >= until:
            return False
    return True


class Slow:
    """Who may not read: waited for once, and what does not go is dropped until some does again."""

    def __init__(self, ending: Ending) -> None:
        self._ending = ending
        self._stuck = False

    def took(self) -> None:
        """It has read something, or is another one."""
        self._stuck = False

    def wait(self, fd: int) -> bool:
        """Wait until `fd` takes data; False for what is to be dropped."""
        if wait_writable(fd, 0 if self._stuck else PATIENCE, self._ending):
            return True
        self._stuck = True
        return False


def write_all(fd: int, data: bytes, patience: float, ending: Ending) -> None:
    """Write `data`; the rest of it is dropped where `wait_writable()` gives up. Raises OSError."""
    while data and wait_writable(fd, patience, ending):
        with suppress(BlockingIOError):  # it does not block, and is full again
            data = data[os.write(fd, data[:_PIECE]) :]


class Output:
    """What a guest puts out, to a descriptor, however slow the reader is.

    A guest writes byte by byte, and each wait would cost more than the write. A file never makes
    one wait, and a pipe that has room at all has it for a whole page (pipe(7)).
    """

    def __init__(self, fd: int, ending: Ending) -> None:
        self._fd = fd
        self._ending = ending
        mode = 0
        with suppress(OSError):  # it is closed, as writing will tell
            mode = os.fstat(fd).st_mode
        self._room_when_ready = _PIECE if stat.S_ISFIFO(mode) else 0
        self._is_file = stat.S_ISREG(mode)
        self._room = 0

    def flush(self) -> None:
        """All is written: nothing waits here."""

    def has_room(self) -> bool:
        """Whether some of a page goes into it now, without a wait."""
        return self._is_file or ready(self._fd, select.POLLOUT)

    def write(self, data: bytes) -> None:
        """Write all of it. Several threads may; raises HostError."""
        try:
            # Two threads that both see the last of the room write less than a page.
            if self._is_file or len(data) <= self._room:
                with suppress(BlockingIOError):  # somebody else has filled it
                    written = os.write(self._fd, data)
                    self._room -= written
                    data = data[written:]
            if data:
                self._room = 0
                write_all(self._fd, data, math.inf, self._ending)
                if self._room_when_ready and ready(self._fd, select.POLLOUT):
                    self._room = self._room_when_ready
        except OSError as error:
            raise HostError(
                f"cannot write the guest's output: {error.strerror}; send it elsewhere"
            ) from error


def reason(error: OSError | OverflowError | ValueError | TypeError) -> str:
    """What the system, or Python, says about it."""
    return (isinstance(error, OSError) and error.strerror) or shown(str(error))
