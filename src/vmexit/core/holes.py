"""Holes in files: fallocate(2), which Python has only without modes."""

import ctypes
import errno
import os
from functools import cache

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # linux/falloc.h

NOT_POSSIBLE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
"""What a file system says that cannot."""


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Raises OSError."""
    if size and _libc().fallocate(fd, mode, offset, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, size: int) -> None:
    """It reads as zeros from now on, and takes no room. Raises OSError."""
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, size)


def try_hole(fd: int, offset: int, size: int) -> bool:
    """Likewise, or nothing: whether the file system can do it. Raises OSError for other errors."""
    try:
        punch_hole(fd, offset, size)
    except OSError as error:
        if error.errno not in NOT_POSSIBLE:
            raise
        return False
    return True


def zero_range(fd: int, offset: int, size: int) -> None:
    """It reads as zeros from now on, and keeps its room. Raises OSError."""
    fallocate(fd, ZERO_RANGE | KEEP_SIZE, offset, size)
