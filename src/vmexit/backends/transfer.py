"""Reading and writing all of several buffers at a place in a file."""

import errno
import os
from collections.abc import Callable, Sequence

from vmexit.core.holes import NOT_POSSIBLE, punch_hole, zero_range

_IOV_MAX = os.sysconf("SC_IOV_MAX")
_ZEROS = bytes(1 << 20)

Views = Sequence[memoryview]


def read_into(fd: int, views: Views, offset: int) -> None:
    """Fill `views` with what is at `offset`. Raises OSError, and where the file ends early."""
    for part in _parts(views):
        offset += _all(lambda views, at: os.preadv(fd, views, at), part, offset)


def write_from(fd: int, views: Views, offset: int) -> None:
    """Write `views` to `offset`. Raises OSError."""
    for part in _parts(views):
        offset += _all(lambda views, at: os.pwritev(fd, views, at), part, offset)


def write_zeroes(
    fd: int, offset: int, size: int, write: Callable[[Views, int], None], *, unmap: bool
) -> None:
    """It reads as zeros now, by `write` where the file system has no better way. Raises OSError."""
    try:
        (punch_hole if unmap else zero_range)(fd, offset, size)
    except OSError as error:
        if error.errno not in NOT_POSSIBLE:
            raise
        end = offset + size
        while offset < end:
            zeros = memoryview(_ZEROS)[: end - offset]
            write([zeros], offset)
            offset += len(zeros)


def _parts(views: Views) -> list[list[memoryview]]:
    """As many at a time as one system call takes."""
    return [list(views[i : i + _IOV_MAX]) for i in range(0, len(views), _IOV_MAX)]


def _all(call: Callable[[list[memoryview], int], int], views: list[memoryview], offset: int) -> int:
    """Transfer all bytes of `views`; how many."""
    total = 0
    while views:
        done = call(views, offset + total)
        if not done:
            raise OSError(errno.EIO, "the disk's file ends early")
        total += done
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if done:
            views[0] = views[0][done:]
    return total


class Cursor:
    """Goes through the bytes of several buffers."""

    def __init__(self, views: Views) -> None:
        self._views = list(reversed(views))
        self.left = sum(map(len, views))
        """Bytes that are still to come."""

    def take(self, size: int) -> list[memoryview]:
        """The next `size` bytes; there are so many."""
        self.left -= size
        found = []
        while size:
            view = self._views.pop()
            if len(view) > size:
                self._views.append(view[size:])
                view = view[:size]
            found.append(view)
            size -= len(view)
        return found

    def fill(self, data: memoryview) -> None:
        """Put `data` into the next bytes."""
        at = 0
        for view in self.take(len(data)):
            view[:] = data[at : at + len(view)]
            at += len(view)

    def drain(self, into: memoryview) -> None:
        """Put the next bytes into `into`, all of it."""
        at = 0
        for view in self.take(len(into)):
            into[at : at + len(view)] = view
            at += len(view)
