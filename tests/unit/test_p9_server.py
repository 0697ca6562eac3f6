"""The file server for shared folders: what it does, and where it ends."""

import errno
import os
import stat
import struct

import pytest
from p9_client import Client, Refused, make_tree, message, number, refused, text

from vmexit.abi import p9
from vmexit.backends.p9 import server as server_module
from vmexit.backends.p9 import tree
from vmexit.backends.p9.server import Server

DESCRIPTORS = 64


@pytest.fixture
def folder(tmp_path):
    return make_tree(tmp_path)


@pytest.fixture
def server(folder):
    server = Server(str(folder), descriptors=DESCRIPTORS)
    yield server
    server.close()


@pytest.fixture
def client(server):
    client = Client(server)
    client.attach()
    return client


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# The session.


def test_versions_and_sizes(server):
    assert Client(server, 1 << 31).msize == 512 << 10
    assert Client(server, 4096).msize == 4096
    for msize in (0, 4095):
        with refused(errno.EMSGSIZE):
            Client(server, msize)
    answer = server.answer(message(p9.TVERSION, number(8192) + text(b"9P2000.u")), 1000)
    assert answer[11:] == text(b"unknown")


def test_a_new_session_forgets_the_old_one(client, server):
    client.open(client.at("file"))
    before = descriptors()
    again = Client(server)
    assert descriptors() == before - 2 and server._tree.nodes == 1
    with refused(errno.EBADF):
        again.attributes(0)


def test_no_authentication_and_one_tree(client):
    with refused(errno.EOPNOTSUPP):
        client.ask(p9.TAUTH, number(5) + text(b"root") + text(b"") + number(0))
    with refused(errno.EBADF):  # the fid is in use
        client.attach(0)
    with refused(errno.ENOENT):
        client.ask(p9.TATTACH, number(9) + number(p9.NOFID) + text(b"") + text(b"/etc") + number(0))
    assert client.ask(p9.TFLUSH, struct.pack("<H", 77)) == b""


@pytest.mark.parametrize("kind", [0, 6, 7, 9, 98, 106, 111, 112, 126, 127, 255])
def test_messages_that_there_are_not(client, kind):
    with refused(errno.EOPNOTSUPP):
        client.ask(kind, b"abc")


def test_messages_that_end_early(server):
    """A piece of any message is refused, and so is one of another size than it says."""
    Client(server).attach()
    whole = {
        p9.TATTACH: number(9) + number(p9.NOFID) + text(b"a") * 2,
        p9.TWALK: number(0) + number(5) + struct.pack("<H", 2) + text(b"a") + text(b"b"),
        p9.TLOPEN: number(0) * 2,
        p9.TLCREATE: number(0) + text(b"x") + number(2) * 2,
        p9.TMKDIR: number(0) + text(b"y") + number(2),
        p9.TSETATTR: number(0) + bytes(52),
        p9.TRENAMEAT: number(0) + text(b"a") + number(0) + text(b"c"),
        p9.TUNLINKAT: number(0) + text(b"file") + number(0),
    }
    for kind, body in whole.items():
        for end in range(len(body)):
            answer = server.answer(message(kind, body[:end]), 100)
            assert answer == message(p9.RLERROR, number(errno.EINVAL)), (kind, end)
    for request in (b"", b"\0", struct.pack("<IBH", 7, p9.TCLUNK, 1)[:6]):
        assert server.answer(request, 100)[7:] == number(errno.EINVAL)
    for size in (0, 6, 8, 1 << 31):
        request = struct.pack("<IBH", size, p9.TVERSION, 1)
        assert server.answer(request, 100)[7:] == number(errno.EINVAL)


# Files.


def test_reads_and_writes(client, folder):
    fid = client.open(client.at("file"), os.O_RDWR)
    assert client.read(fid) == b"content"
    assert client.read(fid, 3, 2) == b"te" and client.read(fid, 100) == b""
    assert client.write(fid, b"XY", 8) == 2
    assert (folder / "file").read_bytes() == b"content\0XY"
    client.clunk(client.open(client.at("file"), os.O_WRONLY | os.O_TRUNC))
    assert (folder / "file").read_bytes() == b""
    again = client.open(client.at("file"), os.O_WRONLY | os.O_APPEND)
    client.write(again, b"one", 0)
    client.write(again, b"two", 0)
    assert client.read(fid) == b"onetwo"
    with refused(errno.EBADF):
        client.read(again)
    reading = client.open(client.at("file"))
    with refused(errno.EBADF):
        client.write(reading, b"x")
    assert client.ask(p9.TFSYNC, number(fid) + number(0)) == b""


