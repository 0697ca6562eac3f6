"""What a vCPU's page tables map, as text: the monitor's `info mem`."""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmexit.arch.x86.paging import ADDRESS, LARGE, PRESENT, WRITABLE
from vmexit.arch.x86.registers import (
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    SystemRegisters,
)
from vmexit.core.errors import GuestAddressError
from vmexit.core.memory import GuestMemory

USER = 1 << 2
_RIGHTS = USER | WRITABLE
# A guest can make its tables lead to each other, and so to any number of pages.
_MOST_TABLES, _MOST_RANGES = 1 << 13, 1 << 13


class Mapping(NamedTuple):
    """Linear addresses from `start` up to, not including, `end`, of the same rights."""

    start: int
    end: int
    rights: int

    def __str__(self) -> str:
        user = "u" if self.rights & USER else "-"
        write = "w" if self.rights & WRITABLE else "-"
        return f"{self.start:016x}-{self.end:016x} {self.end - self.start:016x} {user}r{write}"


class _TooMany(Exception):
    """There are more tables than anyone wants to see."""


class _Walk:
    def __init__(self, memory: GuestMemory, system: SystemRegisters) -> None:
        self._memory = memory
        self._tables = 0
        self._long = bool(system.efer & EFER_LMA)
        self._pse = bool(self._long or system.cr4 & (CR4_PSE | CR4_PAE))
        self._top = 0
        if self._long:
            self._top = 57 if system.cr4 & CR4_LA57 else 48

    def _entries(self, gpa: int, size: int, count: int) -> tuple[int, ...]:
        self._tables += 1
        if self._tables > _MOST_TABLES:
            raise _TooMany
        try:
            data = self._memory.read(gpa, size * count)
        except GuestAddressError:
            return ()
        return struct.unpack(f"<{count}{'Q' if size == 8 else 'I'}", data)

    def table(self, gpa: int, shift: int, base: int, rights: int) -> Iterator[Mapping]:
        """What the table of 64-bit entries at `gpa` maps, each entry `1 << shift` bytes."""
        # The four entries of PAE's top have other bits, and no rights.
        top_of_pae = shift == 30 and not self._long
        large = LARGE if shift in (21, 30) and not top_of_pae else 0
        reserved = LARGE if shift > 30 else 0
        entries = self._entries(gpa, 8, 4 if top_of_pae else 512)
        for number, entry, count in _runs(entries, None if shift == 12 else large):
            start = base + (number << shift)
            own = rights if top_of_pae else rights & entry
            if count:
                yield Mapping(start, start + (count << shift), own)
            elif not entry & reserved:
                yield from self.table(entry & ADDRESS, shift - 9, start, own)

    def table32(self, gpa: int, shift: int, base: int, rights: int) -> Iterator[Mapping]:
        """The same for those of 32-bit entries."""
        large = LARGE if self._pse else 0
        for number, entry, count in _runs(
            self._entries(gpa, 4, 1024), None if shift == 12 else large
        ):
            start = base + (number << shift)
            if count:
                yield Mapping(start, start + (count << shift), rights & entry)
            else:
                yield from self.table32(entry & 0xFFFF_F000, 12, start, rights & entry)

    def canonical(self, linear: int) -> int:
        """A linear address as the processor takes it: its upper bits are all like the last."""
        if self._top and linear >> self._top - 1:
            return linear | (1 << 64) - (1 << self._top)
        return linear


def _runs(entries: Sequence[int], large: int | None) -> Iterator[tuple[int, int, int]]:
    """`(number, entry, count)`: pages that follow each other with the same rights, or a table, for
    which the count is 0. A page has the bit `large`; all are pages where that is None.
    """
    first = count = rights = 0
    for number, entry in enumerate(entries):
        is_page = entry & PRESENT and (large is None or entry & large)
        if count and not (is_page and entry & _RIGHTS == rights):
            yield first, rights, count
            count = 0
        if is_page:
            if not count:
                first, rights = number, entry & _RIGHTS
            count += 1
        elif entry & PRESENT:
            yield number, entry, 0
    if count:
        yield first, rights, count


def show_mappings(memory: GuestMemory, system: SystemRegisters) -> str:
    """One line for each range. No vCPU runs."""
    if not system.cr0 & CR0_PG:
        return "paging is off"
    walk = _Walk(memory, system)
    if system.efer & EFER_LMA:
        shift = 48 if system.cr4 & CR4_LA57 else 39
        found = walk.table(system.cr3 & ADDRESS, shift, 0, _RIGHTS)
    elif system.cr4 & CR4_PAE:
        found = walk.table(system.cr3 & 0xFFFF_FFE0, 30, 0, _RIGHTS)
    else:
        found = walk.table32(system.cr3 & 0xFFFF_F000, 22, 0, _RIGHTS)
    ranges: list[Mapping] = []
    more = ""
    try:
        for one in found:
            if ranges and (ranges[-1].end, ranges[-1].rights) == (one.start, one.rights):
                ranges[-1] = ranges[-1]._replace(end=one.end)
            elif len(ranges) == _MOST_RANGES:
                raise _TooMany
            else:
                ranges.append(one)
    except _TooMany:
        more = "\n… and more than can be shown"
    lines = [
        str(Mapping(walk.canonical(r.start), walk.canonical(r.end - 1) + 1, r.rights))
        for r in ranges
    ]
    return "\n".join(lines) + more
