"""The block device (virtio 5.2): a disk in sectors of 512 bytes."""

import struct
from collections.abc import Sequence
from typing import Protocol

from vmexit.abi import virtio as v
from vmexit.core.bus import State
from vmexit.core.errors import ConfigError
from vmexit.core.rate import Limit
from vmexit.core.saved import Saved
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.flow import Flow
from vmexit.devices.virtio.queue import Chain, QueueError, without_first

_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_RANGE = struct.Struct("<QII")  # sector, number of sectors, flags: discard and write zeroes
# Capacity, size_max, seg_max, geometry, blk_size, topology, writeback, num_queues, discard (three),
# write zeroes (two), write_zeroes_may_unmap (5.2.4)
_CONFIG = struct.Struct("<QII4xIBBHIBxHIIIIIB3x")

CONFIG_SIZE = _CONFIG.size
# Features of disks whose requests are served by others.
PASSED_ON = sum(
    1 << bit
    for bit in (
        v.BLK_F_SIZE_MAX, v.BLK_F_SEG_MAX, v.BLK_F_RO, v.BLK_F_BLK_SIZE, v.BLK_F_FLUSH,
        v.BLK_F_TOPOLOGY, v.BLK_F_MQ, v.BLK_F_DISCARD, v.BLK_F_WRITE_ZEROES,
    )
)  # fmt: skip

QUEUE_SIZE = 256
MOST_QUEUES = 16
# Segments of data in a request: the chain has a header and a status, too.
_SEG_MAX = QUEUE_SIZE - 2
# So much is discarded or zeroed at a time, at most.
_MAX_RANGE = 1 << 19  # sectors: 256 MiB
_STATUS = 1
# Bytes of one request: 1 MiB for each segment. Buffers may name the same memory many times.
_MOST = _SEG_MAX << 20


class DiskBackend(Protocol):
    """The host side of a disk. Each call may raise OSError, and none calls the device."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def readonly(self) -> bool: ...

    @property
    def block_size(self) -> int:
        """Bytes in which it is best read and written; a power of two of at least 512."""
        ...

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` with what is at `offset`."""
        ...

    def write_from(self, views: Sequence[memoryview], offset: int) -> None: ...

    def flush(self) -> None:
        """What was written is on stable storage after this."""
        ...

    def discard(self, offset: int, size: int) -> None:
        """What is there does not matter any more."""
        ...

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """It reads as zeros now; `unmap` allows to free its storage."""
        ...


class DiskFlows:
    """What a disk has done, by kind, with the bytes that were meant."""

    def __init__(self) -> None:
        self._kinds = {
            v.BLK_T_IN: Flow("read"),
            v.BLK_T_OUT: Flow("write"),
            v.BLK_T_FLUSH: Flow("flush"),
            v.BLK_T_DISCARD: Flow("discard"),
            v.BLK_T_WRITE_ZEROES: Flow("write_zeroes"),
        }
        self.all = tuple(self._kinds.values())

    def count(self, kind: int, size: int) -> None:
        """A request of this kind is done, for `size` bytes."""
        flow = self._kinds.get(kind)
        if flow is not None:
            flow.count(size)

    def count_request(self, chain: Chain) -> None:
        """Likewise for one that others serve, which is counted as it is passed on to them."""
        data = chain.read(_HEADER.size + _RANGE.size)
        if len(data) < _HEADER.size:
            return
        kind = _HEADER.unpack_from(data)[0]
        size = sum(size for _, size in chain.sources) - _HEADER.size
        if kind == v.BLK_T_IN:
            size = max(chain.writable_size() - _STATUS, 0)
        elif kind in (v.BLK_T_DISCARD, v.BLK_T_WRITE_ZEROES):
            ranged = len(data) == _HEADER.size + _RANGE.size
            size = _RANGE.unpack_from(data, _HEADER.size)[1] * v.SECTOR_SIZE if ranged else 0
        self.count(kind, size)


