"""A client of 9P2000.L, small enough to be wrong on purpose."""

import os
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmexit.abi import p9
from vmexit.backends.p9.server import Server

ROOM = 600_000


class Refused(Exception):
    """An Rlerror; `errno` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


@contextmanager
def refused(*numbers: int):
    """What is within is answered by one of these errors."""
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.errno in numbers, caught.value


def make_tree(path: Path) -> Path:
    """A folder to share in `path`, and beside it what is not shared."""
    (path / "secret").write_text("secret")
    (path / "share-not").mkdir()
    shared = path / "share"
    (shared / "a" / "b").mkdir(parents=True)
    (shared / "file").write_text("content")
    (shared / "a" / "b" / "deep").write_text("deep")
    return shared


def text(value: bytes) -> bytes:
    return struct.pack("<H", len(value)) + value


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def message(kind: int, body: bytes, tag: int = 1) -> bytes:
    return struct.pack("<IBH", 7 + len(body), kind, tag) + body


class Client:
    def __init__(self, server: Server, msize: int = 128 << 10) -> None:
        self.server = server
        self.room = ROOM
        answer = self.ask(p9.TVERSION, number(msize) + text(p9.VERSION))
        self.msize, length = struct.unpack_from("<IH", answer)
        assert answer[6:] == p9.VERSION and length == len(p9.VERSION)
        self.last = 0

    def ask(self, kind: int, body: bytes) -> bytes:
        """The body of the answer."""
        answer = self.server.answer(message(kind, body), self.room)
        size, got, tag = struct.unpack_from("<IBH", answer)
        assert size == len(answer) <= self.room and tag == 1
        if got == p9.RLERROR:
            raise Refused(struct.unpack("<I", answer[7:])[0])
        assert got == kind + 1
        return answer[7:]

    def new(self) -> int:
        self.last += 1
        return self.last

    def attach(self, fid: int = 0) -> int:
        self.ask(p9.TATTACH, number(fid) + number(p9.NOFID) + text(b"") * 2 + number(0))
        return fid

    def walk(self, fid: int, *names: bytes, to: int | None = None) -> int:
        """A new fid; Refused (ENOENT) where not all names are there."""
        fresh = self.new() if to is None else to
        body = number(fid) + number(fresh) + struct.pack("<H", len(names))
        answer = self.ask(p9.TWALK, body + b"".join(map(text, names)))
        assert len(answer) == 2 + 13 * struct.unpack_from("<H", answer)[0]
        if len(answer) < 2 + 13 * len(names):
            raise Refused(2)
        return fresh

    def at(self, path: str) -> int:
        """A fid for a path from the root, which is fid 0."""
        names = [os.fsencode(name) for name in path.split("/") if name]
        return self.walk(0, *names)

    def open(self, fid: int, flags: int = os.O_RDONLY) -> int:
        self.ask(p9.TLOPEN, number(fid) + number(flags))
        return fid

    def create(self, folder: int, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644) -> int:
        fid = self.walk(folder)
        body = number(fid) + text(name) + number(flags | os.O_CREAT) + number(mode) + number(0)
        self.ask(p9.TLCREATE, body)
        return fid

    def read(self, fid: int, offset: int = 0, count: int = 4096) -> bytes:
        answer = self.ask(p9.TREAD, number(fid) + struct.pack("<QI", offset, count))
        assert len(answer) == 4 + struct.unpack_from("<I", answer)[0]
        return answer[4:]

    def write(self, fid: int, data: bytes, offset: int = 0) -> int:
        body = number(fid) + struct.pack("<QI", offset, len(data)) + data
        return struct.unpack("<I", self.ask(p9.TWRITE, body))[0]

    def entries(self, fid: int, offset: int = 0, count: int = 8192) -> list[tuple[bytes, int, int]]:
        """Names, types, and offsets behind, as far as one answer has them."""
        answer = self.ask(p9.TREADDIR, number(fid) + struct.pack("<QI", offset, count))
        assert len(answer) == 4 + struct.unpack_from("<I", answer)[0] <= 4 + count
        found, at = [], 4
        while at < len(answer):
            after, kind, length = struct.unpack_from("<QBH", answer, at + 13)
            found.append((answer[at + 24 : at + 24 + length], kind, after))
            at += 24 + length
        return found

    def names(self, fid: int, count: int = 8192) -> list[bytes]:
        found, offset = [], 0
        while part := self.entries(fid, offset, count):
            found += [name for name, _, _ in part]
            offset = part[-1][2]
        return found

    def attributes(self, fid: int) -> dict[str, int]:
        answer = self.ask(p9.TGETATTR, number(fid) + struct.pack("<Q", p9.GETATTR_BASIC))
        values = struct.unpack("<QBIQIII15Q", answer)
        names = (
            "valid kind version path mode uid gid nlink rdev size blksize blocks "
            "atime atime_ns mtime mtime_ns ctime ctime_ns btime btime_ns gen data"
        )
        return dict(zip(names.split(), values, strict=True))

    def set(self, fid: int, valid: int, *, mode=0, uid=0, gid=0, size=0, times=(0, 0, 0, 0)):
        body = struct.pack("<5IQ", fid, valid, mode, uid, gid, size)
        self.ask(p9.TSETATTR, body + struct.pack("<qQqQ", *times))

    def mkdir(self, folder: int, name: bytes, mode: int = 0o755) -> None:
        self.ask(p9.TMKDIR, number(folder) + text(name) + number(mode) + number(0))

    def symlink(self, folder: int, name: bytes, target: bytes) -> None:
        self.ask(p9.TSYMLINK, number(folder) + text(name) + text(target) + number(0))

    def link(self, folder: int, fid: int, name: bytes) -> None:
        self.ask(p9.TLINK, number(folder) + number(fid) + text(name))

    def mknod(self, folder: int, name: bytes, mode: int) -> None:
        self.ask(p9.TMKNOD, number(folder) + text(name) + struct.pack("<4I", mode, 1, 3, 0))

    def rename(self, folder: int, name: bytes, to: int, new: bytes) -> None:
        self.ask(p9.TRENAMEAT, number(folder) + text(name) + number(to) + text(new))

    def unlink(self, folder: int, name: bytes, flags: int = 0) -> None:
        self.ask(p9.TUNLINKAT, number(folder) + text(name) + number(flags))

    def readlink(self, fid: int) -> bytes:
        return self.ask(p9.TREADLINK, number(fid))[2:]

    def clunk(self, fid: int) -> None:
        self.ask(p9.TCLUNK, number(fid))

    def remove(self, fid: int) -> None:
        self.ask(p9.TREMOVE, number(fid))
