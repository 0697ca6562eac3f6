"""The software CPU's view of port instructions agrees with capstone, and its check of the TSS
bitmap with the bits one by one.
"""

from collections.abc import Iterator

import capstone
import pytest
from capstone import x86
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.accel.soft.ports import PortAccess, bitmap_allows, decode_port_access
from vmexit.arch.x86.registers import Segment, SystemRegisters
from vmexit.arch.x86.segments import protected_mode, real_mode
from vmexit.arch.x86.segments import reset as reset_state
from vmexit.core.memory import GuestMemory

PLAIN = {x86.X86_INS_IN, x86.X86_INS_OUT}
STRING = {
    x86.X86_INS_INSB, x86.X86_INS_INSW, x86.X86_INS_INSD,
    x86.X86_INS_OUTSB, x86.X86_INS_OUTSW, x86.X86_INS_OUTSD,
}  # fmt: skip
MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
DECODERS = {bits: capstone.Cs(capstone.CS_ARCH_X86, mode) for bits, mode in MODES.items()}
for _decoder in DECODERS.values():
    _decoder.detail = True

LOCK = 0xF0  # makes port instructions undefined: no CPU comes as far as an access


def by_capstone(code: bytes, bits: int) -> PortAccess | None:
    found = next(DECODERS[bits].disasm(code, 0, 1), None)
    if found is None or found.id not in PLAIN | STRING:
        return None
    if found.id in PLAIN:
        return PortAccess(found.size, False, False, bits)
    return PortAccess(found.size, True, found.prefix[0] in (0xF2, 0xF3), found.addr_size * 8)


prefixes = st.lists(
    st.one_of(
        st.sampled_from([0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3]),
        st.integers(0x40, 0x4F),
    ),
    max_size=12,
).map(bytes)
opcodes = st.one_of(
    st.sampled_from([*range(0xE4, 0xE8), *range(0xEC, 0xF0), *range(0x6C, 0x70)]),
    st.integers(0, 255),
).map(lambda n: bytes((n,)))
tails = st.binary(min_size=15, max_size=15)


@settings(deadline=None, max_examples=400)
@given(prefixes, opcodes, tails, st.sampled_from([16, 32, 64]))
def test_any_instruction_is_the_port_access_that_capstone_sees_or_none(
    prefix, opcode, tail, bits
) -> None:
    code = (prefix + opcode + tail)[:15]
    if LOCK not in code:
        assert decode_port_access(code, bits) == by_capstone(code, bits)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_each_single_byte_opcode_is_decoded_as_capstone_does(bits) -> None:
    accesses = 0
    for opcode in set(range(256)) - {LOCK}:
        code = bytes((opcode, 0x90)) + bytes(13)
        assert decode_port_access(code, bits) == by_capstone(code, bits), hex(opcode)
        accesses += decode_port_access(code, bits) is not None
    assert accesses == 12


def test_the_address_size_of_a_string_form_is_the_other_one_with_its_prefix() -> None:
    sizes = {b: decode_port_access(b"\x6c", b).address_bits for b in (16, 32, 64)}
    other = {b: decode_port_access(b"\x67\xf3\x6c", b).address_bits for b in (16, 32, 64)}
    assert sizes == {16: 16, 32: 32, 64: 64}
    assert other == {16: 32, 32: 16, 64: 32}


@given(st.binary(max_size=15), st.sampled_from([16, 32, 64]))
def test_any_bytes_however_few_are_decoded_without_an_exception(code, bits) -> None:
    access = decode_port_access(code, bits)
    assert access is None or access.length >= 1


# The TSS.

TSS_AT, PAGE = 0x0F80, 4096  # so that the bitmap lies across pages


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([(0, 4 * PAGE)])
    yield memory
    memory.close()


def tss(limit: int, type: int = 0xB, present: int = 1, base: int = TSS_AT) -> Segment:
    return Segment(0x28, base, limit, type, s=0, dpl=0, present=present, l=0, db=0, g=0)


