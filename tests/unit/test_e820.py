"""The memory map names all RAM that a guest may use, and nothing else as RAM."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.arch.x86.e820 import RAM, RESERVED, memory_map
from vmexit.arch.x86.layout import KVM_IDENTITY_MAP_ADDRESS, KVM_TSS_ADDRESS, ram_ranges
from vmexit.core.memory import GuestMemory, Region

MIB, GIB = 1 << 20, 1 << 30


def regions(size: int, roms: tuple[tuple[int, int], ...] = ()) -> list[Region]:
    nothing = memoryview(b"")
    ram = [Region(gpa, n, 0, nothing, False) for gpa, n in ram_ranges(size)]
    return ram + [Region(gpa, n, 0, nothing, True) for gpa, n in roms]


def test_the_map_of_256_mib_is_this_one() -> None:
    memory = GuestMemory(ram_ranges(256 * MIB))
    assert memory_map(memory.regions) == [
        (0x0, 0x9FC00, RAM),
        (0x9FC00, 0x400, RESERVED),
        (0xE0000, 0x20000, RESERVED),
        (0x100000, 255 * MIB, RAM),
        (0xFEFFC000, 0x4000, RESERVED),
    ]
    memory.close()


def test_ram_above_the_hole_is_its_own_entry() -> None:
    ram = [e for e in memory_map(regions(5 * GIB)) if e.type == RAM]
    assert ram[1:] == [(MIB, 3 * GIB - MIB, RAM), (4 * GIB, 2 * GIB, RAM)]


@given(st.integers(1, 1 << 24), st.booleans())
def test_entries_rise_do_not_overlap_and_hold_all_ram_but_the_reserved(pages, rom) -> None:
    size = pages * 4096
    have = regions(size, ((0xFFFE_0000, 0x2_0000),) if rom else ())
    entries = memory_map(have)
    for before, after in pairwise(entries):
        assert before.end <= after.gpa
    for entry in entries:
        if entry.type == RAM:
            assert any(r.gpa <= entry.gpa and entry.end <= r.end for r in have if not r.readonly)
    hidden = min(size, MIB) - min(size, 0x9FC00)
    assert sum(e.size for e in entries if e.type == RAM) == size - hidden


@pytest.mark.parametrize("rom", [(0xFFFE_0000, 0x2_0000), (0xFF00_0000, 0x100_0000)])
def test_a_rom_is_reserved_and_so_are_the_pages_that_kvm_needs(rom) -> None:
    entries = memory_map(regions(64 * MIB, (rom,)))
    assert (*rom, RESERVED) in entries
    for page in (KVM_IDENTITY_MAP_ADDRESS, *(KVM_TSS_ADDRESS + 4096 * n for n in range(3))):
        assert [e.type for e in entries if e.gpa <= page < e.end] == [RESERVED]
