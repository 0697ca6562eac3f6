"""Page tables: building an identity map, and walking the guest's own (Intel SDM vol. 3, ch. 4)."""

import struct

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

PRESENT, WRITABLE, ACCESSED, DIRTY, LARGE = 1 << 0, 1 << 1, 1 << 5, 1 << 6, 1 << 7
ADDRESS = 0x000F_FFFF_FFFF_F000  # of an entry of 64 bits

GIB = 1 << 30


def identity_map_pages(span: int) -> int:
    """How many 4 KiB pages `identity_map(…, span)` takes."""
    return 2 + -(-span // GIB)


def identity_map(at: int, span: int) -> bytes:
    """Tables that map `[0, span)` to itself with 2 MiB pages, to be put at GPA `at`.

    The PML4 comes first, so `at` is also what goes into CR3. `span` is rounded up to a GiB and
    is at most 512 GiB: one PDPT.
    """
    directories = -(-span // GIB)
    if directories > 512:
        raise ValueError("one PDPT maps at most 512 GiB")
    link = PRESENT | WRITABLE | ACCESSED
    pml4 = struct.pack("<Q", at + 0x1000 | link)
    pdpt = b"".join(struct.pack("<Q", at + 0x2000 + 0x1000 * i | link) for i in range(directories))
    pages = range(0, directories * GIB, 2 << 20)
    leaf = link | DIRTY | LARGE
    directory = struct.pack(f"<{len(pages)}Q", *(gpa | leaf for gpa in pages))
    return pml4.ljust(0x1000, b"\0") + pdpt.ljust(0x1000, b"\0") + directory


def translate(memory: GuestMemory, system: SystemRegisters, gva: int) -> int | None:
    """The GPA that `gva` (a linear address) has by the guest's page tables; None if unmapped.

    No paging, 32-bit, PAE, 4-level and 5-level paging. Tables outside guest RAM, or with reserved
    layout, count as unmapped; permissions are not checked.
    """
    if not 0 <= gva < 1 << 64:
        return None
    if not system.cr0 & CR0_PG:
        return gva & 0xFFFF_FFFF
    try:
        if system.efer & EFER_LMA:
            levels = 5 if system.cr4 & CR4_LA57 else 4
            top = 12 + 9 * levels
            if gva >> top - 1 not in (0, (1 << 65 - top) - 1):
                return None  # not canonical
            return _walk(memory, system.cr3 & ADDRESS, gva, top - 9)
        if system.cr4 & CR4_PAE:
            pdpte = memory.read_u64((system.cr3 & 0xFFFF_FFE0) + (gva >> 30 & 3) * 8)
            return _walk(memory, pdpte & ADDRESS, gva, 21) if pdpte & PRESENT else None
        return _walk32(memory, system, gva & 0xFFFF_FFFF)
    except GuestAddressError:
        return None


def _walk(memory: GuestMemory, table: int, gva: int, shift: int) -> int | None:
    while True:
        entry = memory.read_u64(table + (gva >> shift & 0x1FF) * 8)
        if not entry & PRESENT:
            return None
        if shift == 12 or entry & LARGE:
            if shift > 30:
                return None  # a page larger than 1 GiB is reserved
            offset = (1 << shift) - 1
            return entry & ADDRESS & ~offset | gva & offset
        table = entry & ADDRESS
        shift -= 9


def _walk32(memory: GuestMemory, system: SystemRegisters, gva: int) -> int | None:
    entry = memory.read_u32((system.cr3 & 0xFFFF_F000) + (gva >> 22) * 4)
    if not entry & PRESENT:
        return None
    if entry & LARGE and system.cr4 & CR4_PSE:
        # PSE-36: bits 13 to 20 of the entry are bits 32 to 39 of the address (SDM table 4-4).
        return (entry >> 13 & 0xFF) << 32 | entry & 0xFFC0_0000 | gva & 0x3F_FFFF
    entry = memory.read_u32((entry & 0xFFFF_F000) + (gva >> 12 & 0x3FF) * 4)
    return entry & 0xFFFF_F000 | gva & 0xFFF if entry & PRESENT else None
