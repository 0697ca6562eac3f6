"""Disks as files: raw images and block devices."""

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from functools import cache

from vmexit.core.errors import ConfigError, shown

_SECTOR = 512
_ZEROS = bytes(1 << 20)
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE, _FALLOC_ZERO_RANGE = 0x01, 0x02, 0x10  # linux/falloc.h
_NOT_POSSIBLE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
# Other formats, by their first bytes.
_FORMATS = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"conectix": "vpc"}
_IOV_MAX = os.sysconf("SC_IOV_MAX")


class Disk:
    """A raw image or a block device, `vmexit.devices.virtio.blk.DiskBackend`.

    While it is open, another vmexit or QEMU cannot open it to write.
    """

    def __init__(self, path: str, *, readonly: bool = False, probe: bool = True) -> None:
        """Raises ConfigError for what is no disk, or is in use; with `probe`, for an image of
        another format, which would be ruined.
        """
        self.readonly = readonly
        flags = os.O_RDONLY if readonly else os.O_RDWR
        try:
            self._fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "a path has no NUL in it"
            remedy = "use another path"
            if getattr(error, "errno", 0) in (errno.EACCES, errno.EROFS, errno.EPERM):
                remedy = "use another path, or readonly=on" if not readonly else "see its rights"
            elif getattr(error, "errno", 0) == errno.ENOENT:
                remedy = f"make one: truncate -s 1G {shown(path)}"
            raise ConfigError(f"cannot open the disk {shown(path)}: {why}; {remedy}") from error
        try:
            self.size, self.block_size = self._measure(path)
            if probe:
                self._check_format(path)
            self._lock(path)
        except ConfigError:
            os.close(self._fd)
            raise

    def _measure(self, path: str) -> tuple[int, int]:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise ConfigError(
                f"{shown(path)} is neither a file nor a block device; give the disk's image"
            )
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if not size and stat.S_ISBLK(status.st_mode):
            raise ConfigError(f"the disk {shown(path)} has no medium; give one that has")
        if size % _SECTOR:
            raise ConfigError(
                f"the disk {shown(path)} has {size} bytes, which are no whole sectors; "
                f"use truncate -s %{_SECTOR} {shown(path)}"
            )
        if not size:
            raise ConfigError(
                f"the disk {shown(path)} has no bytes; use truncate -s 1G {shown(path)}"
            )
        block = min(max(status.st_blksize, _SECTOR), 1 << 16)
        return size, block if block & block - 1 == 0 else _SECTOR

    def _check_format(self, path: str) -> None:
        start = os.pread(self._fd, 8, 0)
        for magic, name in _FORMATS.items():
            if start.startswith(magic):
                raise ConfigError(
                    f"the disk {shown(path)} looks like a {name} image; say format={name}, or "
                    "format=raw if it is none"
                )

    def _lock(self, path: str) -> None:
        kind = fcntl.LOCK_SH if self.readonly else fcntl.LOCK_EX
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"the disk {shown(path)} is in use, by another machine or as another drive of "
                "this one; end that, or give both readonly=on"
            ) from error
        except OSError as error:  # a file system without locks
            if error.errno not in (*_NOT_POSSIBLE, errno.ENOLCK):
                raise ConfigError(f"cannot lock {shown(path)}: {error.strerror}") from error

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        for part in _parts(views):
            offset += _all(os.preadv, self._fd, part, offset)

    def write_from(self, views: Sequence[memoryview], offset: int) -> None:
        for part in _parts(views):
            offset += _all(os.pwritev, self._fd, part, offset)

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def discard(self, offset: int, size: int) -> None:
        try:
            _fallocate(self._fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, size)
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        mode = _FALLOC_PUNCH_HOLE if unmap else _FALLOC_ZERO_RANGE
        try:
            _fallocate(self._fd, mode | _FALLOC_KEEP_SIZE, offset, size)
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise
            end = offset + size
            while offset < end:
                zeros = memoryview(_ZEROS)[: end - offset]
                self.write_from([zeros], offset)
                offset += len(zeros)

    def close(self) -> None:
        os.close(self._fd)


def _parts(views: Sequence[memoryview]) -> list[list[memoryview]]:
    """As many at a time as one system call takes."""
    return [list(views[i : i + _IOV_MAX]) for i in range(0, len(views), _IOV_MAX)]


def _all(call, fd: int, views: list[memoryview], offset: int) -> int:  # type: ignore[no-untyped-def]
    """Transfer all bytes of `views`; how many. Raises OSError, and where the file is too short."""
    total = 0
    while views:
        done = call(fd, views, offset + total)
        if not done:
            raise OSError(errno.EIO, "the disk's file ends early")
        total += done
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if done:
            views[0] = views[0][done:]
    return total


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2), which Python has only without modes."""
    if size and _libc().fallocate(fd, mode, offset, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
