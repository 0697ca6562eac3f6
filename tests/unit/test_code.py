"""Guest code is found where the CPU would fetch it, and decoded in the mode the CPU is in."""

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.arch.x86.code import (
    code_bits,
    describe_instruction,
    disassemble,
    dump,
    linear_ip,
    next_instruction,
    read_linear,
)
from vmexit.arch.x86.registers import CONTROL, GENERAL, SEGMENTS, Segment, SystemRegisters, Table
from vmexit.arch.x86.segments import general, long_mode, protected_mode, real_mode, reset
from vmexit.core.memory import GuestMemory

GDT = Table(0, 31)
V86 = 1 << 17


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([(0, 0x6000)])
    yield memory
    memory.close()


def with_cs(system: SystemRegisters, **fields: int) -> SystemRegisters:
    return system._replace(cs=system.cs._replace(**fields))


@pytest.mark.parametrize(
    ("system", "rflags", "bits"),
    [
        (real_mode(0), 2, 16),
        (with_cs(real_mode(0), db=1, l=1), 2, 16),  # what CS holds from before does not count
        (protected_mode(GDT), 2, 32),
        (with_cs(protected_mode(GDT), db=0), 2, 16),
        (with_cs(protected_mode(GDT), db=0, l=1), 2, 16),  # L means nothing outside long mode
        (protected_mode(GDT), 2 | V86, 16),
        (long_mode(GDT, 0), 2, 64),
        (with_cs(long_mode(GDT, 0), l=0, db=1), 2, 32),  # compatibility mode
        (with_cs(long_mode(GDT, 0), l=0, db=0), 2, 16),
    ],
)
def test_the_mode_of_the_code_is_that_of_cr0_efer_cs_and_the_vm_flag(system, rflags, bits) -> None:
    assert code_bits(general(0) | {"rflags": rflags}, system) == bits


@pytest.mark.parametrize(
    ("system", "rip", "address"),
    [
        (real_mode(0x1000), 0x10, 0x1010),
        (reset()[1], 0xFFF0, 0xFFFF_FFF0),
        (reset()[1], 0x1_0000, 0),  # beyond 4 GiB it begins again at 0
        (with_cs(protected_mode(GDT), base=0x400000), 0x1234, 0x401234),
        (with_cs(protected_mode(GDT), base=0xFFFF_F000), 0x1001, 1),
        (with_cs(long_mode(GDT, 0), base=0x400000), 0xFFFF_8000_0000_0000, 0xFFFF_8000_0000_0000),
    ],
)
def test_the_next_instruction_is_at_the_cs_base_plus_rip_except_in_64_bit_mode(
    system, rip, address
) -> None:
    assert linear_ip(general(rip), system) == address


def paged(memory: GuestMemory, pages: dict[int, int]) -> SystemRegisters:
    """32-bit paging with one page table for the first 4 MiB."""
    memory.write_u32(0x4000, 0x5000 | 1)
    for gva, gpa in pages.items():
        memory.write_u32(0x5000 + (gva >> 12) * 4, gpa | 1)
    return protected_mode(GDT)._replace(cr0=1 << 31 | 1, cr3=0x4000)


def test_reading_goes_on_in_the_page_that_is_next_by_the_tables(memory) -> None:
    system = paged(memory, {0x10000: 0x2000, 0x11000: 0x1000, 0x12000: 0x3000})
    memory.write(0x2FFE, b"ab")
    memory.write(0x1000, b"c" * 0x1000)
    memory.write(0x3000, b"de")
    assert read_linear(memory, system, 0x10FFE, 0x1004) == b"ab" + b"c" * 0x1000 + b"de"


def test_reading_stops_before_a_page_that_is_not_mapped_or_not_there(memory) -> None:
    system = paged(memory, {0x10000: 0x2000, 0x20000: 0x2000, 0x21000: 0x10_0000})
    memory.write(0x2FFC, b"tail")
    assert read_linear(memory, system, 0x10FFC, 15) == b"tail"  # the next is not present
    assert read_linear(memory, system, 0x20FFC, 15) == b"tail"  # the next has no memory behind it
    assert read_linear(memory, system, 0x30000, 15) == b""
    assert read_linear(memory, real_mode(0), 0x5FFE, 15) == memory.read(0x5FFE, 2)


def test_reading_nothing_reads_nothing(memory) -> None:
    assert read_linear(memory, real_mode(0), 0x10_0000, 0) == b""


