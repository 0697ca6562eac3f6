"""vmexit snapshot: a machine that runs is saved by another process, and both go on from there."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import VMEXIT, assert_one_line, vmexit
from qmp_client import Client, Raw

from vmexit import Machine, Snapshot
from vmexit.control.qmp import QmpServer
from vmexit.machine import snapshot_file

TIMEOUT = 60
# Loaded at 0, begins at 0x1000. Answers each byte on its serial port by the next letter; q ends it.
# mov bl, 'a'; 2: mov dx, 0x3fd; in al, dx; test al, 1; jz 2; mov dx, 0x3f8; in al, dx;
# cmp al, 'q'; je 25; mov al, bl; out dx, al; inc bl; jmp 2; 25: hlt
LETTERS = bytes(0x1000) + bytes.fromhex(
    "b361 bafd03 ec a801 74f8 baf803 ec 3c71 7407 88d8 ee fec3 ebe9 f4"
)
SPIN = bytes.fromhex("ebfe")
ASK = b'{"execute":"x-snapshot-save","arguments":{"path":"%s"}}\n'


class Letters:
    """That guest in a process of the command, with pipes as its serial port."""

    def __init__(self, *words: object, prefix: tuple[object, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*map(str, prefix), *VMEXIT, "run", *map(str, words), "--timeout", str(TIMEOUT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )

    def __enter__(self) -> "Letters":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def next(self) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"x")
        return self.process.stdout.read(1).decode()

    def finish(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(b"q")
        return self.process.wait(TIMEOUT)


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "letters.bin"
    path.write_bytes(LETTERS)
    return path


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_both_go_on(accel, image, tmp_path, kind):
    where = f"unix:{tmp_path / 'qmp.sock'}" if kind == "unix" else f"tcp:127.0.0.1:{free_port()}"
    folder = tmp_path / "snap"
    with Letters(image, "--accel", accel, "-m", "2M", "--qmp", where) as guest:
        assert guest.next() + guest.next() == "ab"
        done = vmexit("snapshot", where, folder)
        assert (done.status, done.out) == (0, f"{folder}\n"), done.err
        assert done.err.splitlines()[-1].endswith(f"vmexit run --restore {folder}")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert guest.next() == "c"
        done = vmexit("snapshot", where, f"{folder}2")  # a later one, of what runs on
        assert done.status == 0, done.err
        assert guest.next() == "d"
        assert guest.finish() == 0
    for name, letters in (("snap", "cd"), ("snap", "cd"), ("snap2", "de")):
        with Letters("--restore", tmp_path / name) as guest:
            assert guest.next() + guest.next() == letters
            assert guest.finish() == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def qmp_of(path: Path) -> Iterator[Client]:
    while True:  # the process is just starting
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                break
    with Client(str(path)) as client:
        yield client


def test_it_is_left_paused_if_asked_for_or_as_it_was(accel, image, tmp_path):
    path = tmp_path / "qmp.sock"
    words = (image, "--accel", accel, "-m", "2M", "--qmp", f"unix:{path}", "--paused")
    with Letters(*words) as guest, qmp_of(path) as qmp:
        assert vmexit("snapshot", path, tmp_path / "0").status == 0
        assert qmp.execute("query-status")["status"] == "prelaunch"
        qmp.execute("cont")
        assert guest.next() == "a"
        assert vmexit("snapshot", path, tmp_path / "1", "--pause").status == 0
        qmp.event("STOP")
        assert qmp.execute("query-status")["status"] == "paused"
        assert vmexit("snapshot", path, tmp_path / "2").status == 0
        assert qmp.execute("query-status")["status"] == "paused"
        qmp.execute("cont")
        assert vmexit("snapshot", path, tmp_path / "2", "--pause").status == 1  # it is there
        assert qmp.execute("query-status")["status"] == "running"
        assert vmexit("snapshot", path, tmp_path / "no" / "such", "--pause").status == 1
        assert qmp.execute("query-status")["status"] == "running"
        assert guest.next() == "b"
        assert guest.finish() == 0
    for name, letter in (("0", "a"), ("1", "b"), ("2", "b")):
        with Letters("--restore", tmp_path / name) as guest:
            assert guest.next() == letter
            assert guest.finish() == 0


def test_the_folder_is_that_of_who_asks(image, tmp_path):
    (tmp_path / "here").mkdir()
    path = tmp_path / "qmp.sock"
    with Letters(image, "--accel", "soft", "-m", "2M", "--qmp", f"unix:{path}") as guest:
        assert guest.next() == "a"
        done = subprocess.run(
            [*VMEXIT, "snapshot", "../qmp.sock", "it's"],
            cwd=tmp_path / "here",
            capture_output=True,
            timeout=TIMEOUT,
            text=True,
        )
    assert done.stdout == f"{tmp_path}/here/it's\n"
    # What it says to do next can be pasted into a shell.
    command = done.stderr.splitlines()[-1].partition("vmexit run ")[2]
    shell = subprocess.run(
        ["bash", "-c", f'"$@" run {command}', "bash", *VMEXIT],
        input=b"xq",
        capture_output=True,
        timeout=TIMEOUT,
    )
    assert (shell.returncode, shell.stdout) == (0, b"b")


# What cannot be.


@contextmanager
def spinning(path: Path, **options: object) -> Iterator[Machine]:
    with Machine("2M", "soft", **options) as vm, QmpServer(vm, f"unix:{path}"):
        vm.load_bytes(SPIN, at=0x1000)
        vm.start()
        yield vm
        vm.stop()
        vm.wait(TIMEOUT)


def test_mistakes_are_one_line(tmp_path):
    path = tmp_path / "qmp.sock"
    done = vmexit("snapshot", path, tmp_path / "x")
    assert_one_line(done, 2, "cannot connect", "No such file", "--qmp")
    (tmp_path / "file").write_text("")
    assert_one_line(vmexit("snapshot", tmp_path / "file", tmp_path / "x"), 2, "refused", "--qmp")
    assert_one_line(vmexit("snapshot", "tcp:127.0.0.1:99999", "x"), 2, "no address")
    assert_one_line(vmexit("snapshot", path), 2, "DIR", "--help")
    with spinning(path):
        assert_one_line(vmexit("snapshot", path, tmp_path / "file"), 1, "exists already; use")
        for folder in ("/proc/x", tmp_path / "no" / "such", tmp_path / "file" / "x"):
            assert_one_line(vmexit("snapshot", path, folder), 1, str(folder), "use another path")
        assert_one_line(vmexit("snapshot", path, os.fsdecode(b"\xff")), 2, "use another path")
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.parametrize("path", [b"", b"/", b"a\\u0000b", b"x" * 5000, b"\\ud800", b"/dev/null/x"])
def test_a_path_that_cannot_be_is_an_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with spinning(tmp_path / "qmp.sock") as vm, Raw(str(tmp_path / "qmp.sock")) as client:
        client.negotiated().send(ASK % path)
        while "error" not in (answer := client.read()):
            assert answer.get("event") == "X_SNAPSHOT_PROGRESS"
        assert vm.state.value == "running"
        assert os.listdir(tmp_path) == ["qmp.sock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk needs root (CAP_SYS_ADMIN)")
def test_a_full_disk_leaves_nothing(image, tmp_path):
    disk, path = tmp_path / "disk", tmp_path / "qmp.sock"
    disk.mkdir()
    image.write_bytes(LETTERS + b"x" * 0x10000)
    script = f'mount -t tmpfs -o size=32k none {disk} && exec "$@"'
    within = ("unshare", "--mount", "sh", "-c", script, "sh")
    words = (image, "--accel", "soft", "-m", "2M", "--qmp", f"unix:{path}")
    with Letters(*words, prefix=within) as guest:
        assert guest.next() == "a"
        for _ in range(3):  # it is as full as it was
            done = vmexit("snapshot", path, disk / "snap")
            assert_one_line(done, 1, "No space left on device; use another path")
        assert os.listdir(f"/proc/{guest.process.pid}/root{disk}") == []
        assert guest.next() == "b"


@pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="no qemu-storage-daemon")
def test_a_device_that_cannot_be_saved_is_named(tmp_path):
    disk, path = tmp_path / "disk.qcow2", tmp_path / "qmp.sock"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    with spinning(path, machine="microvm", drives=[f"file={disk}"], serial="null") as vm:
        done = vmexit("snapshot", path, tmp_path / "snap", "--pause")
        assert_one_line(done, 1, "no snapshot is possible with disk0", ";")
        assert vm.state.value == "running"
    assert not (tmp_path / "snap").exists()


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no qemu-system-x86_64")
def test_another_program_with_qmp_is_told(tmp_path):
    path = tmp_path / "qmp.sock"
    words = ["-M", "none", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
    with subprocess.Popen(["qemu-system-x86_64", *words]) as process:
        try:
            with qmp_of(path):
                pass
            done = vmexit("snapshot", path, tmp_path / "snap")
            assert_one_line(done, 2, "is no vmexit that saves snapshots; give the --qmp of one")
        finally:
            process.kill()


# What happens meanwhile.


class Held:
    """The first write of a snapshot's memory waits until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        write = snapshot_file.write_at

        def held(*given: object) -> None:
            self.began.set()
            assert self.go.wait(TIMEOUT)
            write(*given)

        monkeypatch.setattr(snapshot_file, "write_at", held)


