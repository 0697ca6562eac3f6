"""Random straight-line programs, as machine code for each of the three CPU modes.

Everything in them is defined by the manual: no instruction reads a flag that the one before it
leaves undefined, and the last one defines all of them. So two right processors agree in every bit.
"""

import struct
from typing import NamedTuple

from hypothesis import strategies as st

RAM, MMIO, STACK = 0x5000, 0x20_0000, 0x8000
BITS = {"real": 16, "protected": 32, "long": 64}

_ADD, _OR, _ADC, _SBB, _AND, _SUB, _XOR, _CMP = range(8)
_SP = 4

registers8 = st.sampled_from([0, 1, 2, 3])  # al, cl, dl, bl: the same with and without REX
registers = st.sampled_from([0, 1, 2, 3, 5, 6, 7])
sizes = st.sampled_from([8, 16, 32, 64])
values = st.one_of(
    st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 2**31, 2**32 - 1, 2**63])
)


class Encoder:
    """Instructions of one CPU mode as bytes (Intel SDM vol. 2, chapter 2)."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def op(self, size: int, opcode: bytes, rest: bytes) -> bytes:
        """An instruction whose opcode has its W bit lowest: size 8 clears it."""
        prefix = b""
        if size == 64:
            prefix = b"\x48" if self.bits == 64 else b""
            size = 64 if self.bits == 64 else 32
        if size in (16, 32) and (size == 16) != (self.bits == 16):
            prefix = b"\x66"
        wide = opcode[:-1] + bytes((opcode[-1] | (size != 8),))
        return prefix + wide + rest

    def immediate(self, size: int, value: int, *, full: bool = False) -> bytes:
        """`value` in as many bytes as an operand of `size` has; 64-bit ones have 32 mostly."""
        if size == 64 and self.bits != 64:
            size = 32
        if size == 64 and not full:
            return struct.pack("<I", value & 0x7FFF_FFFF)
        return (value & (1 << size) - 1).to_bytes(size // 8, "little")

    def memory(self, register: int, address: int) -> bytes:
        """ModRM and displacement for an absolute address."""
        if self.bits == 16:
            return bytes((register << 3 | 6,)) + struct.pack("<H", address)
        if self.bits == 32:
            return bytes((register << 3 | 5,)) + struct.pack("<I", address)
        return bytes((register << 3 | 4, 0x25)) + struct.pack("<I", address)

    def alu(self, operation: int, size: int, to: int, source: int) -> bytes:
        return self.op(size, bytes((operation << 3,)), bytes((0xC0 | source << 3 | to,)))

    def load_constant(self, size: int, to: int, value: int) -> bytes:
        if size == 8:
            return bytes((0xB0 | to, value & 0xFF))
        body = bytes((0xB8 | to,)) + self.immediate(size, value, full=True)
        prefix = b"\x48" if size == 64 and self.bits == 64 else b""
        if size in (16, 32, 64) and not prefix and (size == 16) != (self.bits == 16):
            prefix = b"\x66"
        return prefix + body


class Program(NamedTuple):
    """Machine code that ends in HLT, and the mode it is for."""

    mode: str
    code: bytes


@st.composite
def programs(draw: st.DrawFn, mode: str) -> Program:
    """A program of up to 24 instructions after the set-up of the stack."""
    encoder = Encoder(BITS[mode])
    parts = [encoder.load_constant(32, _SP, STACK)]
    for register in (0, 1, 2, 3, 5, 6, 7):
        parts.append(encoder.load_constant(64, register, draw(values)))
    steps = draw(st.lists(st.sampled_from(_STEPS), min_size=1, max_size=24))
    parts.extend(step(draw, encoder) for step in steps)
    parts.append(encoder.alu(_CMP, 8, 0, 1))
    return Program(mode, b"".join(parts) + b"\xf4")


def _two(draw: st.DrawFn) -> tuple[int, int, int]:
    size = draw(sizes)
    pick = registers8 if size == 8 else registers
    return size, draw(pick), draw(pick)


def _constant(draw: st.DrawFn, e: Encoder) -> bytes:
    size, to, _ = _two(draw)
    return e.load_constant(size, to, draw(values))


def _move(draw: st.DrawFn, e: Encoder) -> bytes:
    size, to, source = _two(draw)
    return e.op(size, b"\x88", bytes((0xC0 | source << 3 | to,)))


def _arithmetic(draw: st.DrawFn, e: Encoder) -> bytes:
    size, to, source = _two(draw)
    return e.alu(draw(st.sampled_from([_ADD, _SUB, _CMP, _AND, _OR, _XOR])), size, to, source)


def _arithmetic_constant(draw: st.DrawFn, e: Encoder) -> bytes:
    size, to, _ = _two(draw)
    operation = draw(st.sampled_from([_ADD, _SUB, _CMP, _AND, _OR, _XOR]))
    value = e.immediate(size, draw(values))
    return e.op(size, b"\x80", bytes((0xC0 | operation << 3 | to,)) + value)


def _with_carry(draw: st.DrawFn, e: Encoder) -> bytes:
    size, to, source = _two(draw)
    operation = draw(st.sampled_from([_ADC, _SBB]))
    return e.alu(_CMP, size, source, to) + e.alu(operation, size, to, source)


def _on_condition(draw: st.DrawFn, e: Encoder) -> bytes:
    """SETcc, CMOVcc, or a jump over a MOV, on flags that a CMP has set."""
    size, to, source = _two(draw)
    condition = draw(st.integers(0, 15))
    compare = e.alu(_CMP, size, to, source)
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return compare + bytes((0x0F, 0x90 | condition, 0xC0 | draw(registers8)))
    if kind == 1 and size != 8:
        prefix = b"\x48" if size == 64 and e.bits == 64 else b""
        if not prefix and (size == 16) != (e.bits == 16):
            prefix = b"\x66"
        return compare + prefix + bytes((0x0F, 0x40 | condition, 0xC0 | to << 3 | source))
    skipped = bytes((0xB0 | draw(registers8), draw(st.integers(0, 255))))
    return compare + bytes((0x70 | condition, len(skipped))) + skipped


def _one_operand(draw: st.DrawFn, e: Encoder) -> bytes:
    """NOT, NEG, MUL, IMUL; INC, DEC."""
    size, to, _ = _two(draw)
    if draw(st.booleans()):
        return e.op(size, b"\xf6", bytes((0xC0 | draw(st.sampled_from([2, 3, 4, 5])) << 3 | to,)))
    return e.op(size, b"\xfe", bytes((0xC0 | draw(st.sampled_from([0, 1])) << 3 | to,)))


def _shift(draw: st.DrawFn, e: Encoder) -> bytes:
    """ROL, ROR, SHL, SHR, SAR by a constant below the operand's size."""
    size, to, _ = _two(draw)
    which = draw(st.sampled_from([0, 1, 4, 5, 7]))
    count = draw(st.integers(1, 7))
    return e.op(size, b"\xc0", bytes((0xC0 | which << 3 | to, count)))


