"""`vmexit run --qmp`: the process, its status, and what clients hear of its end."""

import os
import signal
import socket
import subprocess

import pytest
from command import GUESTS, VMEXIT, assert_one_line, vmexit
from qmp_client import Client, Raw

TIMEOUT = 60
# Images are loaded at 0 and begin at 0x1000.
SPIN = bytes(0x1000) + bytes.fromhex("ebfe")  # jmp to itself
HALTS = bytes(0x1000) + b"\xf4"
CRASHES = (GUESTS / "triple-fault.bin").read_bytes()


@pytest.fixture
def run(accel, tmp_path):
    """Start a flat image with a QMP socket; the process, and the path of the socket."""
    processes = []

    def start(code, *more):
        image, path = tmp_path / "image.bin", tmp_path / "qmp.sock"
        image.write_bytes(code)
        words = [*VMEXIT, "run", image, "--accel", accel]
        words += ["--qmp", f"unix:{path}", "--serial", "null", "--paused", *more]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        while True:
            assert process.poll() is None, process.stderr.read()
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    return process, str(path)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_an_end_by_the_guest(run):
    process, path = run(HALTS)
    with Client(path) as qmp:
        assert qmp.execute("query-status")["status"] == "prelaunch"
        qmp.execute("cont")
        qmp.event("RESUME")
        assert qmp.event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
    assert process.wait(TIMEOUT) == 0
    assert not os.path.exists(path)


def test_a_crash(run):
    process, path = run(CRASHES, "--mode", "protected")
    with Client(path) as qmp:
        qmp.execute("cont")
        assert qmp.event("GUEST_PANICKED") == {"action": "poweroff"}
        assert qmp.event("SHUTDOWN") == {"guest": True, "reason": "guest-panic"}
    assert process.wait(TIMEOUT) == 3
    assert "rip=" in process.stderr.read()


def test_a_crash_that_is_held(run):
    process, path = run(CRASHES, "--mode", "protected", "--action", "panic=pause")
    with Client(path) as qmp:
        qmp.execute("cont")
        assert qmp.event("GUEST_PANICKED") == {"action": "pause"}
        qmp.event("STOP")
        assert qmp.execute("query-status") == {"running": False, "status": "guest-panicked"}
        assert "no memory" not in qmp.monitor("xp/1xb 0x1000")
        qmp.execute("system_reset")
        assert qmp.event("RESET")["guest"] is False
        assert qmp.execute("query-status")["status"] == "paused"
        qmp.execute("cont")
        qmp.event("GUEST_PANICKED")
        qmp.execute("quit")
    assert process.wait(TIMEOUT) == 0


def test_a_signal(run):
    process, path = run(SPIN)
    with Client(path) as qmp:
        qmp.execute("cont")
        qmp.event("RESUME")
        process.send_signal(signal.SIGTERM)
        assert qmp.event("SHUTDOWN") == {"guest": False, "reason": "host-signal"}
    assert process.wait(TIMEOUT) == 143


def test_time_that_runs_out(run):
    process, path = run(SPIN, "--timeout", "1")
    with Client(path) as qmp:
        assert qmp.event("SHUTDOWN") == {"guest": False, "reason": "host-signal"}
    assert process.wait(TIMEOUT) == 124


def test_who_does_not_read_does_not_hold_up_the_end(run):
    process, path = run(SPIN)
    with Raw(path) as stuck, Client(path) as qmp:
        stuck.negotiated()
        stuck.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                stuck.socket.send(b'{"execute":"query-qmp-schema"}' * 1000)
        qmp.execute("quit")
        assert process.wait(TIMEOUT) == 0


def test_what_is_wrong_is_one_line(tmp_path):
    image = tmp_path / "image.bin"
    image.write_bytes(HALTS)
    for words, *expected in (
        (["--paused"], "--qmp"),
        (["--qmp", "foo"], "--qmp", "unix:PATH"),
        (["--qmp", "unix:/nowhere/x"], "cannot listen", "No such file"),
        (["--qmp", f"unix:{tmp_path}/x,server=off"], "cannot connect"),
        (["--qmp", "unix:/tmp/x,server=maybe"], "server=maybe"),
        (["--action", "foo=bar"], "foo=bar"),
        (["--action", "reboot=bar"], "exit, pause or reset"),
        (["-S"], "--paused"),
        (["-qmp", "x"], "--qmp"),
    ):
        done = vmexit("run", image, "--accel", "soft", *words)
        assert_one_line(done, 2, *expected)