def test_it_runs_while_the_folder_is_written_and_tells_how_far_it_is(tmp_path, monkeypatch):
    held, folder = Held(monkeypatch), tmp_path / "snap"
    with (
        spinning(tmp_path / "qmp.sock") as vm,
        Raw(str(tmp_path / "qmp.sock")) as other,
        Raw(str(tmp_path / "qmp.sock")) as client,
    ):
        other.negotiated()
        client.negotiated().send(ASK % os.fsencode(folder))
        assert held.began.wait(TIMEOUT)
        assert vm.state.value == "running"
        assert other.say(b'{"execute":"query-name"}')["event"] == "X_SNAPSHOT_PROGRESS"
        assert "return" in other.read()
        assert not folder.exists()
        held.go.set()
        told = []
        while "return" not in (message := client.read()):
            assert message["event"] == "X_SNAPSHOT_PROGRESS"
            told.append(message["data"])
        assert {one["path"] for one in told} == {str(folder)}
        assert told[-1]["completed"] == told[-1]["total"] > 0
    Snapshot.load(folder).close()


def test_what_a_client_does_not_wait_for_is_given_up(tmp_path, monkeypatch):
    held, folder, path = Held(monkeypatch), tmp_path / "snap", tmp_path / "qmp.sock"
    with spinning(path), Raw(str(path)) as other:
        with subprocess.Popen([*VMEXIT, "snapshot", path, folder], stderr=subprocess.PIPE) as asks:
            assert held.began.wait(TIMEOUT)
            asks.send_signal(signal.SIGINT)
            assert asks.wait(TIMEOUT) == 130
        held.go.set()
        other.negotiated()
        end = time.monotonic() + TIMEOUT
        while os.listdir(tmp_path) != ["qmp.sock"]:
            assert time.monotonic() < end, os.listdir(tmp_path)
            assert "return" in other.say(b'{"execute":"query-status"}')
    assert os.listdir(tmp_path) == []


def test_the_end_of_the_machine_does_not_wait_for_it(tmp_path, monkeypatch):
    held, folder, path = Held(monkeypatch), tmp_path / "snap", tmp_path / "qmp.sock"
    with (
        Machine("2M", "soft") as vm,
        QmpServer(vm, f"unix:{path}") as server,
        Raw(str(path)) as client,
    ):
        vm.load_bytes(SPIN, at=0x1000)
        client.negotiated().send(ASK % os.fsencode(folder))
        assert held.began.wait(TIMEOUT)
        closing = threading.Thread(target=server.close)
        closing.start()
        assert server._closing.wait(TIMEOUT)
        held.go.set()
        closing.join(TIMEOUT)
        assert not closing.is_alive()
    assert os.listdir(tmp_path) == []
