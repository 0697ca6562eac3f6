"""x87 and SSE as FXSAVE stores them in 64-bit mode (Intel SDM vol. 1, 10.5.1, table 10-2)."""

import struct

SIZE = 512
HEAD = struct.Struct("<HHBxHQQII")  # FCW, FSW, FTW, FOP, FIP, FDP, MXCSR, MXCSR_MASK
MXCSR = 24  # where that is in the head

_REGISTERS = 8
_EMPTY = 3  # in the full tag word, which has two bits a register


def st(number: int) -> slice:
    """Where ST(n) is: 10 bytes."""
    return slice(32 + 16 * number, 42 + 16 * number)


def xmm(number: int) -> slice:
    """Where XMMn is: 16 bytes."""
    return slice(160 + 16 * number, 176 + 16 * number)


def full_tags(abridged: int) -> int:
    """The x87 tag word; that of FXSAVE has one bit a register, which tells whether it is in use."""
    return sum((0 if abridged >> n & 1 else _EMPTY) << 2 * n for n in range(_REGISTERS))


def abridged_tags(full: int) -> int:
    """The tag word of FXSAVE."""
    return sum((full >> 2 * n & 3 != _EMPTY) << n for n in range(_REGISTERS))
