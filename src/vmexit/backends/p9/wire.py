"""Messages of 9P as bytes: numbers are little-endian, a text has its length in front."""

import errno
import struct

_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_HEADER = struct.Struct("<IBH")  # size of the message, type, tag
HEADER_SIZE = _HEADER.size


class Reader:
    """Takes one value after the other. Raises OSError (EINVAL) behind the end."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._at = 0

    def _take(self, form: struct.Struct) -> int:
        at = self._at
        if at + form.size > len(self._message):
            raise OSError(errno.EINVAL, "a message ends early")
        self._at = at + form.size
        value: int = form.unpack_from(self._message, at)[0]
        return value

    def u8(self) -> int:
        return self.data(1)[0]

    def u16(self) -> int:
        return self._take(_U16)

    def u32(self) -> int:
        return self._take(_U32)

    def u64(self) -> int:
        return self._take(_U64)

    def i64(self) -> int:
        value = self._take(_U64)
        return value - (1 << 64) if value >> 63 else value

    def data(self, size: int) -> memoryview:
        """The next so many bytes."""
        at = self._at
        if at + size > len(self._message):
            raise OSError(errno.EINVAL, "a message ends early")
        self._at = at + size
        return memoryview(self._message)[at : at + size]

    def text(self) -> bytes:
        return bytes(self.data(self.u16()))


def text(value: bytes) -> bytes:
    return _U16.pack(len(value)) + value


def u16(value: int) -> bytes:
    return _U16.pack(value)


def u32(value: int) -> bytes:
    return _U32.pack(value)


def message(kind: int, tag: int, body: bytes) -> bytes:
    return _HEADER.pack(HEADER_SIZE + len(body), kind, tag) + body
