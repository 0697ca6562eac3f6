"""Backtraces over memory and registers: chains of frames, guesses, and stacks that lie."""

import struct
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmexit.arch.x86.code import disassemble
from vmexit.arch.x86.paging import identity_map
from vmexit.arch.x86.registers import Table
from vmexit.arch.x86.segments import general, long_mode, protected_mode, real_mode
from vmexit.core.memory import GuestMemory
from vmexit.core.symbols import Symbol, SymbolTable
from vmexit.machine.backtrace import Frame, backtrace, ends_in_call

GDT = Table(0, 31)
TABLES = 0x8_0000
LONG = long_mode(GDT, TABLES)
FLAT32 = protected_mode(GDT)
NONE = SymbolTable()
# Code is at 0x1000: a call, whose return address is 0x1005 + 16 * n, for each n.
CODE = (b"\xe8\0\0\0\0" + b"\x90" * 11) * 64
SYMBOLS = SymbolTable([Symbol(0x1000, "first"), Symbol(0x1100, "second"), Symbol(0x2000, "x", "D")])


def back(n: int) -> int:
    """The return address of call `n`."""
    return 0x1005 + 16 * n


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([(0, 1 << 20)])
    memory.write(0x1000, CODE)
    memory.write(TABLES, identity_map(TABLES, 1 << 30))
    yield memory
    memory.close()


def words(memory: GuestMemory, gpa: int, *values: int, size: int = 8) -> None:
    memory.write(gpa, b"".join(value.to_bytes(size, "little") for value in values))


def addresses(memory, *, rbp=0, rsp=0x4_0000, rip=0x1000, system=LONG, symbols=NONE, limit=32):
    registers = general(rip) | {"rbp": rbp, "rsp": rsp}
    frames = backtrace(memory, registers, system, symbols, limit)
    return [frame.address for frame in frames]


def test_a_chain_of_frames(memory) -> None:
    words(memory, 0x4_0000, 0x4_0100, back(1))
    words(memory, 0x4_0100, 0x4_0200, back(2))
    words(memory, 0x4_0200, 0, back(3))
    assert addresses(memory, rbp=0x4_0000) == [0x1000, back(1), back(2), back(3)]
    assert addresses(memory, rbp=0x4_0000, limit=3) == [0x1000, back(1), back(2)]
    assert addresses(memory, rbp=0x4_0000, limit=-1) == []


def test_a_chain_of_32_bit_frames(memory) -> None:
    words(memory, 0x4_0000, 0x4_0100, back(1), size=4)
    words(memory, 0x4_0100, 0, back(2), size=4)
    garbage = 0xABCD_0000_0000_0000  # what is above 32 bits does not count
    rbp = garbage | 0x4_0000
    assert addresses(memory, rbp=rbp, system=FLAT32) == [0x1000, back(1), back(2)]


def test_segments_with_a_base(memory) -> None:
    ss, cs = FLAT32.ss._replace(base=0x4_0000), FLAT32.cs._replace(base=0x1000)
    words(memory, 0x4_0100, 0, back(1) - 0x1000, size=4)
    system = FLAT32._replace(ss=ss, cs=cs)
    assert addresses(memory, rip=0, rbp=0x100, system=system) == [0x1000, back(1)]


def test_16_bit_code_has_no_frames(memory) -> None:
    words(memory, 0x4000, 0, back(1), size=2)
    assert addresses(memory, rip=0, rbp=0x4000, system=real_mode(0x1000)) == [0x1000]


@pytest.mark.parametrize("below", [0x4_0000, 0x3_0000, 8, 0x4_0101, 1 << 63, (1 << 64) - 8])
def test_a_chain_ends_where_frames_do_not_go_on_upwards(memory, below) -> None:
    words(memory, 0x3_0000, 0x4_0000, back(3))
    words(memory, 0x4_0000, below, back(1))
    assert addresses(memory, rbp=0x4_0000) == [0x1000, back(1)]


@pytest.mark.parametrize(
    "rbp", [0, 1, 0x4_0001, 0xF_FFF8, 1 << 20, 1 << 40, 1 << 47, (1 << 64) - 8, (1 << 64) - 16]
)
def test_a_frame_pointer_that_leads_nowhere(memory, rbp) -> None:
    words(memory, 0xF_FFF8, back(1))
    assert addresses(memory, rbp=rbp) == [0x1000]


@pytest.mark.parametrize(
    "address", [0, 4, 0x1006, 0x1004, 0x7_0000, 1 << 20, 1 << 47, -1 & 2**64 - 1]
)
def test_what_follows_no_call_is_no_return_address(memory, address) -> None:
    words(memory, 0x4_0000, 0x4_0100, address)
    words(memory, 0x4_0100, 0, back(1))
    assert addresses(memory, rbp=0x4_0000) == [0x1000]


