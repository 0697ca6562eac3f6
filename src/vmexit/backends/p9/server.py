"""A file server for one guest: 9P2000.L, as Linux's v9fs speaks it (its client in net/9p/client.c).

The guest is hostile. What it can name is decided by `vmexit.backends.p9.tree`; here its fids, its
descriptors and the sizes of messages are bounded.
"""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress

from vmexit.abi import p9
from vmexit.backends.p9 import files, wire
from vmexit.backends.p9.attributes import Attributes, file_system, set_attributes
from vmexit.backends.p9.opened import Fid, OpenFiles
from vmexit.backends.p9.tree import Tree, check_name
from vmexit.backends.wait import reason
from vmexit.core.errors import ConfigError, shown

MOST_MSIZE = 512 << 10
_LEAST_MSIZE = 4096  # less than this Linux does not ask for
_FIRST_MSIZE = 8192  # before the guest has said
_MOST_FIDS = 1 << 16
_READ_HEADER = wire.HEADER_SIZE + 4  # in front of what is read
_LONGEST_TARGET = 4095  # of a symbolic link (PATH_MAX)
_OPEN_FLAGS = p9.O_ACCMODE | p9.O_TRUNC | p9.O_APPEND | p9.O_DSYNC | p9.O_SYNC
_IOUNIT = wire.u32(0)  # as much as fits into a message

_Operations = dict[int, Callable[[wire.Reader], bytes]]


