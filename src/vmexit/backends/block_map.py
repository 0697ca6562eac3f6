"""Which blocks of a disk are there: a bit for each, kept in checked sectors of a file."""

import zlib
from collections.abc import Iterator

SECTOR = 512
"""What a disk writes as a whole or not at all."""

_BYTES = SECTOR - 4  # of bits in a sector; the CRC-32 of them follows
_BITS = 8 * _BYTES
_STEP = 64  # bytes that are looked at as one number
_ALL = (1 << 8 * _STEP) - 1


class BlockMap:
    """Bits are set, and never cleared: so it may be saved in part at any time."""

    def __init__(self, blocks: int) -> None:
        self._bits = bytearray(-(-blocks // _BITS) * _BYTES)
        self._changed = bytearray(len(self._bits) // _BYTES)  # a byte for each sector

    @property
    def size(self) -> int:
        """Bytes of all sectors."""
        return len(self._changed) * SECTOR

    def __contains__(self, block: int) -> bool:
        return bool(self._bits[block >> 3] >> (block & 7) & 1)

    def add(self, first: int, end: int) -> None:
        """The blocks from `first` to before `end` are there from now on."""
        for there, start, stop in list(self.runs(first, end)):
            if not there:
                self._set(start, stop)
                sectors = range(start // _BITS, (stop - 1) // _BITS + 1)
                self._changed[sectors.start : sectors.stop] = b"\1" * len(sectors)

    def _set(self, first: int, end: int) -> None:
        start, stop = first >> 3, end >> 3
        if start == stop:
            self._bits[start] |= (1 << end - first) - 1 << (first & 7)
            return
        self._bits[start] |= 0xFF << (first & 7) & 0xFF
        self._bits[start + 1 : stop] = b"\xff" * (stop - start - 1)
        if end & 7:
            self._bits[stop] |= (1 << (end & 7)) - 1

    def runs(self, first: int, end: int) -> Iterator[tuple[bool, int, int]]:
        """The blocks from `first` to before `end`, as runs of those there and those not there."""
        while first < end:
            there = first in self
            stop = self._run_end(first, end, there)
            yield there, first, stop
            first = stop

    def _run_end(self, at: int, end: int, there: bool) -> int:
        while at < end:
            byte, bit = at >> 3, at & 7
            word = int.from_bytes(self._bits[byte : byte + _STEP], "little")
            other = (word ^ _ALL if there else word) >> bit
            if other:
                return min(end, at + (other & -other).bit_length() - 1)
            at = byte + _STEP << 3
        return end

    # The file.

    def unsaved(self) -> Iterator[tuple[int, bytes]]:
        """Offset and content of each sector with bits that are new since `saved()`."""
        number = -1
        while (number := self._changed.find(1, number + 1)) >= 0:
            yield number * SECTOR, self._sector(number)

    def saved(self) -> None:
        """What `unsaved()` has given is on stable storage."""
        self._changed = bytearray(len(self._changed))

    def all(self) -> bytes:
        """All sectors."""
        return b"".join(map(self._sector, range(len(self._changed))))

    def _sector(self, number: int) -> bytes:
        bits = bytes(self._bits[number * _BYTES : (number + 1) * _BYTES])
        return bits + zlib.crc32(bits).to_bytes(4, "little")

    def load(self, data: bytes) -> bool:
        """Take over what `all()` gave; False for what it did not give."""
        if len(data) != self.size:
            return False
        for number in range(len(self._changed)):
            sector = data[number * SECTOR : (number + 1) * SECTOR]
            bits = sector[:_BYTES]
            if zlib.crc32(bits).to_bytes(4, "little") != sector[_BYTES:]:
                return False
            self._bits[number * _BYTES : (number + 1) * _BYTES] = bits
        return True