def test_a_write_may_not_count_its_data(client, folder):
    """As older drivers did, and a count is not believed beyond the message."""
    fid = client.create(0, b"new")
    request = struct.pack("<IBH", 23, p9.TWRITE, 1) + number(fid) + struct.pack("<QI", 0, 4)
    assert client.server.answer(request + b"data", 100)[7:] == number(4)
    assert client.server.answer(request + b"dat", 100)[7:] == number(errno.EINVAL)
    assert (folder / "new").read_bytes() == b"data"


def test_answers_fit(client, folder):
    (folder / "file").write_bytes(bytes(1 << 20))
    fid = client.open(client.at("file"))
    assert len(client.read(fid, 0, 0xFFFF_FFFF)) == client.msize - 11
    client.room = 1000
    assert len(client.read(fid, 0, 0xFFFF_FFFF)) == 1000 - 11
    client.room = 11
    assert client.read(fid, 0, 100) == b""
    with refused(errno.EMSGSIZE):
        client.attributes(fid)


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1, (1 << 63) - 1])
def test_offsets_that_no_file_has(client, folder, offset):
    fid = client.open(client.at("file"), os.O_RDWR)
    with refused(errno.EINVAL, errno.EFBIG):
        client.write(fid, b"x", offset)
    with refused(errno.EINVAL):
        client.read(fid, offset)
    directory = client.open(client.walk(0))
    for asked in (offset, 1 << 62, 12345):
        try:
            assert len(client.entries(directory, asked)) < 10
        except Refused as error:
            assert error.errno == errno.EINVAL
    assert (folder / "file").read_text() == "content"


def test_what_is_made_has_the_permissions_asked_for(client, folder):
    old = os.umask(0o077)
    try:
        client.create(0, b"f", mode=0o666)
        client.mkdir(0, b"d", 0o1777)
        client.mknod(0, b"p", stat.S_IFIFO | 0o622)
        client.mknod(0, b"r", stat.S_IFREG | 0o604)
    finally:
        os.umask(old)
    found = {n: oct((folder / n).stat().st_mode) for n in "fdpr"}
    assert found == {"f": "0o100666", "d": "0o41777", "p": "0o10622", "r": "0o100604"}
    for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFDIR):
        with refused(errno.EPERM):
            client.mknod(0, b"x", kind | 0o600)


def test_create_and_what_is_there(client, folder):
    with refused(errno.EEXIST):
        client.create(0, b"file", os.O_RDWR | os.O_EXCL)
    fid = client.create(0, b"file")
    assert client.read(fid) == b"content"
    client.create(0, b"file", os.O_RDWR | os.O_TRUNC)
    assert client.attributes(client.at("file"))["size"] == 0
    os.mkfifo(folder / "fifo")
    with refused(errno.EPERM):
        client.create(0, b"fifo")
    with refused(errno.EBADF):  # it is open
        client.ask(p9.TLCREATE, number(fid) + text(b"y") + number(2) + number(0o644) + number(0))
    with refused(errno.ENOTDIR):
        client.create(client.at("file"), b"x")


def test_attributes(client, folder):
    os.utime(folder / "file", ns=(-5 * 10**9 + 7, 1_600_000_000_123_456_789))
    found, real = client.attributes(client.at("file")), (folder / "file").stat()
    assert found["mode"] == real.st_mode and found["path"] == real.st_ino and found["kind"] == 0
    assert (found["uid"], found["gid"], found["nlink"]) == (os.getuid(), os.getgid(), 1)
    assert (found["size"], found["blksize"], found["blocks"]) == (
        7, real.st_blksize, real.st_blocks,
    )  # fmt: skip
    assert (found["atime"], found["atime_ns"]) == ((1 << 64) - 5, 7)
    assert (found["mtime"], found["mtime_ns"]) == (1_600_000_000, 123_456_789)
    assert client.attributes(0)["kind"] == p9.QT_DIR
    kind, size, blocks = struct.unpack_from("<IIQ", client.ask(p9.TSTATFS, number(0)))
    there = os.statvfs(folder)
    assert (kind, size, blocks) == (p9.FS_MAGIC, there.f_bsize, there.f_blocks)


