"""Segment registers for each CPU mode, and the GDT that goes with them (Intel SDM vol. 3, 3.4)."""

import struct

from vmexit.arch.x86.registers import (
    CR0_ET,
    CR0_NW_CD,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    GENERAL,
    RFLAGS_FIXED,
    Registers,
    Segment,
    SystemRegisters,
    Table,
)

CODE, DATA = 0xB, 0x3  # execute/read and read/write, both accessed (SDM vol. 3, table 3-1)
TSS_BUSY, LDT = 0xB, 0x2  # system segments (table 3-2)
TSS_BUSY_BIT = 0x2

CODE32_SELECTOR, DATA_SELECTOR, CODE64_SELECTOR = 0x08, 0x10, 0x18


def general(rip: int) -> Registers:
    """General registers all 0, except RIP and the bit of RFLAGS that is always 1."""
    return dict.fromkeys(GENERAL, 0) | {"rip": rip, "rflags": RFLAGS_FIXED}


def _real(base: int, selector: int, type: int = DATA) -> Segment:
    return Segment(selector, base, 0xFFFF, type, s=1, dpl=0, present=1, l=0, db=0, g=0)


def _flat(selector: int, type: int, *, long: bool = False) -> Segment:
    return Segment(
        selector, 0, 0xFFFF_FFFF, type, s=1, dpl=0, present=1, l=int(long), db=int(not long), g=1
    )


_TR = Segment(0, 0, 0xFFFF, TSS_BUSY, s=0, dpl=0, present=1, l=0, db=0, g=0)
_LDT = Segment(0, 0, 0xFFFF, LDT, s=0, dpl=0, present=1, l=0, db=0, g=0)


def _system(
    cs: Segment, data: Segment, gdt: Table, idt: Table, cr0: int, cr3: int, cr4: int, efer: int
) -> SystemRegisters:
    return SystemRegisters(
        cs, data, data, data, data, data, _TR, _LDT, gdt, idt, cr0, 0, cr3, cr4, 0, efer
    )


def real_mode(cs_base: int) -> SystemRegisters:
    """Real mode with code at `cs_base`; the other segments start at 0, the IVT is at 0."""
    cs = _real(cs_base, cs_base >> 4 & 0xFFFF, CODE)
    return _system(cs, _real(0, 0), Table(0, 0xFFFF), Table(0, 0x3FF), CR0_ET, 0, 0, 0)


def reset() -> tuple[Registers, SystemRegisters]:
    """The state after power-on: real mode at 0xfffffff0 (SDM vol. 3, table 10-1)."""
    cs = _real(0xFFFF_0000, 0xF000, CODE)
    system = _system(
        cs, _real(0, 0), Table(0, 0xFFFF), Table(0, 0xFFFF), CR0_NW_CD | CR0_ET, 0, 0, 0
    )
    return general(0xFFF0) | {"rdx": 0x600}, system


def protected_mode(gdt: Table) -> SystemRegisters:
    """32-bit protected mode, ring 0, flat 4 GiB segments, no paging, no IDT."""
    cs, data = _flat(CODE32_SELECTOR, CODE), _flat(DATA_SELECTOR, DATA)
    return _system(cs, data, gdt, Table(0, 0), CR0_PE | CR0_ET, 0, 0, 0)


def long_mode(gdt: Table, cr3: int) -> SystemRegisters:
    """64-bit mode, ring 0, paging by the tables at `cr3`, no IDT."""
    cs, data = _flat(CODE64_SELECTOR, CODE, long=True), _flat(DATA_SELECTOR, DATA)
    cr0, efer = CR0_PG | CR0_PE | CR0_ET, EFER_LME | EFER_LMA
    return _system(cs, data, gdt, Table(0, 0), cr0, cr3, CR4_PAE, efer)


def attributes(segment: Segment) -> int:
    """The attribute bits where the high half of a descriptor has them (SDM vol. 3, figure 3-8)."""
    return (
        segment.type << 8
        | segment.s << 12
        | segment.dpl << 13
        | segment.present << 15
        | segment.avl << 20
        | segment.l << 21
        | segment.db << 22
        | segment.g << 23
    )


def from_attributes(selector: int, base: int, limit: int, bits: int) -> Segment:
    """The inverse of `attributes()`, with the three fields that it does not hold."""
    return Segment(
        selector,
        base,
        limit,
        type=bits >> 8 & 0xF,
        s=bits >> 12 & 1,
        dpl=bits >> 13 & 3,
        present=bits >> 15 & 1,
        l=bits >> 21 & 1,
        db=bits >> 22 & 1,
        g=bits >> 23 & 1,
        avl=bits >> 20 & 1,
    )


def descriptor(segment: Segment) -> bytes:
    """The 8 bytes of a GDT entry for `segment`."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    low = (segment.base & 0xFFFF) << 16 | limit & 0xFFFF
    high = (
        segment.base & 0xFF00_0000
        | attributes(segment)
        | limit & 0xF_0000
        | segment.base >> 16 & 0xFF
    )
    return struct.pack("<II", low, high)


def boot_gdt() -> bytes:
    """A GDT with the segments that protected and long mode start with."""
    return bytes(8) + b"".join(
        map(
            descriptor,
            (
                _flat(CODE32_SELECTOR, CODE),
                _flat(DATA_SELECTOR, DATA),
                _flat(CODE64_SELECTOR, CODE, long=True),
            ),
        )
    )
