"""Which pages of guest memory have changed, by their checksums: the engine keeps no dirty log."""

import zlib
from array import array

from vmexit.core.memory import PAGE_SIZE, GuestMemory, Region

# So many pages in use are looked at, the lowest of each region, which takes a second at most.
_MOST_PAGES = 1 << 18

_EMPTY = zlib.crc32(bytes(PAGE_SIZE))


class PageSums:
    """The checksums of all pages in use, from the moment that it is made."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._sums: dict[int, array[int]] = {}
        for region, _ in memory.shared():
            self._sums[region.gpa] = array("I", [_EMPTY]) * (region.size // PAGE_SIZE)
            self.changed(region)

    def changed(self, region: Region) -> bytes:
        """The pages of `region` that are not as at the last call, one bit each, lowest first."""
        sums = self._sums[region.gpa]
        bitmap = bytearray(-(-len(sums) // 8))
        left = _MOST_PAGES
        for start, stop in self._memory.in_use(region):
            first, end = start // PAGE_SIZE, stop // PAGE_SIZE
            for page in range(first, min(end, first + left)):
                start = page * PAGE_SIZE
                value = zlib.crc32(region.view[start : start + PAGE_SIZE])
                if value != sums[page]:
                    sums[page] = value
                    bitmap[page >> 3] |= 1 << (page & 7)
            left -= min(end - first, left)
        return bytes(bitmap)