def test_attributes_can_be_set(client, folder):
    file = folder / "file"
    fid = client.at("file")
    client.set(fid, p9.SETATTR_MODE, mode=0o100640)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    client.set(fid, p9.SETATTR_SIZE, size=3)
    assert file.read_text() == "con"
    client.set(fid, p9.SETATTR_SIZE, size=5)
    assert file.read_bytes() == b"con\0\0"
    client.set(fid, 0x3C0 >> 1 | p9.SETATTR_ATIME | p9.SETATTR_MTIME, times=(-3, 5, 7, 999_999_999))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (-3 * 10**9 + 5, 7_999_999_999)
    client.set(fid, p9.SETATTR_ATIME)  # now, and the other one stays
    assert file.stat().st_atime_ns > 10**18 and file.stat().st_mtime_ns == 7_999_999_999
    client.set(fid, p9.SETATTR_UID | p9.SETATTR_GID, uid=os.getuid(), gid=os.getgid())
    for size in (1 << 63, (1 << 64) - 1):
        with refused(errno.EFBIG):
            client.set(fid, p9.SETATTR_SIZE, size=size)
    with refused(errno.EINVAL):
        client.set(fid, p9.SETATTR_UID, uid=0xFFFF_FFFF)
    with refused(errno.EINVAL):
        bits = p9.SETATTR_MTIME | p9.SETATTR_MTIME_SET
        client.set(fid, bits, times=(0, 0, 1, 10**9))
    with refused(errno.EISDIR):
        client.set(0, p9.SETATTR_SIZE, size=0)


def test_a_file_open_to_write_can_be_cut_whatever_its_permissions(client, folder):
    fid = client.create(0, b"new", mode=0o444)
    client.write(fid, b"abc")
    client.set(fid, p9.SETATTR_SIZE, size=1)
    assert (folder / "new").read_text() == "a"


def test_a_folder_is_read_in_pieces(client, folder):
    names = {b"%03d%s" % (n, b"x" * 200) for n in range(300)}
    for name in names:
        (folder / "a" / os.fsdecode(name)).touch()
    fid = client.open(client.at("a"))
    for count in (300, 1000, 8192, 0xFFFF_FFFF):
        found = client.names(fid, count)
        assert len(found) == len(set(found)) and set(found) == names | {b".", b"..", b"b"}
    with refused(errno.EINVAL):
        client.entries(fid, 0, 20)
    kinds = dict((name, kind) for name, kind, _ in client.entries(client.open(client.walk(0))))
    assert kinds[b"file"] == stat.S_IFREG >> 12 and kinds[b"a"] == stat.S_IFDIR >> 12
    with refused(errno.EBADF):  # not open
        client.entries(client.at("a"))
    with refused(errno.ENOTDIR):
        client.entries(client.open(client.at("file")))


def test_the_root_does_not_tell_what_is_above(client, folder):
    fid = client.open(client.walk(0))
    answer = client.ask(p9.TREADDIR, number(fid) + struct.pack("<QI", 0, 8192))
    found, at = {}, 4
    while at < len(answer):
        path, length = struct.unpack_from("<Q", answer, at + 5)[0], answer[at + 22]
        found[answer[at + 24 : at + 24 + length]] = path
        at += 24 + length
    assert found[b".."] == found[b"."] == folder.stat().st_ino


