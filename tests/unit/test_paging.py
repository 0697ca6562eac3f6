"""Linear addresses are translated as the Intel SDM (vol. 3, ch. 4) says, in every paging mode.

The tables are built here, entry by entry; bits that a CPU ignores for the address are random.
Whatever a guest puts into its tables, nothing is raised and nothing outside its memory is read.
"""

import random
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.arch.x86.paging import identity_map, identity_map_pages, translate
from vmexit.arch.x86.registers import SystemRegisters
from vmexit.arch.x86.segments import real_mode
from vmexit.core.memory import GuestMemory

PG, PSE, PAE, LA57, LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 10
K4, M2, M4, G1 = 1 << 12, 2 << 20, 4 << 20, 1 << 30
RAM = 0x40000


class Mode(NamedTuple):
    """A paging mode: its control bits, bytes an entry, the lowest GVA bit of each level's index,
    and the page sizes it knows.
    """

    cr4: int
    efer: int
    width: int
    shifts: tuple[int, ...]
    sizes: tuple[int, ...]


MODES = {
    "32-bit": Mode(0, 0, 4, (22, 12), (K4,)),
    "PSE": Mode(PSE, 0, 4, (22, 12), (K4, M4)),
    "PAE": Mode(PAE, 0, 8, (30, 21, 12), (K4, M2)),
    "4-level": Mode(PAE, LMA, 8, (39, 30, 21, 12), (K4, M2, G1)),
    "5-level": Mode(PAE | LA57, LMA, 8, (48, 39, 30, 21, 12), (K4, M2, G1)),
}


class Tables:
    """Page tables in guest memory; `map` adds a page, unless what is there is in its way."""

    def __init__(self, mode: Mode, rng: random.Random) -> None:
        self.mode, self.rng = mode, rng
        self.memory = GuestMemory([(0, RAM)])
        self.next = 0x1000
        self.cr3 = self.page() | rng.choice((0, 0x18))  # PWT and PCD are not of the address

    def page(self) -> int:
        self.next += 0x1000
        return self.next - 0x1000

    @property
    def system(self) -> SystemRegisters:
        return real_mode(0)._replace(
            cr0=PG | 1, cr3=self.cr3, cr4=self.mode.cr4, efer=self.mode.efer
        )

    def noise(self, pdpte: bool) -> int:
        """Bits that are ignored or only about permission: R/W, U/S, PWT, PCD, A, AVL, XD."""
        if pdpte:
            return self.rng.getrandbits(64) & 0xE18
        high = 0xFFF << 52 if self.mode.width == 8 else 0
        return self.rng.getrandbits(64) & (0xE3E | high)

    def map(self, gva: int, gpa: int, size: int) -> bool:
        mode, table = self.mode, self.cr3 & ~0x1F
        for shift in mode.shifts:
            index = gva >> shift & (0x3FF if mode.width == 4 else 3 if self.pdpt(shift) else 0x1FF)
            at = table + index * mode.width
            entry = int.from_bytes(self.memory.read(at, mode.width), "little")
            if 1 << shift == size:
                if entry & 1:
                    return False
                entry = gpa | 1 | self.noise(False)
                if size == M4:  # PSE-36: bits 32 to 39 go to 13 to 20
                    entry = gpa & 0xFFFF_FFFF | gpa >> 32 << 13 | 1 | self.noise(False)
                # PS, and PAT in bit 12; in a 4 KiB page PAT is where the others have PS.
                pat = self.rng.randrange(2)
                entry |= (0x80 | pat << 12) if size > K4 else pat << 7
            elif entry & 1:
                if entry & 0x80 and (shift != 22 or mode.cr4 & PSE) and not self.pdpt(shift):
                    return False
                table = entry & 0xF_FFFF_FFFF_F000 & (1 << 8 * mode.width) - 1
                continue
            else:
                if self.next >= RAM:
                    return False
                table = self.page()
                entry = table | 1 | self.noise(self.pdpt(shift))
                if mode.width == 4 and not mode.cr4 & PSE:
                    entry |= self.rng.choice((0, 0x80))  # without CR4.PSE the bit means nothing
            self.memory.write(at, entry.to_bytes(mode.width, "little"))
            if 1 << shift == size:
                return True
        raise AssertionError("no level has this page size")

    def pdpt(self, shift: int) -> bool:
        """Whether the entries are the four PDPTEs of PAE paging."""
        return shift == 30 and len(self.mode.shifts) == 3