def _exchange(draw: st.DrawFn, e: Encoder) -> bytes:
    size, to, source = _two(draw)
    return e.op(size, b"\x86", bytes((0xC0 | source << 3 | to,)))


def _widen(draw: st.DrawFn, e: Encoder) -> bytes:
    """MOVZX and MOVSX from 8 bits."""
    prefix = b"\x66" if e.bits == 16 else b""
    modrm = 0xC0 | draw(registers) << 3 | draw(registers8)
    return prefix + bytes((0x0F, draw(st.sampled_from([0xB6, 0xBE])), modrm))


def _ram(draw: st.DrawFn, e: Encoder) -> bytes:
    """MOV to and from RAM, at any alignment."""
    size, register, _ = _two(draw)
    address = RAM + draw(st.integers(0, 64))
    return e.op(size, draw(st.sampled_from([b"\x88", b"\x8a"])), e.memory(register, address))


def _mmio(draw: st.DrawFn, e: Encoder) -> bytes:
    """MOV to and from where no RAM is, at any alignment within a page."""
    if e.bits == 16:
        return b"\x90"  # out of the reach of a 64 KiB segment
    size, register, _ = _two(draw)
    address = MMIO + draw(st.integers(0, 64))
    return e.op(size, draw(st.sampled_from([b"\x88", b"\x8a"])), e.memory(register, address))


def _stack(draw: st.DrawFn, e: Encoder) -> bytes:
    return bytes((0x50 | draw(registers), 0x58 | draw(registers)))


def _port(draw: st.DrawFn, e: Encoder) -> bytes:
    """IN and OUT with the port in the instruction."""
    size = draw(st.sampled_from([8, 16, 32]))
    opcode = draw(st.sampled_from([b"\xe4", b"\xe6"]))
    return e.op(size, opcode, bytes((draw(st.sampled_from([0x10, 0x11, 0x40])),)))


def _string(draw: st.DrawFn, e: Encoder) -> bytes:
    """STOS, MOVS, LODS, INS, OUTS on RAM, with and without REP."""
    size = draw(st.sampled_from([8, 16, 32]))
    parts = [
        e.load_constant(64, 6, RAM + draw(st.integers(0, 32))),
        e.load_constant(64, 7, RAM + 0x100 + draw(st.integers(0, 32))),
        e.load_constant(64, 1, draw(st.integers(0, 8))),
        e.load_constant(64, 2, 0x10),
    ]
    opcode = draw(st.sampled_from([b"\xaa", b"\xa4", b"\xac", b"\x6c", b"\x6e"]))
    repeat = b"\xf3" if draw(st.booleans()) else b""
    return b"".join(parts) + repeat + e.op(size, opcode, b"")


_STEPS = [
    _constant, _move, _arithmetic, _arithmetic_constant, _with_carry, _on_condition, _one_operand,
    _shift, _exchange, _widen, _ram, _mmio, _stack, _port, _string,
]  # fmt: skip