def test_names_change(client, folder):
    client.rename(0, b"file", client.at("a"), b"moved")
    assert (folder / "a" / "moved").read_text() == "content"
    client.symlink(0, b"l", b"a/moved")
    assert os.readlink(folder / "l") == "a/moved" == client.readlink(client.at("l")).decode()
    client.link(0, client.at("a/moved"), b"hard")
    assert client.attributes(client.at("hard"))["nlink"] == 2
    client.link(0, client.at("l"), b"l2")  # of the symbolic link itself
    assert (folder / "l2").is_symlink()
    client.unlink(0, b"hard")
    with refused(errno.EISDIR, errno.EPERM):
        client.unlink(0, b"a")
    with refused(errno.ENOTDIR):
        client.unlink(0, b"l", p9.AT_REMOVEDIR)
    with refused(errno.ENOTEMPTY):
        client.unlink(0, b"a", p9.AT_REMOVEDIR)
    client.mkdir(0, b"empty")
    client.unlink(0, b"empty", p9.AT_REMOVEDIR)
    client.remove(client.at("l2"))
    client.mkdir(0, b"empty")
    client.remove(client.at("empty"))
    fid = client.at("a/moved")
    client.ask(p9.TRENAME, number(fid) + number(0) + text(b"back"))
    assert sorted(os.listdir(folder)) == ["a", "back", "l"]
    with refused(errno.EBUSY):
        client.ask(p9.TRENAME, number(0) + number(0) + text(b"x"))
    with refused(errno.EBUSY):
        client.remove(client.walk(0))
    with refused(errno.EINVAL, errno.ENOENT):
        client.readlink(client.at("back"))


def test_extended_attributes_are_not_offered_and_locks_are_free(client):
    with refused(errno.EOPNOTSUPP):
        client.ask(p9.TXATTRWALK, number(0) + number(9) + text(b"user.x"))
    with refused(errno.EOPNOTSUPP):
        client.ask(p9.TXATTRCREATE, number(0) + text(b"user.x") + bytes(12))
    fid = client.open(client.at("file"))
    lock = bytes([1]) + number(0) + struct.pack("<QQI", 0, 0, 7) + text(b"me")
    assert client.ask(p9.TLOCK, number(fid) + lock) == b"\0"
    lock = struct.pack("<QQI", 1, 2, 7) + text(b"me")
    assert client.ask(p9.TGETLOCK, number(fid) + b"\1" + lock) == b"\2" + lock


# Fids.


def test_fids(client):
    fid = client.at("file")
    assert client.attributes(client.walk(fid))["size"] == 7  # another one for the same
    with refused(errno.EBADF):
        client.walk(0, b"a", to=fid)
    with refused(errno.EBADF):
        client.walk(0, to=p9.NOFID)
    client.walk(fid, to=fid)
    down = client.walk(0)
    client.walk(down, b"a", b"b", to=down)
    assert client.attributes(down)["kind"] == p9.QT_DIR
    client.open(down)
    with refused(errno.EBADF):
        client.open(down)
    with refused(errno.EBADF):
        client.walk(down, b"deep", to=down)
    client.clunk(down)
    for call in (client.clunk, client.remove, client.read, client.attributes, client.open):
        with refused(errno.EBADF):
            call(down)


def test_a_walk_that_ends_early_makes_no_fid(client):
    answer = client.ask(
        p9.TWALK, number(0) + number(9) + struct.pack("<H", 3) + text(b"a") + text(b"x") * 2
    )
    assert len(answer) == 2 + 13
    with refused(errno.EBADF):
        client.attributes(9)
    with refused(errno.ENOENT):
        client.ask(p9.TWALK, number(0) + number(9) + struct.pack("<H", 1) + text(b"x"))
    with refused(errno.EINVAL):
        client.ask(p9.TWALK, number(0) + number(9) + struct.pack("<H", 17) + text(b"..") * 17)
    with refused(errno.ENOTDIR):
        client.walk(client.at("file"), b"x")
    client.clunk(client.last - 1)
    assert client.server._tree.nodes == 1


def test_fids_and_descriptors_are_bounded(client, folder, monkeypatch):
    before = descriptors()
    monkeypatch.setattr(server_module, "_MOST_FIDS", 3000)
    for n in range(2000):
        (folder / "a" / f"{n}").touch()
    for n in range(2000):
        client.at(f"a/{n}")
    assert descriptors() - before <= DESCRIPTORS // 4 + 1
    assert client.attributes(1)["path"] == (folder / "a" / "0").stat().st_ino  # found again
    with refused(errno.ENFILE):
        for _ in range(1000):
            client.walk(0)
    client.clunk(1)
    client.walk(0)


