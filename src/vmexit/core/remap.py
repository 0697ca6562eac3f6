"""A mapping in the place of another one: mmap(2) with MAP_FIXED, which Python does not offer."""

import ctypes
import mmap
import os
from contextlib import suppress
from functools import cache

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # asm-generic/mman-common.h
_MADV_NOHUGEPAGE = 15
_PRIVATE = mmap.MAP_PRIVATE | _MAP_NORESERVE
_FAILED = ctypes.c_void_p(-1).value


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    ]  # fmt: skip
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def reserve(size: int) -> mmap.mmap:
    """A mapping of zeros that takes addresses and no memory, for `map_over()`. Raises OSError.

    A page is taken for a page that is written to, not a large one.
    """
    pages = mmap.mmap(-1, size, flags=_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # not each kernel has large pages
        pages.madvise(_MADV_NOHUGEPAGE)
    return pages


def map_over(hva: int, size: int, fd: int, offset: int, *, private: bool) -> None:
    """Have `size` bytes at `hva`, which are mapped, be those of `fd` from `offset` on.

    With `private`, what is written to them stays out of the file. Raises OSError.
    """
    _map(hva, size, _PRIVATE if private else mmap.MAP_SHARED, fd, offset)


def zeros_over(hva: int, size: int) -> None:
    """Have `size` bytes at `hva`, which are mapped, be as those of `reserve()`. Raises OSError."""
    _map(hva, size, _PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    _libc().madvise(hva, size, _MADV_NOHUGEPAGE)  # not each kernel has large pages


def _map(hva: int, size: int, flags: int, fd: int, offset: int) -> None:
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if _libc().mmap(hva, size, protection, flags | _MAP_FIXED, fd, offset) == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
