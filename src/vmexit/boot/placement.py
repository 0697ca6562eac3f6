"""Which parts of guest RAM are taken while a kernel is loaded: nothing overwrites another."""

from typing import NamedTuple

from vmexit.arch.x86.layout import HIGH_MEMORY, MMIO_HOLE_START
from vmexit.core.errors import GuestAddressError, ImageError
from vmexit.core.memory import PAGE_SIZE, GuestMemory

_MIB = 1 << 20


class _Claim(NamedTuple):
    start: int
    end: int
    what: str


class Placement:
    """The claims on one guest's RAM below 4 GiB, where all that a kernel starts with is."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._claims: list[_Claim] = []

    def claim(self, start: int, size: int, what: str) -> None:
        """Take `size` bytes at GPA `start` for `what`, as an error message names it.

        Raises ImageError if they are taken already, or if there is no RAM.
        """
        check_ram(self._memory, start, size, what)
        for other in self._claims:
            if start < other.end and other.start < start + size:
                raise ImageError(
                    f"{what} at {start:#x}..{start + size - 1:#x} overlaps {other.what} at "
                    f"{other.start:#x}..{other.end - 1:#x}; link the kernel elsewhere"
                )
        self._claims.append(_Claim(start, start + size, what))

    def claim_highest(self, size: int, limit: int, what: str) -> int:
        """Take the highest free pages for `size` bytes from 1 MiB up to, not including, `limit`.

        Returns their GPA. Raises ImageError, which says how much memory would do.
        """
        end = min(self._ram_end(), limit)
        start = _page(end - size)
        while start >= HIGH_MEMORY:
            taken = [c.start for c in self._claims if c.start < start + size and start < c.end]
            if not taken:
                self._claims.append(_Claim(start, start + size, what))
                return start
            start = _page(min(taken) - size)
        highest = max((claim.end for claim in self._claims), default=HIGH_MEMORY)
        needed = _page(highest + PAGE_SIZE - 1) + _page(size + PAGE_SIZE - 1)
        remedy = f"use --memory {-(-needed // _MIB)}M or more"
        if needed > min(limit, MMIO_HOLE_START):
            remedy = f"it must be below {limit:#x}: use a smaller one"
        raise ImageError(f"{what} ({size} bytes) does not fit into memory; {remedy}")

    def _ram_end(self) -> int:
        try:
            return self._memory.region(HIGH_MEMORY).end
        except GuestAddressError:
            return 0


def check_ram(memory: GuestMemory, gpa: int, size: int, what: str) -> None:
    """Raises ImageError, which says how much memory is needed, unless RAM is at `gpa`."""
    try:
        region = memory.region(gpa, size)
    except GuestAddressError as error:
        end = gpa + size
        remedy = f"use --memory {-(-end // _MIB)}M or more"
        if end > MMIO_HOLE_START:
            remedy = f"link it below {MMIO_HOLE_START:#x}, where RAM ends"
        raise ImageError(
            f"{what} ({size} bytes at {gpa:#x}) does not fit into memory; {remedy}"
        ) from error
    if region.readonly:
        raise ImageError(f"{what} at {gpa:#x} would be in ROM; link it elsewhere")


def _page(gpa: int) -> int:
    return gpa & -PAGE_SIZE