def test_a_chain_as_long_as_memory_is_cut_at_the_limit(memory) -> None:
    for at in range(0x4_0000, 0x6_0000, 16):
        words(memory, at, at + 16, back(at % 64 // 16))
    assert len(addresses(memory, rbp=0x4_0000)) == 32
    assert len(addresses(memory, rbp=0x4_0000, limit=10**9)) == 0x2_0000 // 16 + 1


def test_names_and_guesses(memory) -> None:
    words(memory, 0x4_0000, 7, back(0), 0x1008, back(16), back(17) | 1 << 63, 0x2005)
    registers = general(0x1003) | {"rsp": 0x4_0000}
    assert backtrace(memory, registers, LONG, SYMBOLS) == [
        Frame(0x1003, "first+0x3"),
        Frame(back(0), "first+0x5", guess=True),
        Frame(back(16), "second+0x5", guess=True),
    ]
    assert addresses(memory, symbols=SYMBOLS, limit=2) == [0x1000, back(0)]
    assert addresses(memory) == [0x1000]  # without names there is no telling


def guesses(memory: GuestMemory, **registers: int) -> list[tuple[int, bool]]:
    frames = backtrace(memory, general(0x1000) | registers, LONG, SYMBOLS)
    return [(frame.address, frame.guess) for frame in frames[1:]]


@pytest.mark.parametrize("end", [0, 0x4_0200 + 1])
def test_a_chain_that_holds_leaves_no_room_for_guesses(memory, end) -> None:
    words(memory, 0x4_0000, back(7), back(8))  # left over
    words(memory, 0x4_0080, end, back(1))
    assert guesses(memory, rsp=0x4_0000, rbp=0x4_0080) == [(back(1), False)]


def test_a_chain_that_does_not_end_as_one_should_is_filled_up(memory) -> None:
    words(memory, 0x4_0000, back(7), 5)
    words(memory, 0x4_0080, 0x4_0100, back(1))
    words(memory, 0x4_0100, 6, 7, back(2))
    expected = [(back(7), True), (back(1), False), (back(2), True)]
    assert guesses(memory, rsp=0x4_0000, rbp=0x4_0080) == expected


def test_a_chain_in_which_calls_are_missing_is_filled_up(memory) -> None:
    words(memory, 0x4_0000, back(7), 5)
    words(memory, 0x4_0080, 0, back(16))  # a call of `second`, but RIP is in `first`
    assert guesses(memory, rsp=0x4_0000, rbp=0x4_0080) == [(back(7), True), (back(16), False)]


def test_frames_on_another_stack_come_last(memory) -> None:
    words(memory, 0x4_0000, back(7))
    words(memory, 0x5_0080, 8, back(1))
    assert guesses(memory, rsp=0x4_0000, rbp=0x5_0080) == [(back(7), True), (back(1), False)]


def test_guesses_end_with_the_stack(memory) -> None:
    words(memory, 0x4_3FF8, back(1), back(2))
    assert addresses(memory, rsp=0x4_1000, symbols=SYMBOLS) == [0x1000, back(1)]
    for rsp in (0xF_FFF8, 1 << 20, (1 << 64) - 8, (1 << 64) - 1, 0x4_3FF9):
        assert addresses(memory, rsp=rsp, symbols=SYMBOLS)[0] == 0x1000


def test_a_frame_in_data_is_not_believed_where_there_are_names(memory) -> None:
    memory.write(0x2000, CODE)
    words(memory, 0x5_0000, 0, 0x2005)  # a call, but `x` is data
    words(memory, 0x4_0000, back(1))
    assert addresses(memory, rbp=0x5_0000) == [0x1000, 0x2005]
    assert addresses(memory, rbp=0x5_0000, symbols=SYMBOLS) == [0x1000, back(1)]


def test_the_end_of_a_function_is_still_in_it(memory) -> None:
    words(memory, 0x4_0000, 0, 0x1105)
    table = SymbolTable([Symbol(0x1000, "caller", "T", 0x105), Symbol(0x1105, "next")])
    registers = general(0x1000) | {"rbp": 0x4_0000}
    assert backtrace(memory, registers, LONG, table)[1] == Frame(0x1105, "caller+0x105")


def test_who_jumps_to_nothing_is_found_on_top_of_the_stack(memory) -> None:
    words(memory, 0x4_0000, back(1), 0, back(2))
    nowhere = 1 << 46
    assert addresses(memory, rip=nowhere, rbp=0x4_0008) == [nowhere, back(1), back(2)]
    assert addresses(memory, rip=nowhere) == [nowhere, back(1)]
    assert addresses(memory, rip=nowhere, rsp=0x1000) == [nowhere]


@example(b"\xff\xd0")  # call rax
@example(b"\x41\xff\xd3")  # call r11
@example(b"\xff\x15\0\0\0\0")  # call [rip]
@example(b"\xff\x14\x25\0\0\0\0")  # call [disp32]
@example(b"\xff\x54\x24\x08")  # call [rsp+8]
@example(b"\xff\x94\x24\0\1\0\0")  # call [rsp+0x100]
@example(b"\xff\x50\x10")  # call [rax+16]
@example(b"\xff\x90\0\1\0\0")  # call [rax+0x100]
@example(b"\xff\x14\xc5\0\0\0\0")  # call [rax*8]
@example(b"\xff\x10")  # call [rax]
@example(b"\xff\x98\0\0\0\0")  # a far one
@given(st.builds(lambda a, b: bytes((0xFF, a)) + b, st.integers(0, 255), st.binary(max_size=6)))
def test_calls_are_what_a_disassembler_says(code: bytes) -> None:
    padded = code.rjust(8, b"\x90")
    near = any(is_indirect_call(padded[-size:]) for size in range(2, 8))
    assert ends_in_call(padded) == (near or padded[-5] == 0xE8)
    assert not ends_in_call(b"") and not ends_in_call(b"\x90" * 8)
    assert ends_in_call(b"\x90\xe8" + struct.pack("<i", 5))


def is_indirect_call(code: bytes) -> bool:
    found = disassemble(code, 0, 64)
    whole = code[0] == 0xFF and bool(found) and found[0][1] == code
    text = found[0][2] if whole else ""
    far = "ptr" in text and "qword ptr" not in text
    return text.startswith("call") and not far
