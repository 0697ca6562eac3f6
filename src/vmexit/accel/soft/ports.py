"""Decoding the one kind of instruction that the software vCPU sometimes finishes by itself."""

from typing import NamedTuple

_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_REP = frozenset((0xF2, 0xF3))
_ADDRESS_SIZE = 0x67


class PortAccess(NamedTuple):
    """An IN, OUT, INS or OUTS: its length in bytes, and for string forms REP and address size."""

    length: int
    string: bool
    repeated: bool
    address_bits: int


def decode_port_access(code: bytes, bits: int) -> PortAccess | None:
    """Decode `code` in a 16, 32 or 64-bit segment; None if it is no port access (SDM vol. 2)."""
    repeated = address_override = False
    for at, byte in enumerate(code):
        if byte in _PREFIXES:
            repeated |= byte in _REP
            address_override |= byte == _ADDRESS_SIZE
        elif bits == 64 and byte & 0xF0 == 0x40:
            continue  # REX
        elif 0xE4 <= byte <= 0xE7:
            return PortAccess(at + 2, False, False, bits)
        elif 0xEC <= byte <= 0xEF:
            return PortAccess(at + 1, False, False, bits)
        elif 0x6C <= byte <= 0x6F:
            if address_override:
                bits = {16: 32, 32: 16, 64: 32}[bits]
            return PortAccess(at + 1, True, repeated, bits)
        else:
            return None
    return None