def canonical(gva: int, mode: Mode) -> int:
    bits = mode.shifts[0] + 9 if mode.efer else 32
    gva &= (1 << bits) - 1
    return gva | (0 if bits == 32 or not gva >> bits - 1 else (1 << 64) - (1 << bits))


@pytest.mark.parametrize("name", MODES)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 32), far=st.booleans())
def test_what_is_mapped_is_found_with_its_offset_and_what_is_not_is_none(name, seed, far) -> None:
    rng, mode = random.Random(seed), MODES[name]
    tables, pages = Tables(mode, rng), {}
    physical = 40 if name == "PSE" else 32 if mode.width == 4 else 52
    base = rng.getrandbits(64)
    for _ in range(12):
        size = rng.choice(mode.sizes)
        gva = rng.getrandbits(64) if far else base + rng.randrange(0, 3 * G1, K4)
        gva = canonical(gva, mode) & -size
        gpa = rng.getrandbits(physical if size != K4 or mode.width == 8 else 32) & -size
        if tables.map(gva, gpa, size):
            pages[gva] = (gpa, size)
    assert pages
    for gva, (gpa, size) in pages.items():
        for offset in (0, 1, size - 1, rng.randrange(size)):
            assert translate(tables.memory, tables.system, gva + offset) == gpa + offset
        for outside in (gva - 1, gva + size):
            at = next((s for s, (_, n) in pages.items() if s <= outside < s + n), None)
            expected = None if at is None else pages[at][0] + outside - at
            if outside == canonical(outside, mode):
                assert translate(tables.memory, tables.system, outside) == expected
    tables.memory.close()


@pytest.mark.parametrize("name", MODES)
def test_an_entry_that_is_not_present_ends_the_walk_at_every_level(name) -> None:
    mode = MODES[name]
    tables, gva = Tables(mode, random.Random(1)), 0x1234_5000
    assert tables.map(gva, 0x7000, K4)
    table = tables.cr3 & ~0x1F
    for shift in mode.shifts:
        mask = 0x3FF if mode.width == 4 else 0x1FF
        at = table + (gva >> shift & mask) * mode.width
        entry = tables.memory.read_u8(at)
        tables.memory.write_u8(at, entry & ~1)
        assert translate(tables.memory, tables.system, gva) is None, shift
        tables.memory.write_u8(at, entry | 1)
        assert translate(tables.memory, tables.system, gva) == 0x7000
        table = int.from_bytes(tables.memory.read(at, 4), "little") & 0xFFFF_F000
    tables.memory.close()


@pytest.mark.parametrize(("name", "bits"), [("4-level", 48), ("5-level", 57)])
def test_an_address_that_is_not_canonical_is_unmapped(name, bits) -> None:
    tables = Tables(MODES[name], random.Random(2))
    for gva in (0, 1 << bits - 1):
        assert tables.map(gva, 0x5000, K4)
    find = [translate(tables.memory, tables.system, gva) for gva in (
        0, 1 << bits - 1, 1 << bits, 1 << 63, (1 << 64) - (1 << bits - 1), (1 << 64) - 1, 1 << 64,
    )]  # fmt: skip
    assert find == [0x5000, None, None, None, 0x5000, None, None]
    tables.memory.close()


@pytest.mark.parametrize("name", ["4-level", "5-level"])
def test_the_page_size_bit_is_reserved_above_1_gib(name) -> None:
    tables = Tables(MODES[name], random.Random(3))
    assert tables.map(0x1000, 0x5000, K4)
    table = tables.cr3 & ~0x1F
    for _ in MODES[name].shifts[:-3]:
        entry = tables.memory.read_u64(table)
        tables.memory.write_u64(table, entry | 0x80)
        assert translate(tables.memory, tables.system, 0x1000) is None
        tables.memory.write_u64(table, entry)
        table = entry & 0xFFFF_F000
    assert translate(tables.memory, tables.system, 0x1000) == 0x5000
    tables.memory.close()


