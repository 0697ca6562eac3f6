"""A segment survives the way into a descriptor and back, and the start states are the SDM's."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.arch.x86.registers import SEGMENTS, Segment, Table
from vmexit.arch.x86.segments import (
    attributes,
    boot_gdt,
    descriptor,
    from_attributes,
    general,
    long_mode,
    protected_mode,
    real_mode,
    reset,
)

bit = st.integers(0, 1)
segments = st.builds(
    Segment,
    selector=st.integers(0, 0xFFFF),
    base=st.integers(0, 0xFFFF_FFFF),
    limit=st.integers(0, 0xFFFFF),
    type=st.integers(0, 15),
    s=bit,
    dpl=st.integers(0, 3),
    present=bit,
    l=bit,
    db=bit,
    g=bit,
    avl=bit,
).map(lambda s: s._replace(limit=s.limit << 12 | 0xFFF) if s.g else s)


@given(segments)
def test_attributes_and_back_is_the_same_segment(segment) -> None:
    bits = attributes(segment)
    assert from_attributes(segment.selector, segment.base, segment.limit, bits) == segment
    assert bits & ~0xF0FF00 == 0  # only where a descriptor has attributes


@given(st.integers(0, 0xFFFF_FFFF))
def test_bits_that_are_no_attributes_do_not_matter(bits) -> None:
    segment = from_attributes(8, 0, 0xFFFF, bits)
    assert attributes(segment) == bits & 0xF0FF00


@given(segments)
def test_a_cpu_that_loads_the_descriptor_gets_the_segment(segment) -> None:
    """Decoded from the 64 bits by SDM vol. 3, figure 3-8."""
    (raw,) = struct.unpack("<Q", descriptor(segment))

    def field(low: int, count: int) -> int:
        return raw >> low & (1 << count) - 1

    limit = field(0, 16) | field(48, 4) << 16
    assert segment == Segment(
        selector=segment.selector,
        base=field(16, 24) | field(56, 8) << 24,
        limit=limit << 12 | 0xFFF if field(55, 1) else limit,
        type=field(40, 4),
        s=field(44, 1),
        dpl=field(45, 2),
        present=field(47, 1),
        avl=field(52, 1),
        l=field(53, 1),
        db=field(54, 1),
        g=field(55, 1),
    )
    assert from_attributes(segment.selector, segment.base, segment.limit, raw >> 32) == segment


def test_the_boot_gdt_has_the_usual_flat_descriptors_with_the_accessed_bit_set() -> None:
    assert struct.unpack("<4Q", boot_gdt()) == (
        0,
        0x00CF_9B00_0000_FFFF,
        0x00CF_9300_0000_FFFF,
        0x00AF_9B00_0000_FFFF,
    )


@pytest.mark.parametrize("base", [0, 0x1000, 0xF_FFF0, 0x12_3450])
def test_real_mode_has_64_kib_segments_with_base_16_times_the_selector(base) -> None:
    system = real_mode(base)
    assert system.cs.base == base
    assert system.cs.selector == (base // 16) % 0x10000
    assert {getattr(system, s).limit for s in ("cs", "ds", "es", "fs", "gs", "ss")} == {0xFFFF}
    assert (system.idt.base, system.idt.limit) == (0, 0x3FF)  # 256 vectors of 4 bytes
    assert system.cr0 & 1 == 0


def test_reset_is_the_state_after_power_on_where_the_next_instruction_is_at_0xfffffff0() -> None:
    registers, system = reset()
    assert system.cs.base + registers["rip"] == 0xFFFF_FFF0
    assert (system.cs.selector, system.cr0, registers["rflags"]) == (0xF000, 0x6000_0010, 2)
    assert registers["rdx"] >> 8 & 0xF == 6  # the family, in a signature of any model


@pytest.mark.parametrize("system", [protected_mode(Table(0x1000, 31)), long_mode(Table(0, 31), 0)])
def test_32_and_64_bit_start_states_have_flat_present_ring_0_segments(system) -> None:
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(system, name)
        assert (segment.base, segment.limit, segment.g) == (0, 0xFFFF_FFFF, 1), name
        assert (segment.present, segment.s, segment.dpl, segment.selector & 7) == (1, 1, 0, 0)
        assert (segment.type & 8 == 8) is (name == "cs"), name
    assert (system.cs.l, system.cs.db) in ((0, 1), (1, 0))  # both at once is reserved
    assert system.cs.l == (system.efer >> 10 & 1)


@pytest.mark.parametrize(
    "system", [real_mode(0), protected_mode(Table(0, 31)), long_mode(Table(0, 31), 0)]
)
def test_tr_is_a_busy_tss_and_ldtr_an_ldt_as_vm_entry_demands(system) -> None:
    """SDM vol. 3, 27.3.1.2: TR busy, both system segments, present."""
    assert (system.tr.type, system.tr.s, system.tr.present) == (0xB, 0, 1)
    assert (system.ldt.type, system.ldt.s) == (2, 0)
    assert len(SEGMENTS) == 8


def test_long_mode_pages_by_the_tables_it_is_given() -> None:
    system = long_mode(Table(0x5000, 31), 0x6000)
    assert (system.cr3, system.gdt) == (0x6000, Table(0x5000, 31))


def test_general_registers_start_as_zero_but_for_two() -> None:
    registers = general(0x1234)
    assert {k: v for k, v in registers.items() if v} == {"rip": 0x1234, "rflags": 2}
    assert len(registers) == 18
