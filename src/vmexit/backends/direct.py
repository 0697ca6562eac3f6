"""Disks that are read and written past the host's page cache (O_DIRECT, open(2))."""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

from vmexit.backends import transfer
from vmexit.backends.disk import Disk
from vmexit.core.errors import ConfigError, shown

_ALIGNMENTS = (512, 4096)
_BOUNCE = 1 << 20


class DirectDisk(Disk):
    """Offsets, sizes and addresses must be aligned then: what is not goes through a buffer.

    The caller makes one call at a time: a part of a block is read, changed and written.
    """

    def __init__(self, path: str, *, readonly: bool = False, probe: bool = True) -> None:
        """Raises ConfigError, also where the file system has no direct I/O."""
        super().__init__(path, readonly=readonly, probe=probe)
        # The mapping is aligned to a page. Python frees it once nobody has a view of it.
        self._bounce = memoryview(mmap.mmap(-1, _BOUNCE))
        try:
            self._alignment = self._go_direct(path)
            if self.size % self._alignment:
                raise ConfigError(
                    f"the disk {shown(path)} has {self.size} bytes, and direct=on needs whole "
                    f"blocks of {self._alignment} here; use truncate -s %{self._alignment} "
                    f"{shown(path)}"
                )
        except ConfigError:
            self.close()
            raise
        self.block_size = max(self.block_size, self._alignment)

    def _go_direct(self, path: str) -> int:
        """The alignment that is needed from now on."""
        try:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            for alignment in _ALIGNMENTS:
                try:
                    # An address that is aligned no better than that.
                    os.preadv(self._fd, [self._bounce[alignment : 2 * alignment]], 0)
                except OSError as error:
                    if error.errno != errno.EINVAL or alignment == _ALIGNMENTS[-1]:
                        raise
                else:
                    return alignment
        except OSError as error:
            raise ConfigError(
                f"the file system of {shown(path)} has no direct I/O ({error.strerror}); leave out "
                "direct=on, or put the disk elsewhere"
            ) from error
        raise AssertionError

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        if self._aligned(views, offset):
            super().read_into(views, offset)
            return
        rest = transfer.Cursor(views)
        while rest.left:
            buffer, start, size = self._window(offset, rest.left)
            super().read_into([buffer], offset - start)
            rest.fill(buffer[start : start + size])
            offset += size

    def write_from(self, views: Sequence[memoryview], offset: int) -> None:
        if self._aligned(views, offset):
            super().write_from(views, offset)
            return
        rest = transfer.Cursor(views)
        while rest.left:
            buffer, start, size = self._window(offset, rest.left)
            at, step = offset - start, self._alignment
            last = len(buffer) - step
            if start:
                super().read_into([buffer[:step]], at)
            if start + size < len(buffer) and not (start and last == 0):
                super().read_into([buffer[last:]], at + last)
            rest.drain(buffer[start : start + size])
            super().write_from([buffer], at)
            offset += size

    def _window(self, offset: int, left: int) -> tuple[memoryview, int, int]:
        """A buffer of whole blocks for the next bytes; where they begin in it; how many."""
        start = offset % self._alignment
        size = min(left, _BOUNCE - start)
        whole = -(-(start + size) // self._alignment) * self._alignment
        return self._bounce[:whole], start, size

    def _aligned(self, views: Sequence[memoryview], offset: int) -> bool:
        mask = self._alignment - 1
        return not offset & mask and not any(
            len(view) & mask or view.readonly or _address(view) & mask for view in views
        )


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
