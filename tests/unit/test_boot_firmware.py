"""Firmware ends at 4 GiB, read-only, with its last 128 KiB below 1 MiB as RAM; the vCPU begins
at the reset vector.
"""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.arch.x86.layout import ram_ranges
from vmexit.arch.x86.registers import SEGMENTS
from vmexit.boot import firmware
from vmexit.core.errors import ConfigError, ImageError
from vmexit.core.memory import GuestMemory

KIB, MIB, FOUR_GIB = 1 << 10, 1 << 20, 1 << 32


def rom(size: int) -> bytes:
    """Bytes of which no two 16-byte lines are equal."""
    return b"".join(i.to_bytes(16, "little") for i in range(size // 16))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 80).map(lambda n: n * 4 * KIB))
def test_a_rom_of_any_size_ends_at_4_gib_and_its_end_is_below_1_mib(size) -> None:
    memory, data = GuestMemory(ram_ranges(MIB)), rom(size)
    firmware.load(memory, data)
    assert memory.read(FOUR_GIB - size, size) == data
    shadow = min(size, 128 * KIB)
    assert memory.read(MIB - shadow, shadow) == data[-shadow:]
    assert not any(memory[0 : MIB - shadow])
    rom_region = memory.region(FOUR_GIB - 1)
    assert (rom_region.gpa, rom_region.end) == (FOUR_GIB - size, FOUR_GIB)
    assert rom_region.readonly and not memory.region(MIB - 1).readonly
    memory.close()


def test_the_copy_below_1_mib_is_memory_of_its_own() -> None:
    memory = GuestMemory(ram_ranges(MIB))
    firmware.load(memory, rom(64 * KIB))
    memory.write(MIB - 16, b"BIOS")
    assert memory.read(FOUR_GIB - 16, 16) == rom(64 * KIB)[-16:]
    memory.close()


def test_the_vcpu_begins_at_the_reset_vector_with_the_rom_under_it() -> None:
    """SDM vol. 3, table 10-1: the state after power-up."""
    memory = GuestMemory(ram_ranges(MIB))
    registers, system, _ = firmware.load(memory, rom(64 * KIB))
    at = system.cs.base + registers["rip"]
    assert at == 0xFFFF_FFF0
    assert memory.read(at, 16) == rom(64 * KIB)[-16:]
    assert (system.cs.selector, registers["rip"], registers["rflags"]) == (0xF000, 0xFFF0, 2)
    assert system.cr0 == 0x6000_0010
    assert (system.cr2, system.cr3, system.cr4, system.efer) == (0, 0, 0, 0)
    for name in SEGMENTS:
        segment = getattr(system, name)
        assert (segment.limit, segment.present) == (0xFFFF, 1), name
        if name != "cs":
            assert (segment.selector, segment.base) == (0, 0), name
    assert system.gdt == system.idt == (0, 0xFFFF)
    assert not any(v for k, v in registers.items() if k not in ("rip", "rflags", "rdx"))


@pytest.mark.parametrize("size", [1, 4095, 4097, 64 * KIB + 512, 16 * MIB + 4096, 32 * MIB])
def test_a_rom_that_is_not_whole_pages_or_above_16_mib_is_an_image_error(size) -> None:
    memory = GuestMemory(ram_ranges(MIB))
    with pytest.raises(ImageError, match=rf"ROM of {size} bytes .*4096.*16777216 bytes: pass"):
        firmware.load(memory, bytes(size))
    assert len(memory.regions) == 1
    memory.close()


def test_the_largest_rom_is_taken() -> None:
    memory = GuestMemory(ram_ranges(MIB))
    firmware.load(memory, bytes(16 * MIB - 1) + b"\xea")
    assert memory.read_u8(FOUR_GIB - 1) == memory.read_u8(MIB - 1) == 0xEA
    memory.close()


def test_an_empty_rom_is_an_image_error_like_any_other_that_cannot_be() -> None:
    memory = GuestMemory(ram_ranges(2 * MIB))
    try:
        with pytest.raises(ImageError):
            firmware.load(memory, b"")
    finally:
        memory.close()


@pytest.mark.parametrize("size", [4 * KIB, 512 * KIB, MIB - 4 * KIB])
def test_less_than_1_mib_of_memory_is_a_config_error_that_leaves_nothing(size) -> None:
    before = set(os.listdir("/proc/self/fd"))
    memory = GuestMemory(ram_ranges(size))
    with pytest.raises(ConfigError, match="at least 1 MiB of memory; use --memory 1M"):
        firmware.load(memory, rom(128 * KIB))
    assert len(memory.regions) == 1
    memory.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_ram_on_both_sides_of_the_mmio_hole_leaves_the_rom_its_place() -> None:
    memory = GuestMemory(ram_ranges(4 << 30))
    firmware.load(memory, rom(256 * KIB))
    assert [(r.gpa, r.end, r.readonly) for r in memory.regions] == [
        (0, 3 << 30, False),
        (FOUR_GIB - 256 * KIB, FOUR_GIB, True),
        (FOUR_GIB, 5 << 30, False),
    ]
    memory.close()