@pytest.mark.parametrize(
    ("bits", "text"), [(16, "mov ax, 0x1234"), (32, "mov eax, 0x5551234"), (64, None)]
)
def test_the_same_bytes_are_decoded_by_mode(bits, text) -> None:
    code = b"\xb8\x34\x12\x55\x05\x90" if bits != 64 else b"\x48\xff\xc0\x48\xff\xc8"
    found = disassemble(code, 0x1000, bits, 2)
    if bits == 64:
        assert [t for _, _, t in found] == ["inc rax", "dec rax"]
        assert [a for a, _, _ in found] == [0x1000, 0x1003]
    else:
        assert found[0][2] == text


@given(st.binary(max_size=60), st.sampled_from([16, 32, 64]), st.integers(0, 1 << 40),
       st.integers(1, 8))  # fmt: skip
def test_any_bytes_decode_to_a_contiguous_prefix_of_themselves(code, bits, address, count) -> None:
    found = disassemble(code, address, bits, count)
    assert len(found) <= count
    assert b"".join(raw for _, raw, _ in found) == code[: sum(len(raw) for _, raw, _ in found)]
    for at, raw, text in found:
        assert at == address and 1 <= len(raw) <= 15 and text == text.strip() != ""
        address += len(raw)


def test_an_instruction_is_described_in_words_and_hex() -> None:
    assert describe_instruction(b"\x0f\x0b\x90", 0, 64) == "`ud2` (0f 0b)"
    assert describe_instruction(b"\xe6\x10", 0, 16) == "`out 0x10, al` (e6 10)"
    assert describe_instruction(b"", 0, 32) == "no guest memory there"
    undefined = describe_instruction(b"\x06" * 20, 0, 64)  # PUSH ES is none in 64-bit mode
    assert undefined == f"undefined ({'06 ' * 14}06)"


def test_the_next_instruction_is_read_through_cs_and_paging(memory) -> None:
    memory.write(0x1010, b"\xe6\x42\xf4")
    code, text = next_instruction(memory, general(0x10), real_mode(0x1000))
    assert (len(code), code[:3], text) == (15, b"\xe6\x42\xf4", "`out 0x42, al` (e6 42)")
    system = paged(memory, {0x20000: 0x1000})
    _, text = next_instruction(memory, general(0x20010), system)
    assert text == "`out 0x42, al` (e6 42)"
    assert next_instruction(memory, general(0x30000), system) == (b"", "no guest memory there")


@given(st.binary(min_size=1, max_size=32), st.integers(0, (1 << 64) - 1),
       st.integers(0, (1 << 64) - 1), st.sampled_from(["real", "protected", "long"]))  # fmt: skip
def test_the_report_of_a_crash_never_fails_whatever_the_guest_left(page, rip, cr3, mode) -> None:
    memory = GuestMemory([(0, 0x1000)])
    memory.write(0, (page * 0x1000)[:0x1000])
    system = {
        "real": real_mode(rip & 0xFFFFF),
        "protected": protected_mode(GDT)._replace(cr0=1 << 31 | 1, cr3=cr3),
        "long": long_mode(GDT, cr3),
    }[mode]
    registers = general(rip)
    code, text = next_instruction(memory, registers, system)
    assert len(code) <= 15 and text
    assert text in dump(registers, system, text)
    memory.close()


def test_the_dump_shows_every_register_with_its_value() -> None:
    registers = {name: 0x1111_0000_0000_0000 + i for i, name in enumerate(GENERAL)}
    segments = {
        name: Segment(0x10 + i, 0xA000 + i, 0xB000 + i, i, i % 2, i % 4, 1 - i % 2, 0, 1, i % 2)
        for i, name in enumerate(SEGMENTS)
    }
    control = {name: 0xC0DE_0000 + i for i, name in enumerate(CONTROL)}
    system = SystemRegisters(**segments, gdt=Table(0xD0, 0xD1), idt=Table(0xE0, 0xE1), **control)
    text = dump(registers, system, "`hlt` (f4)")
    shown = {k: int(v, 16) for k, v in re.findall(r"(\w+)=([0-9a-f]+)", text)}
    assert {name: shown[name] for name in GENERAL} == registers
    for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
        assert shown[name] == control[name]
    for name, segment in segments.items():
        row = next(line for line in text.splitlines() if line.lstrip().startswith(f"{name}="))
        fields = {k: int(v, 16) for k, v in re.findall(r"(\w+)=([0-9a-f]+)", row)}
        assert fields.pop(name) == segment.selector
        assert fields.pop("p") == segment.present
        assert fields.keys() >= {"base", "limit", "type", "s", "dpl", "l", "db", "g"}
        assert fields == {k: getattr(segment, k) for k in fields}
    assert "gdt=00000000000000d0+00d1" in text and "idt=00000000000000e0+00e1" in text
    assert "`hlt` (f4)" in text