def system_with(task: Segment) -> SystemRegisters:
    return protected_mode(reset_state()[1].gdt)._replace(tr=task)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 0xFFFF),
    st.sampled_from([1, 2, 4]),
    st.sets(st.integers(-9, 9)),  # ports near it that the bitmap forbids
    st.sampled_from([0x68, 0x69, 0x88, 0x100]),
    st.integers(-3, 3) | st.integers(0, 0x800),
)
def test_a_port_may_be_used_exactly_when_each_of_its_bits_is_there_and_clear(
    memory, port, size, forbidden, start, room
) -> None:
    bitmap = bytearray(0x2001)
    for distance in forbidden:
        if 0 <= port + distance < 0x10008:
            bitmap[(port + distance) // 8] |= 1 << (port + distance) % 8
    memory.write(TSS_AT, bytes(0x100))
    memory.write_u16(TSS_AT + 0x66, start)
    memory.write(TSS_AT + start, bytes(bitmap))
    # The CPU reads two bytes, so both have to be within the limit (SDM vol. 1, 19.5.2).
    last = start + port // 8 + 1
    allowed = room >= 0 and not any(0 <= d < size for d in forbidden)
    assert bitmap_allows(memory, system_with(tss(last + room)), port, size) is allowed


@pytest.mark.parametrize(
    ("task", "allowed"),
    [
        (tss(0x3000), True),
        (tss(0x3000, type=9), True),
        (tss(0x3000, type=3), False),  # a 16-bit TSS has no bitmap
        (tss(0x3000, type=1), False),
        (tss(0x3000, type=2), False),  # an LDT
        (tss(0x3000, present=0), False),
        (tss(0x66), False),  # too short to say where the bitmap is
        (tss(0x67), False),  # too short to have one
        (tss(0x3000, base=4 * PAGE - 0x67), False),  # where it says so is outside memory
        (tss(0x3000, base=1 << 31), False),
    ],
)
def test_only_a_present_32_or_64_bit_tss_with_room_for_it_has_a_bitmap(
    memory, task, allowed
) -> None:
    memory.write(TSS_AT, bytes(4 * PAGE - TSS_AT))
    memory.write_u16(TSS_AT + 0x66, 0x68)
    assert bitmap_allows(memory, system_with(task), 0x10, 1) is allowed


def test_a_tss_too_short_to_say_where_its_bitmap_is_allows_nothing(memory) -> None:
    memory.write(TSS_AT, bytes(0x200))  # the word beyond the limit would say: at 0
    assert not bitmap_allows(memory, system_with(tss(0x66)), 0x10, 1)
    assert bitmap_allows(memory, system_with(tss(0x67)), 0x10, 1)


def test_a_bitmap_that_is_not_mapped_allows_nothing(memory) -> None:
    table = 0x3000
    memory.write(0, bytes(4 * PAGE))
    memory.write_u16(TSS_AT + 0x66, 0x80)  # the bitmap begins with the next page
    memory.write_u32(table, 0x2000 | 1)  # a page directory entry
    for page, flags in ((0, 1), (1, 0)):
        memory.write_u32(0x2000 + 4 * page, page * PAGE | flags)
    system = system_with(tss(0x3000))._replace(cr0=1 << 31 | 1, cr3=table)
    assert not bitmap_allows(memory, system, 0x10, 1)
    memory.write_u32(0x2004, PAGE | 1)
    assert bitmap_allows(memory, system, 0x10, 1)


def test_the_tss_of_the_reset_state_has_a_bitmap_like_any_other(memory) -> None:
    memory.write(0, bytes(0x1000))
    assert bitmap_allows(memory, real_mode(0), 0x10, 1)
    memory.write_u16(0x66, 0x100)
    memory.write_u8(0x102, 0x01)
    assert not bitmap_allows(memory, real_mode(0), 0x10, 1)
    assert bitmap_allows(memory, real_mode(0), 0x11, 1)
