"""Which pages of guest memory may have been written."""

import re
import threading
from collections.abc import Iterator

_PAGE_BITS = 12
_SOME, _ONES = re.compile(rb"[^\0]+"), re.compile(rb"\x01+")
_BITS = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]


class WrittenPages:
    """A set of pages by number, GPA / 4096; of too many it knows just that. Any thread may add."""

    MOST = 4096

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: set[int] = set()
        self.too_many = False

    def add(self, gpa: int, size: int) -> None:
        """All pages of `[gpa, gpa + size)`."""
        if self.too_many or size <= 0:
            return
        first, end = gpa >> _PAGE_BITS, (gpa + size - 1 >> _PAGE_BITS) + 1
        with self._lock:
            if end - first <= self.MOST:
                self._pages.update(range(first, end))
            if end - first > self.MOST or len(self._pages) > self.MOST:
                self.too_many = True
                self._pages = set()

    def __bool__(self) -> bool:
        """Whether there is any."""
        return self.too_many or bool(self._pages)

    def take(self) -> "WrittenPages":
        """What it knows; it begins anew."""
        if not self:
            return _NONE
        taken = WrittenPages()
        with self._lock:
            taken._pages, taken.too_many = self._pages, self.too_many
            self._pages, self.too_many = set(), False
        return taken

    def mark(self, bitmap: bytearray, gpa: int, count: int) -> None:
        """Set the bits of those among the `count` pages from `gpa` on; `bitmap` is theirs."""
        if not self._pages:
            return
        first = gpa >> _PAGE_BITS
        with self._lock:
            pages = tuple(self._pages)
        for page in pages:
            if first <= page < first + count:
                bitmap[page - first >> 3] |= 1 << (page - first & 7)


_NONE = WrittenPages()  # nobody adds to what take() gave


def runs(bitmap: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """First and end of each run of bits that are set, the lowest bit of each byte being first."""
    for some in _SOME.finditer(bitmap):
        at = some.start() * 8
        for run in _ONES.finditer(b"".join([_BITS[byte] for byte in some[0]])):
            first, end = run.span()
            yield at + first, at + end
