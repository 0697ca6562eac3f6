"""What guest memory held at some moment: a file in memory that nobody can change any more."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from vmexit.core.errors import HostError

_PAGE_SIZE = 4096
# The highest byte of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst): the
# page is there (63), is swapped out (62), is a file's or shared (61).
_THERE, _SWAPPED, _FILE = 0x80, 0x40, 0x20
_IS_PRIVATE = bytes(bool(b & (_THERE | _SWAPPED)) and not b & _FILE for b in range(256))
_ENTRY = 8


def stretches(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """First and end of each stretch of `fd` in `[start, end)` that is no hole (lseek(2))."""
    at = start
    while at < end:
        try:
            first = os.lseek(fd, at, os.SEEK_DATA)
            if first >= end:
                return
            at = os.lseek(fd, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind `at`
                return
            raise
        yield first, min(at, end)


def private_stretches(hva: int, size: int) -> Iterator[tuple[int, int]]:
    """First and end, counted from `hva`, of what was written to a private mapping of a file."""
    try:
        file: BinaryIO
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(hva // _PAGE_SIZE * _ENTRY)
            entries = file.read(size // _PAGE_SIZE * _ENTRY) or b""
    except OSError:
        entries = b""
    if len(entries) != size // _PAGE_SIZE * _ENTRY:
        yield 0, size  # no way to know
        return
    pages = entries[_ENTRY - 1 :: _ENTRY].translate(_IS_PRIVATE)
    first = pages.find(1)
    while first >= 0:
        end = pages.find(0, first)
        end = len(pages) if end < 0 else end
        yield first * _PAGE_SIZE, end * _PAGE_SIZE
        first = pages.find(1, end)


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """First and end of all that is in any of `ranges`, in order, and nothing twice."""
    result: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if result and first <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((first, end))
    return result


class MemoryImage:
    """RAM as it was; made by `GuestMemory.capture()`, or from a file. Whoever has it closes it."""

    def __init__(self, fd: int, ranges: tuple[tuple[int, int], ...]) -> None:
        """`fd`, which it owns, holds these ranges, GPA and size, one behind the other."""
        self.fd = fd
        self.ranges = ranges
        self._pages: mmap.mmap | None = None

    @property
    def view(self) -> memoryview:
        """Its bytes. Raises HostError where they cannot be mapped."""
        if self._pages is None:
            try:
                self._pages = mmap.mmap(
                    self.fd, self.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ
                )
            except OSError as error:
                raise HostError(
                    f"cannot map a snapshot's memory: {error.strerror}; free some"
                ) from error
        return memoryview(self._pages)

    @property
    def size(self) -> int:
        """Bytes in all, zeros included."""
        return sum(size for _, size in self.ranges)

    def seal(self) -> None:
        """Nobody can change it from now on. Raises OSError where somebody still could."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)

    def stretches(self) -> Iterator[tuple[int, int]]:
        """First and end in `fd` of what is not zeros, or may not be."""
        return stretches(self.fd, 0, self.size)

    def close(self) -> None:
        """Machines whose memory began as this one go on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._pages is not None:
            with suppress(BufferError):  # a view is still held: the last one unmaps the pages
                self._pages.close()
            self._pages = None