class Blk(VirtioDevice):
    """Queues of requests, each of which is done before the next one is looked at."""

    device_id = v.BLOCK
    waits = True

    def __init__(
        self, disk: DiskBackend, serial: str = "", queues: int = 1, limit: Limit | None = None
    ) -> None:
        """`serial` is what the guest sees as the disk's serial number: at most 20 bytes count.

        `limit` is for all queues together.
        """
        self._disk = disk
        self.limit = limit
        counts = DiskFlows()
        self._count, self.flows = counts.count, counts.all
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self._id = serial.encode()[: v.BLK_ID_SIZE].ljust(v.BLK_ID_SIZE, b"\0")
        bits = [v.BLK_F_SEG_MAX, v.BLK_F_BLK_SIZE, v.BLK_F_TOPOLOGY, v.BLK_F_FLUSH]
        bits += [v.BLK_F_RO] if disk.readonly else [v.BLK_F_DISCARD, v.BLK_F_WRITE_ZEROES]
        bits += [v.BLK_F_MQ] if queues > 1 else []
        self.features = sum(1 << bit for bit in bits)
        physical = (disk.block_size // v.SECTOR_SIZE).bit_length() - 1
        self._config = _CONFIG.pack(
            disk.size // v.SECTOR_SIZE, 0, _SEG_MAX, v.SECTOR_SIZE,
            physical, 0, disk.block_size // v.SECTOR_SIZE, 0, 0, queues,
            _MAX_RANGE, 1, disk.block_size // v.SECTOR_SIZE, _MAX_RANGE, 1, 1,
        )  # fmt: skip

    def config(self) -> bytes:
        return self._config

    def state(self) -> State:
        return {"version": 1, "capacity": self._disk.size}

    def require_fits(self, state: State) -> None:
        size = Saved(state, "a disk", 1).number("capacity", (1 << 64) - 1)
        if size != self._disk.size:
            raise ConfigError(
                f"it has {self._disk.size} bytes, and had {size} at the snapshot; use a disk of "
                "that size"
            )

    def notify(self, index: int) -> None:
        self.queues[index].serve(self._serve)

    def _serve(self, chain: Chain) -> int:
        """Do what is asked, put the status behind it; the number of bytes written."""
        if not chain.writable:
            raise QueueError("a request to a disk has no room for its status")
        header = chain.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise QueueError("a request to a disk has no header")
        kind, _, sector = _HEADER.unpack(header)
        data = _without_last_byte(chain.writable)
        size = chain.writable_size() - _STATUS
        try:
            status = self._do(kind, sector, chain, data, size)
        except OSError:
            status = v.BLK_S_IOERR
        chain.writable[-1][-1] = status
        return size + _STATUS

    def _do(self, kind: int, sector: int, chain: Chain, data: list[memoryview], size: int) -> int:
        """The status of a request."""
        disk = self._disk
        if kind == v.BLK_T_IN:
            if not self._readable(sector, size):
                return v.BLK_S_IOERR
            disk.read_into(data, sector * v.SECTOR_SIZE)
            self._count(kind, size)
        elif kind == v.BLK_T_GET_ID:
            if size < v.BLK_ID_SIZE:
                return v.BLK_S_IOERR
            chain.write(self._id)
        elif kind == v.BLK_T_FLUSH:
            if not disk.readonly:
                disk.flush()
            self._count(kind, 0)
        elif kind == v.BLK_T_OUT:
            source = without_first(chain.readable, _HEADER.size)
            length = sum(map(len, source))
            if disk.readonly or not self._readable(sector, length):
                return v.BLK_S_IOERR
            disk.write_from(source, sector * v.SECTOR_SIZE)
            self._count(kind, length)
        elif kind in (v.BLK_T_DISCARD, v.BLK_T_WRITE_ZEROES):
            return self._clear(kind, chain.read(_HEADER.size + _RANGE.size + 1)[_HEADER.size :])
        else:
            return v.BLK_S_UNSUPP
        return v.BLK_S_OK

    def _clear(self, kind: int, data: bytes) -> int:
        """Discard or zero one range (5.2.6)."""
        disk = self._disk
        if len(data) != _RANGE.size or disk.readonly:
            return v.BLK_S_IOERR
        sector, count, flags = _RANGE.unpack(data)
        unmap = bool(flags & v.BLK_WRITE_ZEROES_F_UNMAP)
        if flags & ~v.BLK_WRITE_ZEROES_F_UNMAP or (unmap and kind == v.BLK_T_DISCARD):
            return v.BLK_S_UNSUPP
        offset, size = sector * v.SECTOR_SIZE, count * v.SECTOR_SIZE
        if count > _MAX_RANGE or not self._within(sector, size):
            return v.BLK_S_IOERR
        if kind == v.BLK_T_DISCARD:
            disk.discard(offset, size)
        else:
            disk.write_zeroes(offset, size, unmap=unmap)
        self._count(kind, size)
        return v.BLK_S_OK

    def _within(self, sector: int, size: int) -> bool:
        """Whether whole sectors of the disk are meant."""
        end = sector * v.SECTOR_SIZE + size
        return size % v.SECTOR_SIZE == 0 and end <= self._disk.size

    def _readable(self, sector: int, size: int) -> bool:
        """Likewise, and not so many that the host would be busy with it for long."""
        return size <= _MOST and self._within(sector, size)


def _without_last_byte(views: list[memoryview]) -> list[memoryview]:
    last = views[-1][:-_STATUS]
    return [*views[:-1], last] if len(last) else views[:-1]
