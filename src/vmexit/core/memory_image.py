"""What guest memory held at some moment: a file in memory that nobody can change any more."""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from vmexit.core.errors import HostError
from vmexit.core.remap import map_over, reserve, zeros_over

_PAGE_SIZE = 4096
# The highest byte of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst): the
# page is there (63), is swapped out (62), is a file's or shared (61).
_THERE, _SWAPPED, _FILE = 0x80, 0x40, 0x20
_IS_PRIVATE = bytes(bool(b & (_THERE | _SWAPPED)) and not b & _FILE for b in range(256))
_ENTRY = 8
_LEAST_HOLE, _MOST_PARTS = 1 << 20, 64
PIECE = 1 << 20
"""Bytes that are compared at a time."""


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


def in_pieces(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """First and end of parts of these, of at most PIECE bytes."""
    for first, end in ranges:
        for at in range(first, end, PIECE):
            yield at, min(at + PIECE, end)


def unlike(data: bytes, other: bytes) -> Iterator[tuple[int, int]]:
    """First and end of each run of pages in which two pieces of one size differ.

    Of bytes, not of views, which Python compares one by one.
    """
    if data == other:
        return
    start = 0
    for page in range(0, len(data), _PAGE_SIZE):
        if data[page : page + _PAGE_SIZE] == other[page : page + _PAGE_SIZE]:
            if start < page:
                yield start, page
            start = page + _PAGE_SIZE
    if start < len(data):
        yield start, len(data)


def _parts(data: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """`data` with the holes between, as far as these are small or too many.

    To read a hole of a file in memory takes a page of it, and to write to it there takes another.
    Where nothing at all is mapped it takes one page at most, but each such place is one more
    mapping in the kernel.
    """
    least = _LEAST_HOLE
    while True:
        result: list[tuple[int, int]] = []
        for first, end in data:
            if result and first - result[-1][1] < least:
                result[-1] = result[-1][0], end
            else:
                result.append((first, end))
        if len(result) <= _MOST_PARTS:
            return result
        least *= 4


class MemoryImage:
    """RAM as it was; made by `GuestMemory.capture()`, or from a file. Whoever has it closes it."""

    def __init__(self, fd: int, ranges: tuple[tuple[int, int], ...]) -> None:
        """`fd`, which it owns, holds these ranges, GPA and size, one behind the other."""
        self.fd = fd
        self.ranges = ranges
        self._pages: mmap.mmap | None = None
        self._parts: list[tuple[int, int]] | None = None

    @property
    def view(self) -> memoryview:
        """Its bytes. Raises HostError where they cannot be mapped."""
        if self._pages is None:
            try:
                pages = reserve(self.size)
                at = ctypes.addressof(ctypes.c_char.from_buffer(pages))
                self.map_at(at, 0, self.size, reserved=True)
                self._pages = pages
            except OSError as error:
                raise HostError(
                    f"cannot map a snapshot's memory: {error.strerror}; free some"
                ) from error
        return memoryview(self._pages).toreadonly()

    @property
    def size(self) -> int:
        """Bytes in all, zeros included."""
        return sum(size for _, size in self.ranges)

    def map_at(self, hva: int, offset: int, size: int, *, reserved: bool = False) -> None:
        """Have `size` bytes at `hva`, which are mapped, begin as these from `offset` on.

        What is written to them is nobody else's. With `reserved` they are as `reserve()` has made
        them. Raises OSError.
        """
        if self._parts is None:
            self._parts = _parts(list(self.stretches()))
        at, end = offset, offset + size
        for first, stop in self._parts:
            first, stop = max(first, at), min(stop, end)
            if first >= stop:
                continue
            if at < first and not reserved:
                zeros_over(hva + at - offset, first - at)
            map_over(hva + first - offset, stop - first, self.fd, first, private=True)
            at = stop
        if at < end and not reserved:
            zeros_over(hva + at - offset, end - at)

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
