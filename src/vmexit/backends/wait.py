"""Waiting for descriptors, never past the end of a run, and what went wrong with them in words."""

import math
import os
import select
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
    while not ready(fd, select.POLLOUT, _SLICE):
        if ending() or time.monotonic() >= until:
            return False
    return True


def write_all(fd: int, data: bytes, patience: float, ending: Ending) -> None:
    """Write `data`; the rest of it is dropped where `wait_writable()` gives up. Raises OSError."""
    while data and wait_writable(fd, patience, ending):
        with suppress(BlockingIOError):  # it does not block, and is full again
            data = data[os.write(fd, data[:_PIECE]) :]


def write_output(fd: int, data: bytes, ending: Ending) -> None:
    """Write what a guest puts out, however slow the reader is. Raises HostError."""
    try:
        write_all(fd, data, math.inf, ending)
    except OSError as error:
        raise HostError(
            f"cannot write the guest's output: {error.strerror}; send it elsewhere"
        ) from error


def reason(error: OSError | OverflowError | ValueError | TypeError) -> str:
    """What the system, or Python, says about it."""
    return (isinstance(error, OSError) and error.strerror) or shown(str(error))
