"""A flat image lands where it was asked for, with tables that describe the registers it gets.

The tables are read back from guest memory as a CPU would, not compared with their source.
"""

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.arch.x86.layout import ram_ranges
from vmexit.arch.x86.paging import translate
from vmexit.arch.x86.registers import Segment
from vmexit.boot import flat
from vmexit.boot.entry import BootEntry
from vmexit.core.errors import ConfigError, ImageError, VmexitError
from vmexit.core.memory import GuestMemory

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(ram_ranges(MIB))
    yield memory
    memory.close()


def test_the_message_for_an_entry_outside_the_image_is_this_one() -> None:
    with pytest.raises(ImageError) as caught:
        flat.check_entry(0x1000, 12, 0)
    assert str(caught.value) == (
        "entry 0x1000 lies outside the image (12 bytes at 0x0); use --load-address 0x1000"
    )


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 30), st.integers(-2, 2), st.booleans())
def test_an_entry_is_accepted_exactly_within_the_image(at, size, by, at_end) -> None:
    entry = at + by + (size if at_end else 0)
    inside = entry in range(at, at + size)
    if inside:
        flat.check_entry(entry, size, at)
    else:
        with pytest.raises(ImageError, match=rf"entry {entry:#x} lies outside"):
            flat.check_entry(entry, size, at)


@pytest.mark.parametrize("at", [0, 0x7C00, MIB - 5])
def test_an_image_is_copied_to_its_address_and_nothing_else_changes(memory, at) -> None:
    flat.load(memory, b"image", at)
    assert memory.read(at, 5) == b"image"
    assert bytes(memory[0:MIB]).replace(b"image", b"") == bytes(MIB - 5)


@pytest.mark.parametrize("at", [MIB - 4, MIB, 1 << 39])
def test_an_image_that_does_not_fit_is_an_image_error_with_its_numbers(memory, at) -> None:
    with pytest.raises(ImageError, match=rf"\(5 bytes at {at:#x}\) does not fit.* {MIB} bytes.*; "):
        flat.load(memory, b"image", at)
    assert not any(memory[0:MIB])


