"""Ways out of a shared folder, and changes to one that is to be read only: there are none."""

import errno
import os
import socket
import stat

import pytest
from p9_client import Client, make_tree, number, refused, text

from vmexit.abi import p9
from vmexit.backends.p9.server import Server


@pytest.fixture
def folder(tmp_path):
    return make_tree(tmp_path)


@pytest.fixture
def client(folder):
    server = Server(str(folder), descriptors=64)
    client = Client(server)
    client.attach()
    yield client
    server.close()


@pytest.fixture
def reader(folder):
    """A client of the same folder, to be read only."""
    server = Server(str(folder), readonly=True, descriptors=64)
    client = Client(server)
    client.attach()
    yield client
    server.close()


BAD_NAMES = [b"", b".", b"..", b"/", b"a/b", b"../secret", b"/etc", b"x\0", b"\0", b"a/"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_none(client, folder, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    if name != b"..":
        with refused(errno.EINVAL):
            client.walk(0, name)
    with refused(errno.EINVAL):
        client.create(0, name)
    with refused(errno.EINVAL):
        client.mkdir(0, name)
    with refused(errno.EINVAL):
        client.symlink(0, name, b"x")
    with refused(errno.EINVAL):
        client.mknod(0, name, stat.S_IFREG)
    with refused(errno.EINVAL):
        client.link(0, client.at("file"), name)
    with refused(errno.EINVAL):
        client.rename(0, name, 0, b"new")
    with refused(errno.EINVAL):
        client.rename(0, b"file", 0, name)
    with refused(errno.EINVAL):
        client.ask(p9.TRENAME, number(client.at("file")) + number(0) + text(name))
    for flags in (0, p9.AT_REMOVEDIR):
        with refused(errno.EINVAL):
            client.unlink(0, name, flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_long_names(client, folder):
    longest = b"n" * 255
    client.create(0, longest)
    assert client.attributes(client.walk(0, longest))["size"] == 0
    for name in (b"n" * 256, b"n" * 60000):
        with refused(errno.ENAMETOOLONG):
            client.walk(0, name)
        with refused(errno.ENAMETOOLONG):
            client.create(0, name)
    with refused(errno.ENAMETOOLONG):
        client.symlink(0, b"l", b"x" * 4096)
    for target in (b"", b"x\0y"):
        with refused(errno.EINVAL):
            client.symlink(0, b"l", target)


def test_no_way_up(client, folder):
    path = client.attributes(0)["path"]
    for start in (0, client.at("a"), client.at("a/b")):
        assert client.attributes(client.walk(start, *[b".."] * 16))["path"] == path
    assert client.attributes(client.walk(0, b"a", b"..", b"..", b"file"))["size"] == 7


def test_symbolic_links_are_not_followed(client, folder, tmp_path):
    client.symlink(0, b"up", b"..")
    client.symlink(0, b"out", b"../secret")
    client.symlink(0, b"abs", os.fsencode(tmp_path / "share-not"))
    client.symlink(0, b"self", b"/proc/self/cwd")
    for name in ("up", "abs", "self"):
        with refused(errno.ENOTDIR):
            client.walk(client.at(name), b"x")
        for call in (client.create, client.mkdir):
            with refused(errno.ENOTDIR):
                call(client.at(name), b"x")
        with refused(errno.ENOTDIR):
            client.rename(0, b"file", client.at(name), b"x")
        with refused(errno.ENOTDIR):
            client.unlink(client.at(name), b"secret")
    for name in (b"up", b"out", b"abs"):
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            with refused(errno.ELOOP):
                client.open(client.walk(0, name), flags)
            with refused(errno.ELOOP):
                client.create(0, name, flags)
        with refused(errno.EEXIST):
            client.create(0, name, os.O_RDWR | os.O_EXCL)
        with refused(errno.EOPNOTSUPP):
            client.set(client.walk(0, name), p9.SETATTR_MODE, mode=0o777)
        with refused(errno.EINVAL):
            client.set(client.walk(0, name), p9.SETATTR_SIZE, size=0)
        bits = p9.SETATTR_MTIME | p9.SETATTR_MTIME_SET
        client.set(client.walk(0, name), bits, times=(0, 0, 1, 0))
        client.set(client.walk(0, name), p9.SETATTR_UID, uid=os.getuid())
        assert (folder / os.fsdecode(name)).lstat().st_mtime == 1
    assert (tmp_path / "secret").read_text() == "secret"
    assert (tmp_path / "secret").stat().st_mtime > 1 < (tmp_path / "share-not").stat().st_mtime
    assert os.listdir(tmp_path / "share-not") == []


def test_special_files_are_seen_and_never_opened(client, folder):
    os.mkfifo(folder / "fifo")  # to open it would wait for a writer
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        for name, kind in (("fifo", stat.S_IFIFO), ("socket", stat.S_IFSOCK)):
            fid = client.at(name)
            assert stat.S_IFMT(client.attributes(fid)["mode"]) == kind
            for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
                with refused(errno.EPERM):
                    client.open(fid, flags)
            with refused(errno.EINVAL):
                client.set(fid, p9.SETATTR_SIZE, size=0)
            client.set(fid, p9.SETATTR_MODE, mode=0o600)
            client.rename(0, os.fsencode(name), 0, b"x")
            client.unlink(0, b"x")


def test_devices_are_seen_and_never_opened(client, folder):
    try:
        os.mknod(folder / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    fid = client.at("null")
    assert client.attributes(fid)["rdev"] == os.makedev(1, 3)
    with refused(errno.EPERM):
        client.open(fid, os.O_RDWR)
    with refused(errno.EPERM):
        client.create(0, b"null")


def test_a_folder_that_the_host_moves_away_leads_nowhere(client, folder, tmp_path):
    fid, deep = client.at("a"), client.at("a/b")
    os.rename(folder / "a", tmp_path / "share-not" / "a")
    # What it names is still the folder that was shared; above it is the share, not its new place.
    path = client.attributes(0)["path"]
    assert client.attributes(client.walk(deep, b"..", b".."))["path"] == path
    for n in range(100):
        (folder / f"{n}").touch()
        client.at(f"{n}")
    for lost in (fid, deep):
        with refused(errno.ENOENT):
            client.attributes(lost)
    os.symlink(tmp_path / "share-not" / "a", folder / "a")
    with refused(errno.ESTALE, errno.ENOTDIR):
        client.walk(deep, b"deep")
    with refused(errno.ESTALE):
        client.create(fid, b"new")
    assert os.listdir(tmp_path / "share-not" / "a") == ["b"]


def test_a_name_that_the_host_has_given_to_another_file(client, folder):
    fid, kept = client.at("file"), client.at("file")
    os.rename(folder / "file", folder / "old")
    (folder / "file").write_text("another")
    with refused(errno.ESTALE):
        client.remove(fid)
    with refused(errno.ESTALE):
        client.rename(0, b"file", 0, b"x")
    assert client.attributes(kept)["size"] == 7
    client.at("file")  # the guest learns of it
    client.rename(0, b"file", 0, b"x")
    assert (folder / "x").read_text() == "another" and (folder / "old").exists()


def test_folders_that_the_host_turns_around_make_no_ring(client, folder):
    """What was above is below now; the guest's view of it stays a tree."""
    a, b = client.at("a"), client.at("a/b")
    os.rename(folder / "a" / "b", folder / "b")
    with refused(errno.EINVAL):
        client.rename(0, b"a", b, b"a")
    os.rename(folder / "a", folder / "b" / "a")
    assert client.walk(0, b"b", b"a")
    for fid in (a, b):
        client.walk(fid, b"..", b"..", b"..")
    client.server.reset()
    assert client.server._tree.nodes == 1


# To be read only.


def test_readonly_refuses_every_change(reader, folder):
    before = {p: (p.lstat().st_mtime_ns, p.lstat().st_ctime_ns) for p in folder.rglob("*")}
    fid, a = reader.at("file"), reader.at("a")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC, os.O_RDONLY | os.O_TRUNC):
        with refused(errno.EROFS):
            reader.open(fid, flags)
    with refused(errno.EROFS):
        reader.create(0, b"new")
    with refused(errno.EROFS):
        reader.create(0, b"file")
    with refused(errno.EROFS):
        reader.mkdir(0, b"new")
    with refused(errno.EROFS):
        reader.symlink(0, b"new", b"x")
    with refused(errno.EROFS):
        reader.link(0, fid, b"new")
    with refused(errno.EROFS):
        reader.mknod(0, b"new", stat.S_IFIFO)
    with refused(errno.EROFS):
        reader.rename(0, b"file", a, b"new")
    with refused(errno.EROFS):
        reader.ask(p9.TRENAME, number(fid) + number(a) + text(b"new"))
    with refused(errno.EROFS):
        reader.unlink(0, b"file")
    for bit in range(10):
        with refused(errno.EROFS):
            reader.set(fid, 1 << bit, mode=0o777)
    reader.open(fid)
    with refused(errno.EROFS):
        reader.write(fid, b"x")
    with refused(errno.EROFS):
        reader.remove(fid)
    with refused(errno.EBADF):  # it is gone all the same
        reader.clunk(fid)
    after = {p: (p.lstat().st_mtime_ns, p.lstat().st_ctime_ns) for p in folder.rglob("*")}
    assert before == after
    assert reader.read(reader.open(reader.at("a/b/deep"))) == b"deep"
    assert set(reader.names(reader.open(reader.walk(0)))) == {b".", b"..", b"a", b"file"}
