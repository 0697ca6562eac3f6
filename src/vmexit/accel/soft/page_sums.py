"""Which pages of guest memory have changed, by their checksums: the engine keeps no dirty log."""

import errno
import os
import zlib
from array import array
from collections.abc import Iterator

from vmexit.core.memory import PAGE_SIZE, GuestMemory, Region

# So many pages in use are looked at, the lowest of each region, which takes a second at most.
_MOST_PAGES = 1 << 18

_EMPTY = zlib.crc32(bytes(PAGE_SIZE))


class PageSums:
    """The checksums of all pages in use, from the moment that it is made."""

    def __init__(self, memory: GuestMemory) -> None:
        self._fd = memory.fd
        self._offsets = {region.gpa: offset for region, offset in memory.shared()}
        self._sums: dict[int, array[int]] = {}
        for region, _ in memory.shared():
            self._sums[region.gpa] = array("I", [_EMPTY]) * (region.size // PAGE_SIZE)
            self.changed(region)

    def changed(self, region: Region) -> bytes:
        """The pages of `region` that are not as at the last call, one bit each, lowest first."""
        sums = self._sums[region.gpa]
        bitmap = bytearray(-(-len(sums) // 8))
        left = _MOST_PAGES
        for first, end in self._in_use(region):
            for page in range(first, min(end, first + left)):
                start = page * PAGE_SIZE
                value = zlib.crc32(region.view[start : start + PAGE_SIZE])
                if value != sums[page]:
                    sums[page] = value
                    bitmap[page >> 3] |= 1 << (page & 7)
            left -= min(end - first, left)
        return bytes(bitmap)

    def _in_use(self, region: Region) -> Iterator[tuple[int, int]]:
        """First and end of each stretch of pages that were ever written to (lseek(2))."""
        base = self._offsets[region.gpa]
        at, limit = base, base + region.size
        while at < limit:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
                if start >= limit:
                    return
                at = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data behind `at`
                    return
                raise
            yield (start - base) // PAGE_SIZE, (min(at, limit) - base) // PAGE_SIZE
