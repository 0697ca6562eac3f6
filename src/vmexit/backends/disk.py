"""Disks as files: raw images and block devices."""

import errno
import fcntl
import os
import stat
from collections.abc import Sequence

from vmexit.backends import transfer
from vmexit.core.errors import ConfigError, shown
from vmexit.core.holes import NOT_POSSIBLE, try_hole

_SECTOR = 512
OVERLAY_MAGIC = b"VMEXITOV"  # see backends/overlay.py
# Other formats, by their first bytes.
_FORMATS = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"conectix": "vpc"}


def lock(fd: int, path: str, *, exclusive: bool) -> None:
    """Keep the file at `path` for us. Raises ConfigError where somebody else has it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"the disk {shown(path)} is in use, by another machine or as another drive of "
            "this one; end that, or give both readonly=on or snapshot=on"
        ) from error
    except OSError as error:  # a file system without locks
        if error.errno not in (*NOT_POSSIBLE, errno.ENOLCK):
            raise ConfigError(f"cannot lock {shown(path)}: {error.strerror}") from error


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
            lock(self._fd, path, exclusive=not readonly)
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
        if start.startswith(OVERLAY_MAGIC):
            raise ConfigError(
                f"the disk {shown(path)} is an overlay of vmexit; use it with its image: "
                f"file=IMAGE,overlay={shown(path)}"
            )
        for magic, name in _FORMATS.items():
            if start.startswith(magic):
                raise ConfigError(
                    f"the disk {shown(path)} looks like a {name} image; say format={name}, or "
                    "format=raw if it is none"
                )

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        transfer.read_into(self._fd, views, offset)

    def write_from(self, views: Sequence[memoryview], offset: int) -> None:
        transfer.write_from(self._fd, views, offset)

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def discard(self, offset: int, size: int) -> None:
        try_hole(self._fd, offset, size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        transfer.write_zeroes(self._fd, offset, size, self.write_from, unmap=unmap)

    def close(self) -> None:
        os.close(self._fd)
