"""Reading image files, and telling what is in them."""

import errno
import os
import stat
import struct
from typing import NamedTuple

from vmexit.boot import compression
from vmexit.core.errors import ImageError, shown

# More than any flat image or firmware; a kernel with its initrd stays below it, too.
_MAX_SIZE = 4 << 30

_ELF = b"\x7fELF"
# Compressed files, with their article. Code could begin with the magic numbers of bzip2 and lzma.
COMPRESSIONS = {"gzip": "a", "xz": "an", "lz4": "an", "zstd": "a"}
_BZIMAGE_MAGIC = b"HdrS"  # at 0x202 (Linux x86 boot protocol, "The Real-Mode Kernel Header")


class ImageKind(NamedTuple):
    """What an image is: a short name, and a sentence about it."""

    name: str
    description: str


def read_image(
    path: str | os.PathLike[str], *, limit: int = _MAX_SIZE, what: str = "image"
) -> bytes:
    """The bytes of the file at `path`; ImageError if it cannot be an image of at most `limit`."""
    path = os.fsdecode(path)
    name = shown(path)
    try:
        # Not blocking: a FIFO without a writer would hold us up for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        remedy = {
            errno.ENOENT: "check the path",
            errno.EACCES: "make it readable, or choose another",
        }.get(error.errno or 0, "choose another file")
        raise ImageError(f"cannot read {what} {name}: {error.strerror}; {remedy}") from error
    except ValueError as error:  # a zero byte in the path, or what cannot be encoded
        raise ImageError(f"cannot read {what} {name}: {error}; check the path") from error
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{what} {name} is a directory; name a file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{what} {name} is not a regular file; copy it to one")
        if status.st_size == 0:
            raise ImageError(f"{what} {name} is empty; build it again")
        if status.st_size > limit:
            raise ImageError(
                f"{what} {name} has {status.st_size} bytes, which is more than {limit}; "
                "use a smaller one, or more --memory"
            )
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except MemoryError:
        raise ImageError(
            f"{what} {name} has {status.st_size} bytes, for which there is no memory; free some"
        ) from None
    except OSError as error:
        raise ImageError(
            f"cannot read {what} {name}: {error.strerror}; choose another file"
        ) from error
    finally:
        os.close(fd)


def detect(data: bytes) -> ImageKind:
    """Name what `data` is, by its magic numbers; `flat` if it has none."""
    if data[:4] == _ELF:
        bits = {1: "32-bit", 2: "64-bit"}.get(data[4] if len(data) > 4 else 0, "unknown-size")
        multiboot = "a multiboot 1 kernel: " if find_multiboot(data) is not None else ""
        return ImageKind("elf", f"{multiboot}a {bits} ELF file")
    if data[0x202:0x206] == _BZIMAGE_MAGIC:
        return ImageKind("bzimage", "a Linux kernel (bzImage)")
    if find_multiboot(data) is not None:
        return ImageKind("multiboot", "a multiboot 1 kernel")
    if _find_header(data, _MULTIBOOT2) is not None:
        return ImageKind("multiboot2", "a multiboot 2 kernel")
    packed = compression.detect(data)
    if packed in COMPRESSIONS:
        return ImageKind(packed, f"{COMPRESSIONS[packed]} {packed} file")
    if len(data) == 512 and data[510:512] == b"\x55\xaa":
        return ImageKind("boot-sector", "a boot sector, which a BIOS loads at 0x7c00")
    if len(data) >= 0x10000 and len(data) % 4096 == 0 and data[-16] in (0xE9, 0xEA, 0xEB):
        return ImageKind("firmware", "a firmware ROM: it has a jump at the reset vector")
    return ImageKind("flat", "a flat image: code without a header")


class _Multiboot(NamedTuple):
    """Where a multiboot header may be, and how many words its checksum makes 0 together."""

    magic: int
    within: int
    alignment: int
    words: int


# Multiboot 0.6.96, 3.1 and 3.1.2; Multiboot2 2.0, 3.1.1.
_MULTIBOOT = _Multiboot(0x1BADB002, 8192, 4, 3)
_MULTIBOOT2 = _Multiboot(0xE85250D6, 32768, 8, 4)


def find_multiboot(data: bytes) -> int | None:
    """The offset of the multiboot 1 header in `data`, None without one.

    A Linux kernel has none, even if something in it looks like one: GRUB's core, packed as a
    kernel, does.
    """
    if data[0x202:0x206] == _BZIMAGE_MAGIC:
        return None
    return _find_header(data, _MULTIBOOT)


def _find_header(data: bytes, kind: _Multiboot) -> int | None:
    size = 4 * kind.words
    magic = kind.magic.to_bytes(4, "little")
    at = data.find(magic, 0, kind.within)
    while 0 <= at <= min(len(data), kind.within) - size:
        words = struct.unpack_from(f"<{kind.words}I", data, at)
        if at % kind.alignment == 0 and sum(words) & 0xFFFF_FFFF == 0:
            return at
        at = data.find(magic, at + 1, kind.within)
    return None
