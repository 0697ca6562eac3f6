"""The archive that Linux unpacks as its initial RAM disk: cpio in the format newc.

Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import stat
from typing import NamedTuple

_TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """A file of an archive; `device` are the numbers of a device file."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(name: str) -> Entry:
    """A folder that everybody may read."""
    return Entry(name, stat.S_IFDIR | 0o755)


def executable(name: str, content: bytes) -> Entry:
    """A program."""
    return Entry(name, stat.S_IFREG | 0o755, content)


def file(name: str, content: bytes) -> Entry:
    """A file."""
    return Entry(name, stat.S_IFREG | 0o644, content)


def archive(entries: list[Entry]) -> bytes:
    """The archive of `entries`, all of which belong to root; the same for the same entries."""
    numbered = enumerate([*entries, Entry(_TRAILER, 0)], 1)
    return b"".join(_packed(number, entry) for number, entry in numbered)


def _packed(inode: int, entry: Entry) -> bytes:
    # After the magic, 8 hexadecimal digits each: inode, mode, uid, gid, links, mtime, size of the
    # content, device of the file system (2), device of the file (2), size of the name, checksum.
    name = entry.name.encode() + b"\0"
    size = len(entry.content)
    fields = (inode, entry.mode, 0, 0, 1, 0, size, 0, 0, *entry.device, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
