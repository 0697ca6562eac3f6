"""A disk whose writes go to another file: its image stays as it is, and may be used by others.

The file of an overlay (`Format` below; all numbers are little-endian):

- a header of 512 bytes: magic, version, size of a block and of the disk in bytes, a digest that
  tells the image, zeros, and the CRC-32 of all that. It is written once;
- from 4096 on the map: a bit for each block, set when the block is in the file, 4064 to a sector of
  512 bytes, which ends with its CRC-32. So a sector is whole, or as it was;
- from the next multiple of 64 KiB on the blocks, each at its place, with holes for those that are
  not there.

A block that is not in the map is read from the image, whatever is at its place in the file. Bits
are written when the guest flushes, after the data has reached stable storage: until then, what was
new can be lost, and nothing else.
"""

import errno
import hashlib
import os
import stat
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from vmexit.backends import transfer
from vmexit.backends.block_map import BlockMap
from vmexit.backends.disk import OVERLAY_MAGIC, lock
from vmexit.core.disk_image import DiskImage
from vmexit.core.errors import ConfigError, HostError, shown
from vmexit.core.holes import try_hole
from vmexit.core.memory_image import stretches

_VERSION = 1
_HEADER = struct.Struct("<8sIIQ32s")  # magic, version, block size, size of the disk, digest
_HEADER_SIZE = 512
_MAP_AT = 4096
_DATA_ALIGNMENT = 1 << 16

# A page of the guest, as most file systems write: then there is nothing to copy when a block is
# written for the first time, and a hole frees all of it. Larger for a disk beyond 1 TiB, so that
# the map has 32 MiB at most.
_BLOCK = 4096
_MOST_BLOCKS = 1 << 28
_LARGEST_BLOCK = 1 << 24

# The image is told by so many parts of it, from its beginning to its end.
_PIECE = 1 << 20
_SAMPLES, _SAMPLE = 16, 1 << 16


class Base(Protocol):
    """The image, which is only read."""

    @property
    def size(self) -> int: ...

    def read_into(self, views: Sequence[memoryview], offset: int) -> None: ...


class Format(NamedTuple):
    """What the header says."""

    block_size: int
    size: int
    digest: bytes

    @classmethod
    def of(cls, base: Base) -> "Format":
        """For a new overlay of `base`. Raises OSError."""
        block = _BLOCK
        while -(-base.size // block) > _MOST_BLOCKS:
            block *= 2
        return cls(block, base.size, _digest(base))

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)

    def pack(self) -> bytes:
        """The header."""
        data = _HEADER.pack(OVERLAY_MAGIC, _VERSION, *self).ljust(_HEADER_SIZE - 4, b"\0")
        return data + zlib.crc32(data).to_bytes(4, "little")

    @classmethod
    def parse(cls, data: bytes, path: str) -> "Format":
        """Raises ConfigError."""
        if not data.startswith(OVERLAY_MAGIC):
            raise ConfigError(
                f"{shown(path)} is no overlay of vmexit; use another path, where one is made"
            )
        version = int.from_bytes(data[8:12], "little")
        if len(data) == _HEADER_SIZE and version > _VERSION:
            raise ConfigError(
                f"the overlay {shown(path)} has version {version}, and this vmexit knows "
                f"{_VERSION}; use a newer vmexit"
            )
        _, _, block, size, digest = _HEADER.unpack_from(data.ljust(_HEADER_SIZE, b"\0"))
        format_ = cls(block, size, digest)
        if (
            not _BLOCK <= block <= _LARGEST_BLOCK
            or block & block - 1
            or not 0 < format_.blocks <= _MOST_BLOCKS
            or data != format_.pack()
        ):
            raise _damaged(path, "its header")
        return format_


def _damaged(path: str, what: str) -> ConfigError:
    return ConfigError(
        f"the overlay {shown(path)} is damaged: {what} is not what was written; "
        "use a copy of it, or remove it and begin anew"
    )


