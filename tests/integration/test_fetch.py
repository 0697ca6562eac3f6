"""`vmexit fetch`: real packages of Debian, and what it says where there are none."""

import gzip
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from command import VMEXIT, assert_one_line, vmexit

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
    with pytest.raises(ConfigError, match="no module 'loop'; is it loop2 or loop1"):
        modules.in_order(["loop"])


def test_modules_come_after_what_they_wish_for_if_that_is_there(tmp_path):
    soft = {
        "fs": "pre: crypto-sum missing post: behind",
        "sum_generic": "",
        "behind": "pre: plain",
        "plain": "",
    }
    for name, softdep in soft.items():
        source = tmp_path / f"{name}.s"
        source.write_text(f'.section .modinfo,"a"\n.asciz "depends="\n.asciz "softdep={softdep}"\n')
        subprocess.run(["as", "--64", "-o", tmp_path / f"{name}.ko", source], check=True)
    modules = Modules(
        [f"{name}.ko" for name in soft], [], lambda path: (tmp_path / path).read_bytes()
    )
    assert [name for name, _ in modules.in_order(["fs"])] == ["sum_generic", "fs"]
    assert [name for name, _ in modules.in_order(["behind"])] == ["plain", "behind"]


def test_virtio_devices_are_found_over_mmio(tmp_path):
    (tmp_path / "x.s").write_text("nop\n")
    subprocess.run(["as", "--64", "-o", tmp_path / "x.ko", tmp_path / "x.s"], check=True)
    content = (tmp_path / "x.ko").read_bytes()
    files = ["virtio_mmio.ko", "virtio-blk.ko", "ext4.ko", "9pnet_virtio.ko"]
    modules = Modules(files, [], lambda path: content)
    assert [n for n, _ in modules.in_order(["ext4", "virtio_blk"])] == [
        "virtio_mmio", "ext4", "virtio_blk",
    ]  # fmt: skip
    assert [n for n, _ in modules.in_order(["9pnet_virtio"])] == ["virtio_mmio", "9pnet_virtio"]
    assert [n for n, _ in modules.in_order(["ext4"])] == ["ext4"]


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
def test_a_network_that_leads_nowhere(tmp_path):
    nowhere = "http://127.0.0.1:9"
    env = {"http_proxy": nowhere, "https_proxy": nowhere, "XDG_CACHE_HOME": str(tmp_path)}
    done = vmexit("fetch", "debian", env=env)
    assert done.status == 4, done
    last = done.err.splitlines()[-1]
    assert "127.0.0.1" in last and "check the network" in last and "--kernel vmlinuz" in last
    assert "Traceback" not in done.err
    assert list((tmp_path / "vmexit/debian").iterdir()) == []


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


def test_each_version_of_a_kernel_keeps_its_own_files(tmp_path, monkeypatch):
    """Debian updates a kernel under the same name: modules must not meet another one's."""
    folder, version = tmp_path / "bin", tmp_path / "version"
    folder.mkdir()
    for name, script in {
        "apt-cache": "case $* in\n*depends*) echo '  Depends: linux-image-1-cloud-amd64';;\n"
        f"*) echo Version: $(cat {version});;\nesac\n",
        "apt-get": "touch a.deb\n",
        "dpkg-deb": f"mkdir -p $3/boot $3/bin; touch $3/bin/busybox\n"
        f"cp {version} $3/boot/vmlinuz-1-cloud-amd64\n",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    found = []
    for number in ("1", "2", "1"):
        version.write_text(number)
        found.append(debian.fetch("cloud-amd64", (), lambda what, done: None, tmp_path / "cache"))
        assert found[-1].kernel.read_text() == number
    assert found[0] == found[2] != found[1]
    assert found[0].kernel.read_text() == "1"


@pytest.fixture
def slow_apt(tmp_path, monkeypatch):
    """An apt that downloads for ever; the path of a file with its process id."""
    folder, pid = tmp_path / "bin", tmp_path / "pid"
    folder.mkdir()
    for name, script in {
        "apt-cache": "case $* in\n*depends*) echo '  Depends: linux-image-1-cloud-amd64';;\n"
        "*) echo Version: 1;;\nesac\n",
        "apt-get": f"echo half > half.deb.partial\necho $$ > {pid}\nexec sleep 300\n",
        "dpkg-deb": "",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield pid
    if pid.exists() and alive(number := int(pid.read_text())):
        os.kill(number, signal.SIGKILL)


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_fetch_that_is_ended_leaves_nothing_half_done(slow_apt, tmp_path, number):
    with subprocess.Popen(
        [*VMEXIT, "fetch", "debian"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as fetch:
        end = time.monotonic() + 30
        while not slow_apt.exists() or not slow_apt.read_text():
            assert time.monotonic() < end and fetch.poll() is None
            time.sleep(0.05)
        fetch.send_signal(number)
        status = fetch.wait(10)
        assert status != 0
        if number != signal.SIGKILL:  # apt ends, too
            while alive(int(slow_apt.read_text())):
                assert time.monotonic() < end
                time.sleep(0.05)
            assert b"Traceback" not in fetch.stderr.read()
        else:  # it holds our pipe
            os.kill(int(slow_apt.read_text()), signal.SIGTERM)
    left = list((tmp_path / "cache/vmexit/debian").iterdir())
    if number != signal.SIGKILL:
        assert left == []
        return
    (folder,) = left
    assert folder.name.startswith(".")
    debian._remove_old(folder.parent)  # it may still be under way
    assert folder.exists()
    os.utime(folder, (0, 0))
    debian._remove_old(folder.parent)
    assert not folder.exists()


@needs_apt
@pytest.mark.linux
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="to become another user one must be root")
def test_a_user_without_rights_fetches_into_a_home_of_his_own():
    # Not in tmp_path, which any other run of pytest closes to all but root.
    with tempfile.TemporaryDirectory() as home:
        _fetch_as_nobody(home)


def _fetch_as_nobody(home: str) -> None:
    nobody = 65534
    os.chown(home, nobody, nobody)
    found = subprocess.run(
        ["setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups", *VMEXIT, "fetch",
         "debian"],
        env={**os.environ, "HOME": home, "XDG_CACHE_HOME": ""},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    names = sorted(os.listdir(f"{home}/.cache/vmexit/debian"))
    assert [name.split("-")[0] for name in names] == ["initrd", "vmlinuz"]