def descriptor_of(memory: GuestMemory, entry: BootEntry, selector: int) -> Segment:
    """The segment that a CPU loads for `selector`: GDT entry by GDTR (SDM vol. 3, 3.4.5)."""
    gdt = entry.system.gdt
    assert selector % 8 == 0 and selector + 7 <= gdt.limit
    low, high = memory.read_u32(gdt.base + selector), memory.read_u32(gdt.base + selector + 4)
    limit = low & 0xFFFF | high & 0xF_0000
    g = high >> 23 & 1
    return Segment(
        selector, low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000,
        limit << 12 | 0xFFF if g else limit, high >> 8 & 0xF, high >> 12 & 1, high >> 13 & 3,
        high >> 15 & 1, high >> 21 & 1, high >> 22 & 1, g, high >> 20 & 1,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_reloading_any_segment_from_the_gdt_gives_what_the_register_holds(memory, mode) -> None:
    entry = flat.start(memory, 0x1234, mode)
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(entry.system, name)
        assert descriptor_of(memory, entry, segment.selector) == segment
    assert entry.registers["rip"] == 0x1234
    assert memory.read_u64(entry.system.gdt.base) == 0  # the null descriptor


def test_the_gdt_has_the_selectors_that_the_documentation_promises(memory) -> None:
    entry = flat.start(memory, 0, "protected")
    code32, data, code64 = (descriptor_of(memory, entry, s) for s in (0x08, 0x10, 0x18))
    for segment in (code32, data, code64):
        assert (segment.base, segment.limit, segment.present) == (0, 0xFFFF_FFFF, 1)
        assert segment.s == 1 and segment.dpl == 0
    assert (code32.type & 8, code32.db, code32.l) == (8, 1, 0)
    assert (data.type & 8, data.type & 2, data.db) == (0, 2, 1)
    assert (code64.type & 8, code64.db, code64.l) == (8, 0, 1)


def test_protected_mode_is_on_without_paging_and_long_mode_with_it(memory) -> None:
    protected = flat.start(memory, 0, "protected").system
    assert (protected.cr0 & 1, protected.cr0 >> 31, protected.cr4, protected.efer) == (1, 0, 0, 0)
    long = flat.start(memory, 0, "long").system
    # PE and PG; PAE; LME and LMA: all that long mode needs (SDM vol. 3, 10.8.5)
    assert (long.cr0 & 1, long.cr0 >> 31, long.cr4 >> 5 & 1) == (1, 1, 1)
    assert long.efer == 0x500


@pytest.mark.parametrize("size", [8 * 4096, MIB, (3 << 30) + 4096, 5 << 30])
def test_long_mode_maps_all_of_memory_and_at_least_4_gib_to_itself(size) -> None:
    memory = GuestMemory(ram_ranges(size))
    system = flat.start(memory, 0x1000, "long").system
    end = max(4 << 30, memory.regions[-1].end)
    edges = [gib << 30 for gib in range(end >> 30)] + [r.end for r in memory.regions] + [end]
    for gva in {e + d for e in edges for d in (-1, 0, 0x1FFFFF, 0x200000)}:
        if 0 <= gva < end:
            assert translate(memory, system, gva) == gva
    mapped_end = -(-end // (1 << 30)) << 30
    assert translate(memory, system, mapped_end) is None
    memory.close()


@pytest.mark.parametrize(("mode", "pages"), [("protected", 1), ("long", 7)])
def test_the_tables_are_the_last_pages_of_low_ram_and_an_image_may_end_there(mode, pages) -> None:
    memory = GuestMemory(ram_ranges(16 * 4096))
    free = (16 - pages) * 4096
    flat.load(memory, b"\xcc" * free, 0)
    entry = flat.start(memory, 0, mode, range(0, free))
    assert memory.read(0, free) == b"\xcc" * free
    assert entry.system.gdt.base == free
    for image in (range(0, free + 1), range(free + 4095, free + 4096), range(15 * 4096, 1 << 20)):
        with pytest.raises(ConfigError, match=rf"{mode}-mode tables at {free:#x}\.\.0xffff; use"):
            flat.start(memory, 0, mode, image)
    flat.start(memory, 0, mode, range(0x1_0000, 0x1_1000))  # begins where they end
    flat.start(memory, 0, "real", range(0, 16 * 4096))  # no tables, no conflict
    memory.close()


@pytest.mark.parametrize(("mode", "pages"), [("protected", 1), ("long", 7)])
def test_memory_needs_room_for_the_tables(mode, pages) -> None:
    memory = GuestMemory(ram_ranges(pages * 4096))
    flat.start(memory, 0, mode)
    memory.close()
    if pages > 1:
        memory = GuestMemory(ram_ranges((pages - 1) * 4096))
        with pytest.raises(
            ConfigError, match=f"{mode} mode needs {pages} pages .* has {pages - 1}; "
        ):
            flat.start(memory, 0, mode)
        memory.close()


@pytest.mark.parametrize("entry", [0, 0x1000, 0xFFFF0, 0x12345, 0xFFFF_FFFF])
def test_real_mode_starts_with_the_cs_base_at_the_entry_and_ip_0(memory, entry) -> None:
    start = flat.start(memory, entry, "real")
    cs = start.system.cs
    assert (cs.base, start.registers["rip"], start.system.cr0 & 1) == (entry, 0, 0)
    assert (cs.db, cs.limit, cs.type & 8) == (0, 0xFFFF, 8)
    assert start.system.ds.base == start.system.ss.base == 0
    assert not any(memory[0:MIB])  # no tables in memory


@pytest.mark.parametrize("mode", flat.MODES)
def test_general_registers_are_0_but_for_rip_and_the_fixed_flag(memory, mode) -> None:
    registers = flat.start(memory, 0x1000, mode).registers
    others = {name: value for name, value in registers.items() if name not in ("rip", "rflags")}
    assert len(others) == 16 and not any(others.values())
    assert registers["rflags"] == 2


@pytest.mark.parametrize("mode", ["real", "protected"])
def test_modes_of_32_bits_do_not_start_above_4_gib(memory, mode) -> None:
    flat.start(memory, 0xFFFF_FFFF, mode)
    message = f"{mode} mode cannot start at 0x100000000; use --mode long"
    with pytest.raises(ConfigError, match=re.escape(message)):
        flat.start(memory, 1 << 32, mode)
    assert flat.start(memory, 1 << 32, "long").registers["rip"] == 1 << 32


def test_long_mode_with_more_memory_than_one_pdpt_maps_is_no_bare_value_error() -> None:
    """The configuration allows up to 1 TiB; the pages are sparse and cost nothing here."""
    memory = GuestMemory(ram_ranges(600 << 30))
    try:
        system = flat.start(memory, 0, "long").system
    except VmexitError:
        return  # refused in order
    finally:
        memory_end = memory.regions[-1].end
        memory.close()
    assert system.cr3 < memory_end
