"""`vmexit fetch`: real packages of Debian, and what it says where there are none."""

import gzip
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from command import assert_one_line, vmexit

from vmexit.core.errors import ConfigError, HostError
from vmexit.fetch import cpio, debian
from vmexit.fetch.initramfs import init_script, initramfs
from vmexit.fetch.modules import Modules, module_name

needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is not here")


def test_an_archive_is_what_cpio_makes_of_it(tmp_path):
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed")
    entries = [
        cpio.folder("a"),
        cpio.file("a/text", b"five\n"),
        cpio.executable("a/run", b"#!/bin/sh\nexit 7\n"),
        cpio.file("a/empty", b""),
    ]
    subprocess.run(
        ["cpio", "-id", "--quiet"], input=cpio.archive(entries), cwd=tmp_path, check=True
    )
    assert (tmp_path / "a/text").read_bytes() == b"five\n"
    assert (tmp_path / "a/empty").read_bytes() == b""
    assert subprocess.run([tmp_path / "a/run"], check=False).returncode == 7


def test_the_same_files_make_the_same_archive():
    made = [initramfs(b"busybox", [("one", b"1"), ("two", b"2")]) for _ in range(2)]
    assert made[0] == made[1]
    names = gzip.decompress(made[0])
    assert b"modules/one.ko\0" in names
    assert "for module in one two; do insmod" in init_script(["one", "two"])


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/virtio-blk.ko", "virtio_blk"), ("x.ko.xz", "x"), ("x.ko.gz", "x"), ("x.kox", None)],
)
def test_names_of_modules(path, name):
    assert module_name(path) == name


def test_modules_come_after_what_they_need(tmp_path):
    needs = {"a": "b,c", "b": "d", "c": "d", "d": "", "loop1": "loop2", "loop2": "loop1"}
    for name, depends in needs.items():
        source = tmp_path / f"{name}.s"
        source.write_text(f'.section .modinfo,"a"\n.asciz "x=y"\n.asciz "depends={depends}"\n')
        subprocess.run(["as", "--64", "-o", tmp_path / f"{name}.ko", source], check=True)
    modules = Modules(
        [f"lib/{name}.ko" for name in needs],
        ["kernel/built-in.ko"],
        lambda path: (tmp_path / Path(path).name).read_bytes(),
    )
    assert [name for name, _ in modules.in_order(["a"])] == ["d", "b", "c", "a"]
    assert modules.in_order(["built_in"]) == []
    assert {name for name, _ in modules.in_order(["loop1"])} == {"loop1", "loop2"}
    with pytest.raises(ConfigError, match="no module 'loop'; it has loop1, loop2"):
        modules.in_order(["loop"])


@needs_apt
@pytest.mark.linux
@pytest.mark.timeout(300)
def test_debians_kernel_with_modules(tmp_path):
    told = []
    found = debian.fetch(
        "cloud-amd64", ["virtio_blk", "ext4"], lambda what, done: told.append(what), tmp_path
    )
    assert told
    archive = gzip.decompress(found.initrd.read_bytes())
    loaded = archive.partition(b"for module in ")[2].partition(b";")[0].decode().split()
    assert loaded.index("virtio") < loaded.index("virtio_blk")
    assert "ext4" not in loaded  # this kernel has it built in
    assert all(f"modules/{name}.ko".encode() in archive for name in loaded)
    told.clear()
    assert debian.fetch("cloud-amd64", ["ext4", "virtio_blk"], told.append, tmp_path) == found
    assert told == []  # it was all there
    assert [p.name for p in (tmp_path / "debian").iterdir() if p.name.startswith(".")] == []
    with pytest.raises(ConfigError, match="no module 'virtio_blkk'"):
        debian.fetch("cloud-amd64", ["virtio_blkk"], lambda what, done: None, tmp_path)


def test_a_flavour_that_there_is_not():
    assert_one_line(vmexit("fetch", "debian", "--flavour", "x"), 2, "invalid choice: 'x'")


def test_not_on_debian(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"apt-get is not here.*--kernel vmlinuz --initrd"):
        debian.fetch("amd64", (), lambda what, done: None, tmp_path)


@needs_apt
def test_offline_and_with_no_lists(tmp_path):
    if subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("unshare cannot make a network namespace here")
    (tmp_path / "lists/partial").mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(f'Dir::State::lists "{tmp_path}/lists";\n')
    done = vmexit(
        "fetch",
        "debian",
        env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "APT_CONFIG": str(tmp_path / "apt.conf")},
        prefix=("unshare", "-rn"),
    )
    assert done.status == 4, done
    assert "pass a kernel of your own" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


@needs_apt
def test_where_nothing_can_be_written():
    env = {"XDG_CACHE_HOME": "/proc/nothing"}
    done = vmexit("fetch", "debian", env=env)
    assert_one_line(done, 4, "cannot write")


@pytest.mark.linux
@needs_apt
@pytest.mark.timeout(300)
def test_copies_have_names_that_stay(tmp_path):
    done = vmexit("fetch", "debian", "--output", tmp_path / "out")
    assert done.status == 0, done
    assert done.out == f"kernel {tmp_path}/out/vmlinuz\ninitrd {tmp_path}/out/initrd.gz\n"
    assert sorted(os.listdir(tmp_path / "out")) == ["initrd.gz", "vmlinuz"]
    done = vmexit("fetch", "debian", "--output", "/proc/out")
    assert_one_line(done, 2, "/proc/out", "--output")
