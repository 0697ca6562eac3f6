"""A hostile guest of the file server: random messages; and a host that changes the tree."""

import os
import random
import stat
import struct
import threading
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from p9_client import Client, Refused, make_tree, message, number, text

from vmexit.abi import p9
from vmexit.backends.p9.server import Server

DESCRIPTORS = 64
KINDS = [value for name, value in vars(p9).items() if name.startswith("T") and value < 128]
NAMES = [b"a", b"b", b"c", b"d", b"file", b"deep", b"out", b"up", b"abs", b"fifo", b"self"]
BAD = [b"..", b".", b"", b"/", b"../secret", b"a/b", b"x\0y", b"n" * 255, b"n" * 256, b"\xff\xfe"]
NUMBERS = [0, 1, 2, 3, 7, 16, 17, 100, 4096, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF]
NUMBERS += [1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


class Hostile:
    def __init__(self, server: Server, seed: int, outside: bytes) -> None:
        self.server = server
        self.chance = random.Random(seed)
        self.targets = [b"..", b"../secret", outside, b"a", b"fifo", b"/proc/self/fd/0"]

    def some(self, values):
        return self.chance.choice(values)

    def number(self) -> int:
        return self.some(NUMBERS) if self.chance.random() < 0.7 else self.chance.getrandbits(64)

    def u32(self) -> bytes:
        return number(self.number() & 0xFFFF_FFFF)

    def u64(self) -> bytes:
        return struct.pack("<Q", self.number())

    def small(self) -> bytes:
        """A count or an offset that makes sense."""
        return struct.pack("<Q", self.chance.randrange(300)) if self.chance.random() < 0.8 else (
            self.u64()
        )  # fmt: skip

    def fid(self) -> bytes:
        if self.server._fids and self.chance.random() < 0.8:
            return number(self.some(list(self.server._fids)))
        return self.new()

    def new(self) -> bytes:
        return number(self.chance.randrange(12)) if self.chance.random() < 0.97 else self.u32()

    def name(self) -> bytes:
        return text(self.some(NAMES if self.chance.random() < 0.95 else BAD))

    def flags(self) -> bytes:
        odd = self.some((0, 0, 0, p9.O_TRUNC, p9.O_APPEND, p9.O_EXCL, 0o100000, self.number()))
        return number((self.chance.randrange(4) | odd) & 0xFFFF_FFFF)

    def mode(self) -> bytes:
        kind = self.some((0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, 0xFFFF_0000))
        return number(kind | self.chance.getrandbits(12) | 0o700)

    def body(self, kind: int) -> bytes:
        chance, fid, name = self.chance, self.fid(), self.name()
        if kind == p9.TATTACH:
            return fid + number(p9.NOFID) + text(b"u") + text(b"") + number(0)
        if kind == p9.TWALK:
            count = self.some((0, 1, 1, 1, 1, 1, 1, 2, 2, 3, 16, 17))
            names = b"".join(self.name() for _ in range(count))
            return fid + self.new() + struct.pack("<H", count) + names
        if kind == p9.TLOPEN:
            return fid + self.flags()
        if kind == p9.TLCREATE:
            return fid + name + self.flags() + self.mode() + number(0)
        if kind == p9.TREAD:
            return fid + self.small() + self.u32()
        if kind == p9.TREADDIR:
            return fid + (self.u64() if chance.random() < 0.3 else bytes(8)) + self.u32()
        if kind == p9.TWRITE:
            data = chance.randbytes(chance.randrange(300))
            count = number(len(data)) if chance.random() < 0.9 else self.u32()
            return fid + self.small() + count + data
        if kind == p9.TSETATTR:
            size = (
                struct.pack("<Q", chance.randrange(1000)) if chance.random() < 0.9 else self.u64()
            )
            body = fid + number(chance.getrandbits(10)) + self.mode() + number(os.getuid())
            return body + number(os.getgid()) + size + b"".join(self.u64() for _ in range(4))
        if kind in (p9.TMKDIR, p9.TMKNOD):
            return fid + name + self.mode() + bytes(12)
        if kind == p9.TSYMLINK:
            return fid + name + text(self.some(self.targets)) + number(0)
        if kind in (p9.TLINK, p9.TRENAME):
            return fid + self.fid() + name
        if kind == p9.TRENAMEAT:
            return fid + name + self.fid() + self.name()
        if kind == p9.TGETLOCK:
            return fid + chance.randbytes(21) + name
        if kind == p9.TUNLINKAT:
            return fid + name + number(self.some((0, p9.AT_REMOVEDIR, 0xFFFF_FFFF)))
        return fid + chance.randbytes(chance.randrange(60))

    def message(self) -> bytes:
        chance = self.chance
        kind = (
            self.some(KINDS)
            if chance.random() < 0.6
            else (self.some((p9.TWALK, p9.TWALK, p9.TLOPEN, p9.TREAD)))
        )
        if kind in (p9.TREMOVE, p9.TUNLINKAT) and chance.random() < 0.7:
            kind = p9.TLCREATE  # or nothing would be left
        if kind == p9.TVERSION:
            body = number(self.some((4096, 8192, 1 << 19, 1 << 31, 0))) + text(p9.VERSION)
            kind = kind if chance.random() < 0.1 else p9.TATTACH
        if kind != p9.TVERSION:
            body = self.body(kind)
        whole = message(kind, body, chance.getrandbits(16))
        odd = chance.random()
        if odd < 0.02:
            return whole[: chance.randrange(len(whole))]
        if odd < 0.04:
            at = chance.randrange(len(whole))
            return whole[:at] + chance.randbytes(1) + whole[at + 1 :]
        if odd < 0.05:
            return message(chance.randrange(256), chance.randbytes(chance.randrange(80)))
        return whole


def outside(path: Path) -> dict[Path, tuple[object, ...]]:
    """All there is but the share: its content, and when anything of it was changed."""
    found = {}
    tops = [top for top in path.iterdir() if top.name != "share"]
    for file in [path, *tops, *(file for top in tops for file in top.rglob("*"))]:
        status = file.lstat()
        content = file.read_bytes() if file.is_file() else sorted(os.listdir(file))
        found[file] = (status.st_mode, status.st_nlink, status.st_ctime_ns, content)
    return found


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    "count",
    [20_000, pytest.param(200_000, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])],
)
def test_random_messages(tmp_path, readonly, count):
    share = make_tree(tmp_path)
    (tmp_path / "secret").write_text("confidential")
    for name, target in (("out", "../secret"), ("up", ".."), ("abs", tmp_path / "share-not")):
        os.symlink(target, share / name)
    os.mkfifo(share / "fifo")
    (share / "c").mkdir()
    before, there = outside(tmp_path), sorted(share.rglob("*"))
    server = Server(str(share), readonly=readonly, descriptors=DESCRIPTORS)
    open_before = len(os.listdir("/proc/self/fd"))
    hostile = Hostile(server, count, os.fsencode(tmp_path / "share-not"))
    served: dict[int, int] = {}
    tracemalloc.start()
    try:
        for turn in range(count):
            if turn % 200 == 0:
                if not readonly:
                    for name in ("a/b", "c"):
                        restore(share / name)
                Client(server).attach()
            room = hostile.some((11, 30) if turn % 20 == 0 else (4096, 1 << 20, 1 << 30))
            request = hostile.message()
            answer = server.answer(request, room)
            size, kind, tag = struct.unpack_from("<IBH", answer)
            assert size == len(answer) <= min(room, 512 << 10)
            if kind == p9.RLERROR:
                assert size == 11 and 0 < struct.unpack_from("<I", answer, 7)[0] < 134
            else:
                assert kind == request[4] + 1 and tag == struct.unpack_from("<H", request, 5)[0]
                assert b"confidential" not in answer
                served[kind - 1] = served.get(kind - 1, 0) + 1
            if turn % 100 == 0:
                assert len(os.listdir("/proc/self/fd")) <= open_before + DESCRIPTORS + 20
                assert outside(tmp_path) == before
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    server.reset()
    assert server._tree.nodes == 1 and len(server._opened) == 0
    assert len(os.listdir("/proc/self/fd")) == open_before
    server.close()
    assert outside(tmp_path) == before
    if readonly:
        assert sorted(share.rglob("*")) == there
    changes = {p9.TLCREATE, p9.TMKDIR, p9.TSYMLINK, p9.TLINK, p9.TMKNOD, p9.TWRITE, p9.TSETATTR}
    changes |= {p9.TRENAME, p9.TRENAMEAT, p9.TUNLINKAT}
    refused = {p9.TAUTH, p9.TXATTRWALK, p9.TXATTRCREATE} | (changes if readonly else set())
    refused |= {p9.TREMOVE} if readonly else set()
    assert sum(served.values()) > count // 10  # much of it was taken seriously
    missing = set(KINDS) - served.keys() - refused
    assert not missing and not served.keys() & refused


