"""The header of a packet between the sockets of guest and host (virtio 5.10.6)."""

import struct
from typing import NamedTuple

_HEADER = struct.Struct("<QQIIIHHIII")

SIZE = _HEADER.size


class Packet(NamedTuple):
    """A header; `size` bytes of payload follow it."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    size: int
    type: int
    op: int
    flags: int = 0
    buf_alloc: int = 0
    """Bytes that the sender has room for in all; what it has not yet handed on takes of it."""
    fwd_cnt: int = 0
    """Bytes that the sender has handed on since the beginning, modulo 2**32 (5.10.6.3)."""

    @classmethod
    def unpack(cls, data: bytes) -> "Packet":
        """From its `SIZE` bytes."""
        return cls._make(_HEADER.unpack(data))

    def pack(self) -> bytes:
        """As it is in memory."""
        return _HEADER.pack(*self)

    def answer(self, op: int) -> "Packet":
        """One without payload, for who has sent this one."""
        return Packet(self.dst_cid, self.src_cid, self.dst_port, self.src_port, 0, self.type, op)
