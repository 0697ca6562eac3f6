"""Saving a snapshot is killed at any moment: what is there then is whole, or no snapshot."""

import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from vmexit import ConfigError, Machine, Snapshot
from vmexit.machine import snapshot_file

TIMEOUT = 60
MIB = 1 << 20


def fill(size: int, folder: Path) -> Path:
    """A saved machine with `size` bytes of memory in use, and something written to a disk."""
    (folder / "disk").write_bytes(bytes(MIB))
    options = {"machine": "microvm", "drives": [f"file={folder / 'disk'},snapshot=on"]}
    with Machine(size + 4 * MIB, "soft", serial="null", **options) as vm:
        vm.load_bytes(b"\xf4", at=0x1000)
        vm.memory.write(MIB, random.Random(1).randbytes(size))
        vm._parts.overlays["disk0"].write_from([memoryview(b"Z" * 4096)], 0x8000)
        with vm.snapshot() as snap:
            snap.save(folder / "source")
    return folder / "source"


def digest(folder: Path) -> str:
    """Of all that `load()` has found. Raises what it raises."""
    with Snapshot.load(folder) as snap:
        contents = snap._contents
        sums = [hashlib.sha256(repr(contents._replace(memory=None, disks=None)).encode())]
        for fd in (contents.memory.fd, *(disk.fd for disk in contents.disks.values())):
            sums.append(hashlib.sha256(os.pread(fd, os.fstat(fd).st_size, 0)))
        sums += [hashlib.sha256(disk.blocks + disk.digest) for disk in contents.disks.values()]
        return " ".join(one.hexdigest() for one in sums)


def look(folder: Path, expected: str) -> tuple[bool, bool]:
    """Whether a snapshot is there, and whether a part of one is, which no one can load."""
    snap = folder / "snap"
    if there := os.path.lexists(snap):
        assert digest(snap) == expected
    parts = list(folder.glob(".snap.*"))
    assert len(parts) <= 1 and not (there and parts)
    for part in parts:
        try:
            assert digest(part) == expected  # only the name was missing
        except ConfigError as error:
            assert "cannot be read as a snapshot" in str(error) or "damaged" in str(error)
        shutil.rmtree(part)
    shutil.rmtree(snap, ignore_errors=True)
    return there, bool(parts)


# Saves once in a fork of its own for each number that it reads, and kills itself before that line
# of the module that writes; tells whether it was killed.
AT_LINES = """
import os, signal, sys
from vmexit import Snapshot
from vmexit.machine import snapshot_file
left = 0

def trace(frame, event, argument):
    global left
    if frame.f_code.co_filename != snapshot_file.__file__:
        return None
    if event == "line":
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

with Snapshot.load(sys.argv[1]) as snap:
    for line in sys.stdin:
        left = int(line)
        child = os.fork()
        if not child:
            sys.settrace(trace)
            snap.save(sys.argv[2])
            os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)
"""


class Saver:
    """A program that forks for each line that it is told."""

    def __init__(self, program: str, source: Path, to: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, source, to],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # or select(2) would not see what has been read already
        )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def say(self, line: object) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        return self.read()

    def read(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def reads(self, seconds: float) -> bool:
        return bool(select.select([self.process.stdout], [], [], seconds)[0])


def test_a_kill_before_any_line_leaves_all_or_nothing(tmp_path):
    source = fill(32 << 10, tmp_path)
    expected, seen, whole = digest(source), [], False
    with Saver(AT_LINES, source, tmp_path / "snap") as saver:
        number = 0
        while not whole:
            number += 1
            whole = saver.say(number) == 0
            seen.append(look(tmp_path, expected))
    assert seen[-1] == (True, False) and number > 50
    # In this order: nothing, parts of one, and from one moment on all of it.
    stages = [(False, False), (False, True), (True, False)]
    assert [stage for n, stage in enumerate(seen) if n == 0 or seen[n - 1] != stage] == stages


# Saves once for each line, in a fork that it tells the number of, and how it ended. The number is
# nobody else's before the next line is there.
AT_MOMENTS = """
import os, sys
from vmexit import Snapshot
with Snapshot.load(sys.argv[1]) as snap:
    while sys.stdin.readline():
        child = os.fork()
        if not child:
            snap.save(sys.argv[2])
            os._exit(0)
        print(child, flush=True)
        print(os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT).si_status, flush=True)
        sys.stdin.readline()
        os.waitpid(child, 0)
"""


def test_a_kill_at_any_moment_leaves_all_or_nothing(tmp_path):
    source, chance = fill(12 * MIB, tmp_path), random.Random()
    expected, seen = digest(source), []
    with Saver(AT_MOMENTS, source, tmp_path / "snap") as saver:

        def save(seconds: float) -> int:
            """Kill it after so long; how it ended."""
            child = saver.say("save")
            if not saver.reads(seconds):
                os.kill(child, signal.SIGKILL)
            status = saver.read()
            assert saver.process.stdin is not None
            saver.process.stdin.write(b"seen\n")
            return status

        began = time.monotonic()
        assert save(TIMEOUT) == 0
        duration = time.monotonic() - began
        assert look(tmp_path, expected) == (True, False)
        for _ in range(60):
            status = save(chance.random() * duration)
            assert status in (0, signal.SIGKILL)
            seen.append(look(tmp_path, expected))
            assert status or seen[-1][0]
    assert (False, True) in seen  # or it was no test


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """As after a loss of power: what was written after its fsync(2) may not be there."""
    source = fill(2 * MIB, tmp_path)
    synced: dict[str, tuple[int, ...]] = {}
    names, order, fsync, rename = [], [], os.fsync, os.rename

    def status(path: str) -> tuple[int, ...]:
        found = os.stat(path)
        return found.st_ino, found.st_size, found.st_mtime_ns

    def note_fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        synced[path] = status(path)
        order.append(os.path.basename(path))
        fsync(fd)

    def note_rename(made: str, path: str) -> None:
        files = [made, *(os.path.join(made, name) for name in os.listdir(made))]
        assert {file: status(file) for file in files} == synced
        names.append(os.path.basename(made))
        order.append("rename")
        rename(made, path)

    monkeypatch.setattr(snapshot_file.os, "fsync", note_fsync)
    monkeypatch.setattr(snapshot_file.os, "rename", note_rename)
    with Snapshot.load(source) as snap:
        snap.save(tmp_path / "snap")
    (name,) = names
    files = ["memory", "disk0.written", "loaded", "state.json"]
    assert order == [*files, name, "rename", tmp_path.name]
    head, _, text = (tmp_path / "snap" / "state.json").read_bytes().partition(b"\n")
    assert json.loads(head)["sha256"] == hashlib.sha256(text).hexdigest()