def _digest(base: Base) -> bytes:
    digest = hashlib.sha256()
    size = min(base.size, _SAMPLE)
    data = bytearray(size)
    for number in range(_SAMPLES):
        base.read_into([memoryview(data)], (base.size - size) * number // (_SAMPLES - 1))
        digest.update(data)
    return digest.digest()


class Overlay:
    """`vmexit.devices.virtio.blk.DiskBackend`. The caller makes one call at a time."""

    readonly = False

    def __init__(self, base: Base, path: str = "") -> None:
        """Goes on with the file at `path`, or makes it; without one, all is gone in the end.

        Raises ConfigError.
        """
        self._base = base
        self._path = path
        try:
            self._format = Format.of(base)
            self._blocks = BlockMap(self._format.blocks)
            self._data_at = 0
            self._fd = self._open(path) if path else self._temporary()
        except OSError as error:
            what = f"the overlay {shown(path)}" if path else "a temporary file for the disk"
            remedy = "use another path" if path else "set TMPDIR to another folder"
            raise ConfigError(f"cannot use {what}: {error.strerror}; {remedy}") from error
        except ValueError as error:
            raise ConfigError(f"{shown(path)} cannot be a file; use another path") from error
        self.size = base.size
        self.block_size = min(self._format.block_size, 1 << 16)

    # The file.

    def _temporary(self) -> int:
        with tempfile.TemporaryFile() as file:
            os.truncate(file.fileno(), self._base.size)
            return os.dup(file.fileno())

    def _open(self, path: str) -> int:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return self._make(path)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{shown(path)} is no file; use another path for the overlay")
            found = Format.parse(os.pread(fd, _HEADER_SIZE, 0), path)
            lock(fd, path, exclusive=True)
            if found != self._format._replace(block_size=found.block_size):
                raise ConfigError(
                    f"the overlay {shown(path)} was made for another disk, or the disk's image has "
                    "changed since; use the image as it was, or another overlay"
                )
            self._lay_out(found)
            size = self._data_at + found.size
            if status.st_size != size:
                raise _damaged(path, f"its length ({status.st_size} bytes in place of {size})")
            if not self._blocks.load(os.pread(fd, self._blocks.size, _MAP_AT)):
                raise _damaged(path, "its map")
        except (OSError, ConfigError):
            os.close(fd)
            raise
        return fd

    def _lay_out(self, found: Format) -> None:
        self._format = found
        self._blocks = BlockMap(found.blocks)
        self._data_at = -(-(_MAP_AT + self._blocks.size) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT

    def _make(self, path: str) -> int:
        """A new one appears whole at `path`, or not at all."""
        self._lay_out(self._format)
        folder, name = os.path.split(path)
        fd, made = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
        try:
            os.truncate(fd, self._data_at + self._base.size)
            head = self._format.pack().ljust(_MAP_AT, b"\0") + self._blocks.all()
            transfer.write_from(fd, [memoryview(head)], 0)
            lock(fd, path, exclusive=True)
            os.fsync(fd)
            os.link(made, path)
            Path(made).unlink()
            folder_fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder_fd)
            finally:
                os.close(folder_fd)
        except (OSError, ConfigError):
            Path(made).unlink(missing_ok=True)
            os.close(fd)
            raise
        return fd

    # Requests.

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        rest = transfer.Cursor(views)
        block, end = self._format.block_size, offset + rest.left
        for there, _, stop in self._blocks.runs(offset // block, -(-end // block)):
            size = min(stop * block, end) - offset
            if there:
                transfer.read_into(self._fd, rest.take(size), self._data_at + offset)
            else:
                self._base.read_into(rest.take(size), offset)
            offset += size

    def write_from(self, views: Sequence[memoryview], offset: int) -> None:
        first, end = self._prepare(offset, sum(map(len, views)))
        transfer.write_from(self._fd, views, self._data_at + offset)
        self._blocks.add(first, end)

    def _prepare(self, offset: int, size: int) -> tuple[int, int]:
        """Blocks of which only a part is about to change are copied; which blocks it touches."""
        block, end = self._format.block_size, offset + size
        first, last = offset // block, (end - 1) // block
        if offset % block:
            self._copy(first)
        if end % block and end != self.size:
            self._copy(last)
        return first, last + 1

    def _copy(self, number: int) -> None:
        if number in self._blocks:
            return
        offset = number * self._format.block_size
        data = memoryview(bytearray(min(self._format.block_size, self.size - offset)))
        self._base.read_into([data], offset)
        transfer.write_from(self._fd, [data], self._data_at + offset)
        self._blocks.add(number, number + 1)

    def flush(self) -> None:
        if not self._path:
            return
        os.fdatasync(self._fd)
        changed = False
        for offset, sector in self._blocks.unsaved():
            transfer.write_from(self._fd, [memoryview(sector)], _MAP_AT + offset)
            changed = True
        if changed:
            os.fdatasync(self._fd)
            self._blocks.saved()

    # Snapshots.

    def capture(self) -> DiskImage:
        """What was written so far, in a file of its own that the caller closes.

        For an overlay that is forgotten in the end. Raises HostError.
        """
        assert not self._path
        try:
            fd = self._temporary()
            try:
                _copy_data(self._fd, fd, self.size)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise HostError(
                f"cannot copy what was written to the disk: {error.strerror}; free some room"
            ) from error
        return DiskImage(fd, self._blocks.all(), self._format.digest)

    def restore(self, written: DiskImage) -> None:
        """Nothing else was written. Raises ConfigError for another disk's; HostError."""
        blocks = BlockMap(self._format.blocks)
        same = written.digest == self._format.digest
        if not same or os.fstat(written.fd).st_size != self.size or not blocks.load(written.blocks):
            raise ConfigError(
                "what the guest has written was to another disk, or the disk's image has changed "
                "since; use the image as it was"
            )
        self._become(blocks, written)

    def forget(self) -> None:
        """Nothing was written. For an overlay that is forgotten in the end. Raises HostError."""
        self._become(BlockMap(self._format.blocks), None)

    def _become(self, blocks: BlockMap, written: DiskImage | None) -> None:
        try:
            os.truncate(self._fd, 0)
            os.truncate(self._fd, self.size)
            if written is not None:
                _copy_data(written.fd, self._fd, self.size)
        except OSError as error:
            raise HostError(
                f"cannot write the disk's temporary file: {error.strerror}; free some room"
            ) from error
        self._blocks = blocks

    def discard(self, offset: int, size: int) -> None:
        """Whole blocks of it read as zeros then, and take no room."""
        block, end = self._format.block_size, offset + size
        first = -(-offset // block)
        last = self._format.blocks if end == self.size else end // block
        if first >= last:
            return
        start = first * block
        if try_hole(self._fd, self._data_at + start, min(last * block, self.size) - start):
            self._blocks.add(first, last)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        if not size:
            return
        first, end = self._prepare(offset, size)

        def write(views: Sequence[memoryview], at: int) -> None:
            transfer.write_from(self._fd, views, at)

        transfer.write_zeroes(self._fd, self._data_at + offset, size, write, unmap=unmap)
        self._blocks.add(first, end)

    def close(self) -> None:
        """Raises HostError where what the guest has not flushed cannot be kept."""
        try:
            self.flush()
        except OSError as error:
            why = os.strerror(error.errno or errno.EIO)
            raise HostError(
                f"cannot write the overlay {shown(self._path)}: {why}; what was not flushed is lost"
            ) from error
        finally:
            os.close(self._fd)


def _copy_data(source: int, to: int, size: int) -> None:
    """All but holes, from one new file to another. Raises OSError."""
    for first, end in stretches(source, 0, size):
        at = first
        while at < end:
            data = os.pread(source, min(_PIECE, end - at), at)
            if not data:
                raise OSError(errno.EIO, "the file ends early")
            transfer.write_from(to, [memoryview(data)], at)
            at += len(data)