@given(st.integers(0, (1 << 64) - 1))
def test_without_paging_the_address_is_itself_in_32_bits(gva) -> None:
    memory = GuestMemory([(0, 0x1000)])
    assert translate(memory, real_mode(0), gva) == gva % (1 << 32)
    memory.close()


@pytest.mark.parametrize("at", [0x1000, 0x7F_F000, (3 << 30) - 0x6000])
@pytest.mark.parametrize("span", [1, G1, G1 + 1, 4 * G1])
def test_the_identity_map_maps_its_span_to_itself_and_nothing_else(at, span) -> None:
    tables = identity_map(at, span)
    assert len(tables) == identity_map_pages(span) * 0x1000
    memory = GuestMemory([(at, len(tables))])
    memory.write(at, tables)
    system = real_mode(0)._replace(cr0=PG | 1, cr3=at, cr4=PAE, efer=LMA)
    end = -(-span // G1) * G1
    for gva in (*range(0, end, M2), *range(M2 - 1, end, M2), 0x12_3456):
        assert translate(memory, system, gva) == gva
    for gva in (end, end + G1, 1 << 39, (1 << 64) - 1):
        assert translate(memory, system, gva) is None
    present = [e for (e,) in struct.iter_unpack("<Q", tables) if e & 1]
    assert len(present) == 1 + end // G1 + end // M2
    assert all(e & 2 and not e & 4 for e in present)  # writable, and the supervisor's
    memory.close()


def test_the_identity_map_ends_at_512_gib() -> None:
    assert len(identity_map(0, 512 * G1)) == identity_map_pages(512 * G1) * 0x1000
    with pytest.raises(ValueError, match="512 GiB"):
        identity_map(0, 512 * G1 + 1)


class Watched(GuestMemory):
    """Guest memory that keeps the ranges that were read."""

    def __init__(self) -> None:
        super().__init__([(0, 0x2000), (0x5000, 0x1000)])
        self.ranges: list[tuple[int, int]] = []

    def region(self, gpa: int, size: int = 1):
        found = super().region(gpa, size)
        self.ranges.append((gpa, gpa + size))
        return found


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    memory = Watched()
    yield memory
    memory.close()


control = st.sampled_from([(cr4, efer) for cr4 in (0, PSE, PAE, PAE | LA57) for efer in (0, LMA)])
wild = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0x1FE0, 0x5FF8, 0x1000, 0x5000]))


@settings(deadline=None, max_examples=300)
@given(control, wild, st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 32), st.booleans())
def test_wild_tables_never_raise_never_loop_and_never_lead_out_of_memory(
    watched, bits, cr3, gva, seed, near
) -> None:
    rng = random.Random(seed)
    for region in watched.regions:
        words = [rng.getrandbits(64) for _ in range(region.size // 8)]
        if near:  # most entries lead to pages that are there, or to their edges
            pages = (0, 0x1000, 0x5000, 0x6000, 0x4000)
            words = [w & ~0xF_FFFF_FFFF_FE80 | rng.choice(pages) | 1 for w in words]
        region.view[:] = struct.pack(f"<{len(words)}Q", *words)
    cr4, efer = bits
    gva = gva & 0x7FFF_FFFF_FFFF if near else gva
    watched.ranges.clear()
    system = real_mode(0)._replace(cr0=PG | 1, cr3=cr3, cr4=cr4, efer=efer)
    found = translate(watched, system, gva)
    assert found is None or (0 <= found < 1 << 52 and found & 0xFFF == gva & 0xFFF)
    assert len(watched.ranges) <= 5
    for start, end in watched.ranges:
        assert 0 <= start < end <= 0x2000 or 0x5000 <= start < end <= 0x6000


@pytest.mark.parametrize("cr3", [0x1000, 0x10_0000, 0x1FFF_FFFF_F000, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("name", MODES)
def test_tables_at_the_end_of_memory_or_outside_it_are_unmapped(name, cr3) -> None:
    memory = GuestMemory([(0, 0x1000)])
    mode = MODES[name]
    system = real_mode(0)._replace(cr0=PG | 1, cr3=cr3, cr4=mode.cr4, efer=mode.efer)
    assert translate(memory, system, 0) is None
    memory.close()
