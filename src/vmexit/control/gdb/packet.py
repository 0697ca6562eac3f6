"""Packets of gdb's remote protocol: `$data#checksum` in a stream (GDB manual, E.1)."""

from collections.abc import Iterator
from enum import Enum

MOST = 0x4000
"""Bytes of a packet's data, escapes included; gdb is told and keeps to it."""

_ESCAPE, _FLIP = ord("}"), 0x20
_SPECIAL = frozenset(b"#$}*")
_INTERRUPT = 0x03


class Signal(Enum):
    """What stands between packets."""

    INTERRUPT = "interrupt"  # the user wants the guest to stop
    AGAIN = "again"  # the other end has not understood the last packet
    GARBLED = "garbled"  # a packet that we have not understood


class PacketReader:
    """Finds packets in what arrives; whatever is sent, it keeps no more than one packet."""

    def __init__(self) -> None:
        self._data: bytearray | None = None  # of the packet under way
        self._too_long = False
        self._checksum: bytearray | None = None

    def feed(self, received: bytes) -> Iterator[bytes | Signal]:
        """The packets' data, unescaped, and what comes between, that end in `received`."""
        at = 0
        while at < len(received):
            if self._checksum is not None:
                self._checksum.append(received[at])
                at += 1
                if len(self._checksum) == 2:
                    yield self._finish()
            elif self._data is not None:
                at = self._gather(received, at)
            else:
                byte = received[at]
                at += 1
                if byte == ord("$"):
                    self._data, self._too_long = bytearray(), False
                elif byte == _INTERRUPT:
                    yield Signal.INTERRUPT
                elif byte == ord("-"):
                    yield Signal.AGAIN

    def _gather(self, received: bytes, at: int) -> int:
        """Take what belongs to the packet's data; returns where it ends."""
        assert self._data is not None
        end = received.find(b"#", at)
        stop = len(received) if end < 0 else end
        begun = received.rfind(b"$", at, stop)  # the end of the last one was lost
        if begun >= 0:
            self._data, self._too_long, at = bytearray(), False, begun + 1
        if len(self._data) + stop - at > MOST:
            self._too_long = True
            self._data.clear()
        elif not self._too_long:
            self._data += received[at:stop]
        if end >= 0:
            self._checksum = bytearray()
            return end + 1
        return stop

    def _finish(self) -> bytes | Signal:
        assert self._data is not None and self._checksum is not None
        data, digits, too_long = bytes(self._data), bytes(self._checksum), self._too_long
        self._data = self._checksum = None
        try:
            right = int(digits.decode("ascii"), 16) == sum(data) & 0xFF
        except (UnicodeDecodeError, ValueError):
            right = False
        return unescape(data) if right and not too_long else Signal.GARBLED


def unescape(data: bytes) -> bytes:
    """Undo the escapes of binary data."""
    if _ESCAPE not in data:
        return data
    plain = bytearray()
    bytes_ = iter(data)
    for byte in bytes_:
        plain.append(byte if byte != _ESCAPE else next(bytes_, 0) ^ _FLIP)
    return bytes(plain)


def packet(data: bytes) -> bytes:
    """`data` as a packet to send."""
    if not _SPECIAL.isdisjoint(data):
        escaped = bytearray()
        for byte in data:
            escaped += bytes((_ESCAPE, byte ^ _FLIP)) if byte in _SPECIAL else bytes((byte,))
        data = bytes(escaped)
    return b"$%s#%02x" % (data, sum(data) & 0xFF)
