"""What 9P tells of files: qids, attributes, entries of folders."""

import errno
import hashlib
import os
import stat
import struct

from vmexit.abi import p9
from vmexit.backends.p9 import files, wire

_QID = struct.Struct("<BIQ")  # kind, version, path: which file it is
_ENTRY = struct.Struct("<QBH")  # offset of the next one, type, length of the name; behind a qid
# What is valid; mode, uid, gid; links, device, size, block size, blocks; three times, each seconds
# and nanoseconds; those of birth, generation and version, of which nothing is said.
_ATTRIBUTES = struct.Struct("<III5Q6Q4Q")
_DIRENT = struct.Struct("<QqHB")  # inode, offset of the next one, size, type: getdents64(2)
_STATFS = struct.Struct("<IIQQQQQQI")
_LISTING = 64 << 10

_MASK32, _MASK64 = 0xFFFF_FFFF, (1 << 64) - 1
_TYPES = {stat.S_IFDIR: p9.QT_DIR, stat.S_IFLNK: p9.QT_SYMLINK}


class Attributes:
    """Of one shared folder."""

    def __init__(self, device: int) -> None:
        """`device` is the host's number of the folder's file system."""
        self._device = device

    def _path(self, device: int, inode: int) -> int:
        """64 bits that tell a file from all others, also of what is mounted in the folder."""
        if device == self._device:
            return inode
        both = struct.pack("<QQ", device & _MASK64, inode)
        return int.from_bytes(hashlib.blake2b(both, digest_size=8).digest(), "little")

    def qid(self, fd: int) -> bytes:
        return self._qid(os.fstat(fd))

    def _qid(self, status: os.stat_result) -> bytes:
        kind = _TYPES.get(stat.S_IFMT(status.st_mode), 0)
        version = (status.st_mtime_ns ^ status.st_size << 8) & _MASK32
        return _QID.pack(kind, version, self._path(status.st_dev, status.st_ino))

    def all(self, fd: int) -> bytes:
        """The body of an Rgetattr."""
        status = os.fstat(fd)
        times = []
        for time in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns):
            seconds, nanoseconds = divmod(time, 10**9)
            times += [seconds & _MASK64, nanoseconds]
        return (
            struct.pack("<Q", p9.GETATTR_BASIC)
            + self._qid(status)
            + _ATTRIBUTES.pack(
                status.st_mode, status.st_uid, status.st_gid,
                status.st_nlink, status.st_rdev, status.st_size,
                status.st_blksize, status.st_blocks, *times, 0, 0, 0, 0,
            )
        )  # fmt: skip

    def entries(self, folder: int, offset: int, count: int, *, is_root: bool) -> bytes:
        """At most `count` bytes of entries, from `offset` on. Raises OSError."""
        if offset >> 63:
            raise OSError(errno.EINVAL, "no such offset")
        status = os.fstat(folder)
        listing = files.entries(folder, offset, min(count, _LISTING))
        out: list[bytes] = []
        at = size = 0
        while at < len(listing):
            inode, after, length, kind = _DIRENT.unpack_from(listing, at)
            name = listing[at + _DIRENT.size : at + length].partition(b"\0")[0]
            at += length
            if is_root and name == b"..":
                inode = status.st_ino  # what is above is no business of the guest's
            kind_of_qid = _TYPES.get(kind << 12, 0)  # DT_… are S_IF… without the lower bits
            entry = _QID.pack(kind_of_qid, 0, self._path(status.st_dev, inode))
            entry += _ENTRY.pack(after & _MASK64, kind, len(name)) + name
            if size + len(entry) > count:
                break
            out.append(entry)
            size += len(entry)
        if listing and not out:
            raise OSError(errno.EINVAL, "no room for an entry")
        return b"".join(out)


def set_attributes(fd: int, file: int, message: wire.Reader) -> None:
    """What a Tsetattr says, behind the fid. `file` is a descriptor open to write, or -1."""
    valid = message.u32()
    mode, uid, gid = message.u32(), message.u32(), message.u32()
    size = message.u64()
    accessed, modified = [(message.i64(), message.u64()) for _ in range(2)]
    if valid & (p9.SETATTR_UID | p9.SETATTR_GID):
        owner = uid if valid & p9.SETATTR_UID else -1
        group = gid if valid & p9.SETATTR_GID else -1
        if _MASK32 in (owner, group):
            raise OSError(errno.EINVAL, "nobody has this number")
        os.chown(files.proc_path(fd), owner, group)
    if valid & p9.SETATTR_MODE:
        files.change_mode(fd, mode & 0o7777)
    if valid & p9.SETATTR_SIZE:
        if size >> 63:
            raise OSError(errno.EFBIG, "no file is so large")
        if file >= 0:
            os.ftruncate(file, size)
        else:
            files.truncate(fd, size)
    times: list[files.Time] = []
    for bit, given, time in (
        (p9.SETATTR_ATIME, p9.SETATTR_ATIME_SET, accessed),
        (p9.SETATTR_MTIME, p9.SETATTR_MTIME_SET, modified),
    ):
        times.append(None if not valid & bit else time if valid & given else files.NOW)
    if times != [None, None]:
        files.set_times(fd, *times)


def file_system(fd: int) -> bytes:
    """The body of an Rstatfs."""
    found = os.fstatvfs(fd)
    blocks = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
    return _STATFS.pack(
        p9.FS_MAGIC, found.f_bsize & _MASK32, *blocks, found.f_fsid & _MASK64, found.f_namemax
    )
