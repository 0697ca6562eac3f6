"""Unpacking compressed kernels on the host, within a limit.

Linux's build appends the unpacked size (4 bytes, little-endian) to what is not gzip, whose own
trailer ends so (scripts/Makefile.lib, size_append); all readers here stop at the end of the stream.
"""

import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

from vmexit.core.errors import ImageError

# More than any kernel, also with debug sections; and a bound for what a hostile file can make.
MAX_UNPACKED = 1 << 30
# The largest dictionary or window that Linux's build asks for is 128 MiB (xz and zstd -22).
_MAX_WINDOW_LOG = 27
_MAX_LZMA_MEMORY = 256 << 20

_LZ4_LEGACY_MAGIC = 0x184C2102
_LZ4_BLOCK = 8 << 20  # what a block of a legacy frame unpacks to, at most (lz4_Frame_format.md)
# A step's input can become 2**15 times as much (blocks of 4 bytes for 128 KiB), and zstandard has
# no limit for the output of a step.
_ZSTD_STEP = 4096


class _Decompressor(Protocol):
    """What bz2 and lzma have in common; they are imported when there is something to unpack."""

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes: ...
    @property
    def eof(self) -> bool: ...


class _Damaged(Exception):
    """The stream ends early, or is none."""


class _TooLarge(Exception):
    """The stream unpacks to more than the limit."""


def _gzip(data: memoryview, limit: int) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    unpacked = stream.decompress(data, limit + 1)
    if len(unpacked) > limit:
        raise _TooLarge
    if not stream.eof:
        raise _Damaged("it ends early")
    return unpacked


def _bounded(stream: _Decompressor, data: memoryview, limit: int) -> bytes:
    """What `stream` makes of `data`. Raises what the stream raises, EOFError among it."""
    unpacked = stream.decompress(data, limit + 1)
    if len(unpacked) > limit:
        raise _TooLarge
    if not stream.eof:
        raise _Damaged("it ends early")
    return unpacked


def _bzip2(data: memoryview, limit: int) -> bytes:
    import bz2

    return _bounded(bz2.BZ2Decompressor(), data, limit)


def _xz_or_lzma(data: memoryview, limit: int) -> bytes:
    import lzma

    try:
        stream = lzma.LZMADecompressor(lzma.FORMAT_AUTO, _MAX_LZMA_MEMORY)
        return _bounded(stream, data, limit)
    except lzma.LZMAError as error:
        raise _Damaged(str(error)) from error


def _lz4(data: memoryview, limit: int) -> bytes:
    """A legacy frame: blocks of known packed size, and no end mark."""
    try:
        import lz4.block
    except ImportError as error:
        raise ImageError("unpacking an lz4 kernel needs lz4; run pip install lz4") from error
    blocks = []
    total, at = 0, 4
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        if size == _LZ4_LEGACY_MAGIC:  # frames may follow each other
            at += 4
            continue
        # What is too short to be a block is the appended size, not a block's.
        if at + 4 == len(data):
            break
        if size > len(data) - at - 4:
            raise _Damaged("a block reaches behind the end")
        try:
            block = lz4.block.decompress(data[at + 4 : at + 4 + size], _LZ4_BLOCK)
        except (lz4.block.LZ4BlockError, ValueError, OverflowError) as error:
            raise _Damaged(f"a block is damaged ({error})") from error
        total += len(block)
        if total > limit:
            raise _TooLarge
        blocks.append(block)
        at += 4 + size
    return b"".join(blocks)


def _zstd(data: memoryview, limit: int) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise ImageError(
            "unpacking a zstd kernel needs zstandard; run pip install zstandard"
        ) from error
    chunks = []
    total = 0
    stream = zstandard.ZstdDecompressor(max_window_size=1 << _MAX_WINDOW_LOG).decompressobj()
    try:
        for at in range(0, len(data), _ZSTD_STEP):
            chunk = stream.decompress(data[at : at + _ZSTD_STEP])
            total += len(chunk)
            if total > limit:
                raise _TooLarge
            chunks.append(chunk)
            if stream.eof:
                return b"".join(chunks)
    except zstandard.ZstdError as error:
        raise _Damaged(str(error)) from error
    raise _Damaged("it ends early")


class _Format(NamedTuple):
    magic: bytes
    unpack: Callable[[memoryview, int], bytes] | None


# As in Linux lib/decompress.c, but for gzip's third byte (8, deflate, is the only method).
_FORMATS = {
    "gzip": _Format(b"\x1f\x8b\x08", _gzip),
    "xz": _Format(b"\xfd7zXZ\0", _xz_or_lzma),
    "bzip2": _Format(b"BZh", _bzip2),
    "lzma": _Format(b"\x5d\0\0", _xz_or_lzma),
    "lzo": _Format(b"\x89LZO", None),
    "lz4": _Format(b"\x02\x21\x4c\x18", _lz4),
    "zstd": _Format(b"\x28\xb5\x2f\xfd", _zstd),
}


def detect(data: bytes | memoryview) -> str | None:
    """The name of the compression that `data` begins with: gzip, xz, …; None if it is none."""
    head = bytes(data[:6])
    return next((name for name, f in _FORMATS.items() if head.startswith(f.magic)), None)


def unpack(data: bytes | memoryview, name: str, limit: int = MAX_UNPACKED) -> bytes:
    """`data`, which `detect()` called `name`, unpacked; what follows its stream is left out.

    Raises ImageError if it is damaged, unpacks to more than `limit` bytes, or if there is nothing
    here to unpack it with.
    """
    unpacker = _FORMATS[name].unpack
    if unpacker is None:
        raise ImageError(f"a kernel packed with {name} cannot be unpacked; build it with gzip")
    try:
        return unpacker(memoryview(data), limit)
    except _TooLarge:
        raise ImageError(
            f"the {name} kernel unpacks to more than the {limit} bytes that it may have; "
            "build it again"
        ) from None
    except (_Damaged, zlib.error, OSError, EOFError, ValueError) as error:
        raise ImageError(f"the {name} kernel is damaged: {error}; build it again") from error
    except MemoryError:
        raise ImageError(f"there is no memory to unpack the {name} kernel; free some") from None
