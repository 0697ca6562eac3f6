"""Port access beyond what the engine does: decoding it, and whether the guest's code may do it."""

from typing import NamedTuple

from vmexit.arch.x86.code import read_linear
from vmexit.arch.x86.registers import SystemRegisters
from vmexit.core.memory import GuestMemory

_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_REP = frozenset((0xF2, 0xF3))
_ADDRESS_SIZE = 0x67

_TSS_32_BIT = 0x9  # type 9 or 11, and the 64-bit TSS has the same
_TSS_BITMAP_AT = 0x66  # where the TSS says where in it the I/O permission bitmap begins


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


def bitmap_allows(memory: GuestMemory, system: SystemRegisters, port: int, size: int) -> bool:
    """Whether the TSS lets code above IOPL use `port` (SDM vol. 1, 19.5.2)."""
    task = system.tr
    if task.type & _TSS_32_BIT != _TSS_32_BIT or not task.present:
        return False  # a 16-bit TSS has no bitmap
    start = read_linear(memory, system, task.base + _TSS_BITMAP_AT, 2)
    at = int.from_bytes(start, "little") + port // 8
    # Two bytes are read always, so the last one must be within the limit, too.
    if len(start) < 2 or task.limit < _TSS_BITMAP_AT + 1 or at + 1 > task.limit:
        return False
    bits = read_linear(memory, system, task.base + at, 2)
    wanted = (1 << size) - 1 << port % 8
    return len(bits) == 2 and not int.from_bytes(bits, "little") & wanted