def test_more_files_are_open_than_there_are_descriptors(client, folder):
    before = descriptors()
    listing = client.open(client.at("a"))
    first = client.entries(listing, 0, 60)
    fids = [client.create(0, b"%d" % n, os.O_RDWR | os.O_TRUNC) for n in range(300)]
    for n, fid in enumerate(fids):
        client.write(fid, b"content %d" % n)
    for n, fid in enumerate(fids):  # none of which is truncated once more
        assert client.read(fid) == b"content %d" % n
    assert DESCRIPTORS // 2 < descriptors() - before <= DESCRIPTORS + 2
    rest = client.entries(listing, first[-1][2])
    assert {name for name, _, _ in first + rest} == {b".", b"..", b"b"} and rest
    client.set(fids[0], p9.SETATTR_SIZE, size=3)
    assert (folder / "0").read_bytes() == b"con"
    # The guest takes names away: what it has open is still there.
    client.unlink(0, b"1")
    client.rename(0, b"2", 0, b"3")
    client.remove(client.at("4"))
    client.ask(p9.TRENAME, number(client.at("5")) + number(0) + text(b"6"))
    for n in range(100, 300):
        client.read(fids[n])
    for n in range(1, 7):
        assert client.read(fids[n]) == b"content %d" % n
    # The host does.
    os.unlink(folder / "7")
    os.rename(folder / "8", folder / "9")
    for n in (7, 8, 9):
        with refused(errno.ESTALE, errno.ENOENT):
            client.read(fids[n])
    for fid in fids:
        client.clunk(fid)
    client.clunk(listing)
    assert descriptors() - before <= DESCRIPTORS // 4 + 2
    assert not client.server._opened and not client.server._opened._parked


def test_files_without_a_name_that_are_open_are_bounded(client):
    with refused(errno.ENFILE):
        for _ in range(DESCRIPTORS):
            client.create(0, b"x")
            client.unlink(0, b"x")
    assert len(client.server._opened) == DESCRIPTORS * 3 // 4
    with refused(errno.ENFILE):
        client.open(client.walk(0))
    client.clunk(client.last - 2)
    client.open(client.walk(0))


def test_a_file_is_not_removed_that_could_not_stay_open(client, folder):
    """More fids for one file than descriptors: they cannot all be kept beyond its end."""
    fids = [client.open(client.at("file")) for _ in range(DESCRIPTORS)]
    with refused(errno.ENFILE):
        client.unlink(0, b"file")
    for fid in fids:
        assert client.read(fid) == b"content"


def test_known_files_are_bounded(client, monkeypatch):
    monkeypatch.setattr(tree, "MOST_NODES", 4)
    kept = client.at("a/b/deep")
    with refused(errno.ENFILE):
        client.at("file")
    client.clunk(kept)
    client.at("file")
    client.clunk(client.last)
    assert client.server._tree.nodes == 1


def test_a_file_that_has_been_removed_can_be_used_while_it_is_open(client, folder):
    fid, other = client.open(client.at("file"), os.O_RDWR), client.at("file")
    client.unlink(0, b"file")
    client.write(fid, b"still here")
    assert client.read(fid) == b"still here"
    assert client.attributes(fid)["nlink"] == 0
    for n in range(100):
        (folder / f"{n}").touch()
        client.at(f"{n}")
    with refused(errno.ESTALE):
        client.attributes(other)
    (folder / "file").write_text("new")
    with refused(errno.ESTALE):
        client.attributes(other)
    assert client.attributes(client.at("file"))["size"] == 3


def test_a_fid_goes_along_when_a_folder_above_it_is_renamed(client, folder):
    fid = client.at("a/b")
    client.rename(0, b"a", 0, b"c")
    for n in range(100):  # so that it has to be found again
        (folder / f"{n}").touch()
        client.at(f"{n}")
    assert client.read(client.open(client.walk(fid, b"deep"))) == b"deep"
    client.create(fid, b"new")
    assert (folder / "c" / "b" / "new").exists()
    assert client.walk(fid, b"..", b"..", b"file")
    with refused(errno.EINVAL):
        client.rename(0, b"c", fid, b"inside")
    client.mkdir(0, b"empty")
    client.rename(client.at("c"), b"b", 0, b"empty")  # onto an empty one
    assert client.read(client.open(client.walk(fid, b"deep"))) == b"deep"
    client.link(0, client.at("file"), b"same")
    two = client.at("file"), client.at("same")
    client.rename(0, b"file", 0, b"same")  # two names of one file: nothing happens
    for n in range(100):
        client.at(f"{n}")
    assert [client.attributes(fid)["nlink"] for fid in two] == [2, 2]