def restore(folder: Path) -> None:
    """Have a folder there again, if it can be."""
    if not folder.parent.is_symlink():
        with suppress(OSError):
            folder.mkdir(parents=True)


def test_a_host_that_swaps_folders_and_links(tmp_path):
    """Whatever a name leads to at the moment, it does not lead out."""
    share = make_tree(tmp_path)
    (tmp_path / "share-not" / "deep").write_text("secret")
    (tmp_path / "share-not" / "b").mkdir()
    before = outside(tmp_path)
    server = Server(str(share), descriptors=DESCRIPTORS)
    client = Client(server)
    client.attach()
    os.symlink(tmp_path / "share-not", share / "link")
    done = threading.Event()
    swaps = 0

    def swap() -> None:
        """Put a link out of the share where a folder was, and back."""
        nonlocal swaps
        while not done.is_set():
            os.rename(share / "a" / "b", share / "a" / "kept")
            os.rename(share / "link", share / "a" / "b")
            os.rename(share / "a" / "b", share / "link")
            os.rename(share / "a" / "kept", share / "a" / "b")
            swaps += 1

    thread = threading.Thread(target=swap)
    thread.start()
    inside = 0
    try:
        for n in range(4000):
            name = b"%d" % (n % 5)
            with suppress(Refused):
                fid = client.walk(0, b"a", b"b", to=1)
                step = n % 6
                if step == 0:
                    assert client.read(client.open(client.walk(fid, b"deep", to=2))) == b"deep"
                    inside += 1
                elif step == 1:
                    client.clunk(client.create(fid, name))
                elif step == 2:
                    client.unlink(fid, name)
                elif step == 3:
                    client.set(fid, p9.SETATTR_MODE, mode=0o755)
                elif step == 4:
                    client.mkdir(fid, name + b"x")
                else:
                    client.rename(fid, name + b"x", fid, b"y")
            for fid in (1, 2):
                with suppress(Refused):
                    client.clunk(fid)
    finally:
        done.set()
        thread.join()
    server.close()
    assert inside > 10 and swaps > 10
    assert outside(tmp_path) == before