class Server:
    """`vmexit.devices.virtio.p9.FileServer`. One call at a time."""

    msize = MOST_MSIZE
    """Bytes of the longest message."""

    def __init__(self, path: str, *, readonly: bool = False, descriptors: int = 512) -> None:
        """Share the folder `path`. About so many `descriptors` are open at most.

        Raises ConfigError where there is no such folder.
        """
        try:
            root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            why = reason(error)
            raise ConfigError(f"cannot share {shown(path)}: {why}; give a folder") from error
        try:
            os.close(files.reopen(root, os.O_RDONLY))
        except OSError as error:
            os.close(root)
            raise ConfigError(
                f"cannot share {shown(path)}: {reason(error)}; see its rights, and that /proc "
                "is mounted"
            ) from error
        self._readonly = readonly
        self._tree = Tree(root, descriptors // 4)
        self._opened = OpenFiles(self._tree, descriptors * 3 // 4)
        self._attributes = Attributes(os.fstat(root).st_dev)
        self._fids: dict[int, Fid] = {}
        self._msize = self._room = _FIRST_MSIZE
        read: _Operations = {
            p9.TVERSION: self._version, p9.TAUTH: self._refuse, p9.TATTACH: self._attach,
            p9.TFLUSH: self._flush, p9.TWALK: self._walk, p9.TLOPEN: self._lopen,
            p9.TREAD: self._read, p9.TREADDIR: self._readdir, p9.TREADLINK: self._readlink,
            p9.TGETATTR: self._getattr, p9.TSTATFS: self._statfs, p9.TFSYNC: self._fsync,
            p9.TLOCK: self._lock, p9.TGETLOCK: self._getlock, p9.TCLUNK: self._clunk,
            p9.TREMOVE: self._remove, p9.TXATTRWALK: self._refuse,
        }  # fmt: skip
        write: _Operations = {
            p9.TLCREATE: self._lcreate, p9.TWRITE: self._write, p9.TSETATTR: self._setattr,
            p9.TMKDIR: self._mkdir, p9.TSYMLINK: self._symlink, p9.TLINK: self._link,
            p9.TMKNOD: self._mknod, p9.TRENAME: self._rename, p9.TRENAMEAT: self._renameat,
            p9.TUNLINKAT: self._unlinkat, p9.TXATTRCREATE: self._refuse,
        }  # fmt: skip
        if readonly:
            write = dict.fromkeys(write, self._refuse_change)
        self._operations = read | write

    def close(self) -> None:
        self.reset()
        self._tree.close()

    @property
    def in_use(self) -> bool:
        """Whether the guest has anything open."""
        return bool(self._fids)

    def reset(self) -> None:
        """Forget the guest."""
        for fid in list(self._fids):
            self._forget(fid)
        self._msize = _FIRST_MSIZE

    def answer(self, request: bytes, room: int) -> bytes:
        """The message to answer one with, of at most `room` bytes, which are at least 11.

        What is wrong with the request, or goes wrong with files, is an answer, too. The message
        ends with `request`: its own size is without the data in a Twrite of older drivers.
        """
        tag = p9.NOTAG
        try:
            message = wire.Reader(request)
            size, kind, tag = message.u32(), message.u8(), message.u16()
            if not wire.HEADER_SIZE <= size <= len(request):
                raise OSError(errno.EINVAL, "a message has another size than it says")
            self._tree.trim()
            self._room = min(room, self._msize)
            body = self._operations.get(kind, self._refuse)(message)
            if wire.HEADER_SIZE + len(body) > self._room:
                raise OSError(errno.EMSGSIZE, "no room for the answer")
            return wire.message(kind + 1, tag, body)
        except OSError as error:
            number = error.errno or errno.EIO
        except (OverflowError, ValueError):  # a number that the host's libraries do not take
            number = errno.EINVAL
        return wire.message(p9.RLERROR, tag, wire.u32(number))

    def _refuse(self, message: wire.Reader) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "not offered")

    def _refuse_change(self, message: wire.Reader) -> bytes:
        raise OSError(errno.EROFS, "shared to be read only")

    # The session.

    def _version(self, message: wire.Reader) -> bytes:
        msize, version = message.u32(), message.text()
        if msize < _LEAST_MSIZE:
            raise OSError(errno.EMSGSIZE, "messages are too short")
        self.reset()
        self._msize = min(msize, self.msize)
        known = version == p9.VERSION
        return wire.u32(self._msize) + wire.text(version if known else b"unknown")

    def _attach(self, message: wire.Reader) -> bytes:
        number, _ = message.u32(), message.u32()
        _, name = message.text(), message.text()
        if name not in (b"", b"/"):
            raise OSError(errno.ENOENT, "there is one tree only")
        self._check_new(number)
        root = self._tree.root
        qid = self._attributes.qid(self._tree.fd(root))
        self._fids[number] = Fid(self._tree.hold(root))
        return qid

    def _flush(self, message: wire.Reader) -> bytes:
        return b""  # the other request was answered before this one came

    # Fids.

    def _fid(self, message: wire.Reader) -> Fid:
        return self._known(message.u32())

    def _known(self, number: int) -> Fid:
        fid = self._fids.get(number)
        if fid is None:
            raise OSError(errno.EBADF, "there is no such fid")
        return fid

    def _check_new(self, number: int) -> None:
        if number in self._fids or number == p9.NOFID:
            raise OSError(errno.EBADF, "the fid is in use")
        if len(self._fids) >= _MOST_FIDS:
            raise OSError(errno.ENFILE, "too many fids")

    def _descriptor(self, fid: Fid) -> int:
        """One that stands for the file, open or not."""
        return fid.file if fid.file >= 0 else self._tree.fd(fid.node)

    def _check_closed(self, fid: Fid) -> None:
        if fid.is_open:
            raise OSError(errno.EBADF, "the fid is open")
        self._opened.make_room()

    def _forget(self, number: int) -> None:
        fid = self._fids.pop(number)
        self._opened.close(fid)
        self._tree.drop(fid.node)

    def _clunk(self, message: wire.Reader) -> bytes:
        number = message.u32()
        self._known(number)
        self._forget(number)
        return b""

    def _walk(self, message: wire.Reader) -> bytes:
        start, number, count = message.u32(), message.u32(), message.u16()
        fid = self._known(start)
        if count > p9.MAX_WALK:
            raise OSError(errno.EINVAL, "too many names")
        names = [message.text() for _ in range(count)]
        if number != start:
            self._check_new(number)
        elif fid.is_open:
            raise OSError(errno.EBADF, "the fid is open")
        node = self._tree.hold(fid.node)
        qids: list[bytes] = []
        try:
            for name in names:
                below = self._tree.lookup(node, name)
                self._tree.drop(node)
                node = below
                qids.append(self._attributes.qid(self._tree.fd(node)))
        except OSError:
            self._tree.drop(node)
            if not qids:
                raise
        else:
            if number == start:
                self._forget(number)
            self._fids[number] = Fid(node)
        return wire.u16(len(qids)) + b"".join(qids)

    # Files.

    def _lopen(self, message: wire.Reader) -> bytes:
        fid = self._fid(message)
        flags = self._flags(message.u32())
        self._check_closed(fid)
        self._opened.add(fid, files.reopen(self._tree.fd(fid.node), flags), flags)
        return self._attributes.qid(fid.file) + _IOUNIT

    def _flags(self, flags: int) -> int:
        kept = flags & _OPEN_FLAGS
        if kept & p9.O_ACCMODE == p9.O_ACCMODE:
            raise OSError(errno.EINVAL, "neither to read nor to write")
        if self._readonly and kept & (p9.O_ACCMODE | p9.O_TRUNC):
            raise OSError(errno.EROFS, "shared to be read only")
        return kept

    def _lcreate(self, message: wire.Reader) -> bytes:
        fid = self._fid(message)
        name, asked, mode = message.text(), message.u32(), message.u32()
        check_name(name)
        flags = self._flags(asked)
        self._check_closed(fid)
        folder = self._tree.fd(fid.node)
        try:
            file = files.create(folder, name, flags, mode)
        except FileExistsError:
            if asked & p9.O_EXCL:
                raise
            node = self._tree.lookup(fid.node, name)
            try:
                file = files.reopen(self._tree.fd(node), flags)
            except OSError:
                self._tree.drop(node)
                raise
        else:
            try:
                _set_mode(file, mode)
                node = self._tree.lookup(fid.node, name)
            except OSError:
                os.close(file)
                raise
        self._tree.drop(fid.node)
        fid.node = node
        self._opened.add(fid, file, flags)
        return self._attributes.qid(file) + _IOUNIT

    def _read(self, message: wire.Reader) -> bytes:
        file = self._opened.fd(self._fid(message))
        offset, count = message.u64(), message.u32()
        if offset >> 63:
            raise OSError(errno.EINVAL, "no such offset")
        data = os.pread(file, min(count, self._room - _READ_HEADER), offset)
        return wire.u32(len(data)) + data

    def _write(self, message: wire.Reader) -> bytes:
        file = self._opened.fd(self._fid(message))
        offset, count = message.u64(), message.u32()
        data = message.data(count)
        if offset >> 63:
            raise OSError(errno.EINVAL, "no such offset")
        return wire.u32(os.pwrite(file, data, offset))

    def _readdir(self, message: wire.Reader) -> bytes:
        fid = self._fid(message)
        file = self._opened.fd(fid)
        offset, count = message.u64(), message.u32()
        most = min(count, self._room - _READ_HEADER)
        is_root = fid.node is self._tree.root
        data = self._attributes.entries(file, offset, most, is_root=is_root)
        return wire.u32(len(data)) + data

    def _fsync(self, message: wire.Reader) -> bytes:
        os.fsync(self._opened.fd(self._fid(message)))
        return b""

    def _lock(self, message: wire.Reader) -> bytes:
        self._fid(message)  # locks are the guest kernel's own affair, as there is no other guest
        return bytes([p9.LOCK_SUCCESS])

    def _getlock(self, message: wire.Reader) -> bytes:
        self._fid(message)
        message.u8()
        rest = bytes(message.data(8 + 8 + 4))
        return bytes([p9.LOCK_TYPE_UNLCK]) + rest + wire.text(message.text())

    # Attributes.

    def _getattr(self, message: wire.Reader) -> bytes:
        return self._attributes.all(self._descriptor(self._fid(message)))

    def _setattr(self, message: wire.Reader) -> bytes:
        fid = self._fid(message)
        file = self._opened.fd(fid) if fid.writable else -1
        set_attributes(self._descriptor(fid), file, message)
        return b""

    def _statfs(self, message: wire.Reader) -> bytes:
        return file_system(self._descriptor(self._fid(message)))

    def _readlink(self, message: wire.Reader) -> bytes:
        return wire.text(os.readlink(b"", dir_fd=self._tree.fd(self._fid(message).node)))

    # Names.

    def _folder(self, message: wire.Reader) -> int:
        return self._tree.fd(self._fid(message).node)

    def _named(self, message: wire.Reader) -> bytes:
        name = message.text()
        check_name(name)
        return name

    def _made(self, folder: int, name: bytes, mode: int | None = None) -> bytes:
        """The qid of what was made just now, after its permissions were set."""
        fd = files.name_file(folder, name)
        try:
            if mode is not None:
                _set_mode(fd, mode)
            return self._attributes.qid(fd)
        finally:
            os.close(fd)

    def _mkdir(self, message: wire.Reader) -> bytes:
        folder, name, mode = self._folder(message), self._named(message), message.u32()
        os.mkdir(name, mode & 0o777, dir_fd=folder)
        return self._made(folder, name, mode)

    def _mknod(self, message: wire.Reader) -> bytes:
        folder, name, mode = self._folder(message), self._named(message), message.u32()
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFIFO):
            raise OSError(errno.EPERM, "no special files but pipes")
        os.mknod(name, stat.S_IFMT(mode) | mode & 0o777, dir_fd=folder)
        return self._made(folder, name, mode)

    def _symlink(self, message: wire.Reader) -> bytes:
        folder, name, target = self._folder(message), self._named(message), message.text()
        if not target or b"\0" in target:
            raise OSError(errno.EINVAL, "a symbolic link to nothing")
        if len(target) > _LONGEST_TARGET:
            raise OSError(errno.ENAMETOOLONG, "a symbolic link is too long")
        os.symlink(target, name, dir_fd=folder)
        return self._made(folder, name)

    def _link(self, message: wire.Reader) -> bytes:
        folder, file = self._folder(message), self._descriptor(self._fid(message))
        name = self._named(message)
        # The name in /proc is followed, to the file itself and no further.
        os.link(files.proc_path(file), name, dst_dir_fd=folder, follow_symlinks=True)
        return b""

    def _rename(self, message: wire.Reader) -> bytes:
        fid, to, new = self._fid(message), self._fid(message), message.text()
        self._opened.hold(self._tree.known(to.node, new))
        self._tree.rename(*self._tree.place(fid.node), to.node, new)
        return b""

    def _renameat(self, message: wire.Reader) -> bytes:
        folder, name = self._fid(message), message.text()
        to, new = self._fid(message), message.text()
        self._opened.hold(self._tree.known(to.node, new))
        self._tree.rename(folder.node, name, to.node, new)
        return b""

    def _unlinkat(self, message: wire.Reader) -> bytes:
        folder, name, flags = self._fid(message), message.text(), message.u32()
        self._opened.hold(self._tree.known(folder.node, name))
        self._tree.remove(folder.node, name, is_folder=bool(flags & p9.AT_REMOVEDIR))
        return b""

    def _remove(self, message: wire.Reader) -> bytes:
        number = message.u32()
        fid = self._known(number)
        try:
            if self._readonly:
                self._refuse_change(message)
            self._opened.hold(fid.node)
            is_folder = stat.S_ISDIR(os.fstat(self._descriptor(fid)).st_mode)
            self._tree.remove(*self._tree.place(fid.node), is_folder=is_folder)
        finally:
            self._forget(number)
        return b""


def _set_mode(fd: int, mode: int) -> None:
    """What the guest asks for, without the umask of this process, as the guest has its own."""
    mode &= 0o7777
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        with suppress(PermissionError):  # a file system that has no permissions
            files.change_mode(fd, mode)
