"""Clients of QMP that are slow, broken, hostile or many; nobody else suffers by them."""

import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from qmp_client import Client, Raw

from vmexit import After, ConfigError, EventKind, Machine, Point, RunState, StopReason
from vmexit.control import sink
from vmexit.control.qmp import QmpServer
from vmexit.control.qmp.server import MOST_CLIENTS

TIMEOUT = 60
# 0: inc dword [0x3000]; jmp 0
SPIN = bytes.fromhex("66ff060030 ebf9")
STATUS = b'{"execute":"query-status"}'


class Served:
    """A machine that runs, and where it listens."""

    def __init__(self, accel, path, **options):
        self.path = path
        self.vm = Machine(memory="1M", accel=accel, **options)
        self.vm.load_bytes(SPIN, at=0x1000)
        self.server = QmpServer(self.vm, f"unix:{path}")

    def close(self):
        self.server.close()
        self.vm.stop()
        self.vm.wait()
        self.vm.close()


@pytest.fixture
def served(accel, tmp_path, nothing_left):
    one = Served(accel, str(tmp_path / "qmp.sock"))
    one.vm.start(TIMEOUT)
    yield one
    one.close()


def error(answer, kind="GenericError"):
    assert answer["error"]["class"] == kind, answer
    return answer["error"]["desc"]


def test_a_fork_that_ends_takes_nothing_from_its_parent(accel, tmp_path):
    path, child, status = str(tmp_path / "qmp.sock"), -1, 1
    try:
        with Machine(memory="1M", accel=accel) as vm:
            vm.load_bytes(SPIN, at=0x1000)
            with QmpServer(vm, f"unix:{path}"):
                vm.start(TIMEOUT)
                with Raw(path) as client:
                    client.read()
                    child = os.fork()
                    if child:
                        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                        assert client.say(b'{"execute":"qmp_capabilities"}') == {"return": {}}
                if child:
                    with Client(path) as another:
                        assert another.execute("query-status")["running"]
            if child:
                vm.stop()
                assert vm.wait(TIMEOUT).reason is StopReason.STOPPED
        status = 0
    finally:
        if child == 0:
            os._exit(status)


def test_nothing_is_done_before_the_negotiation(served):
    with Raw(served.path) as client:
        greeting = client.read()["QMP"]
        assert greeting["capabilities"] == [] and set(greeting["version"]) == {"qemu", "package"}
        for line in (STATUS, b'{"execute":"foo"}', b'{"execute":"stop"}'):
            assert "qmp_capabilities" in error(client.say(line), "CommandNotFound")
        oob = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}'
        answer = client.say(oob)
        assert "oob" in error(answer) and answer["id"] == 1
        resumed = threading.Event()
        served.vm.subscribe(lambda e: e.kind is EventKind.RESUMED and resumed.set())
        served.vm.pause()  # no event comes before the negotiation
        served.vm.resume()
        assert resumed.wait(TIMEOUT)
        assert client.say(b'{"execute":"qmp_capabilities","id":null}') == {"return": {}, "id": None}
        assert "already complete" in error(
            client.say(b'{"execute":"qmp_capabilities"}'), "CommandNotFound"
        )
        assert client.say(STATUS)["return"]["running"] is True


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[]", "must be a JSON object"),
        (b"{}", "lacks member 'execute'"),
        (b'{"execute":1}', "'execute' must be a string"),
        (b'{"execute":"stop","arguments":[]}', "'arguments' must be an object"),
        (b'{"execute":"stop","control":{}}', "'control' is unexpected"),
        (b'{"exec-oob":"stop"}', "'exec-oob' is unexpected"),
        (b'{"exec-oob":"stop","execute":"stop"}', "clashes"),
        (b'{"execute":"memsave"}', "Parameter 'val' is missing"),
        (
            b'{"execute":"memsave","arguments":{"val":"1"}}',
            "Invalid parameter type for 'val', expected: integer",
        ),
        (b'{"execute":"balloon","arguments":{"value":1.0}}', "expected: integer"),
        (b'{"execute":"balloon","arguments":{"value":true}}', "expected: integer"),
        (b'{"execute":"balloon","arguments":{"value":18446744073709551616}}', "integer"),
        (
            b'{"execute":"dump-guest-memory","arguments":{"paging":0,"protocol":"file:x"}}',
            "Invalid parameter type for 'paging', expected: boolean",
        ),
        (
            b'{"execute":"dump-guest-memory","arguments":'
            b'{"paging":false,"protocol":"file:x","format":"zip"}}',
            "Parameter 'format' does not accept value 'zip'",
        ),
        (
            b'{"execute":"dump-guest-memory","arguments":'
            b'{"paging":false,"protocol":"file:x","begin":0}}',
            "Parameter 'length' is missing",
        ),
        (b'{"execute":"stop","arguments":{"x":1}}', "Parameter 'x' is unexpected"),
        (
            b'{"execute":"pmemsave","arguments":{"val":0,"size":1,"filename":"a\\u0000b"}}',
            "Could not open",
        ),
        (
            b'{"execute":"pmemsave","arguments":{"val":0,"size":-1,"filename":"/dev/null"}}',
            "Parameter 'size' expects a size",
        ),
        (b'{"execute":"system_powerdown"}', "power button"),
        (b'{"execute":"inject-nmi"}', "no interrupts"),
        (b'{"execute":"getfd","arguments":{"fdname":"x"}}', "No file descriptor"),
        (b"garbage here", "JSON parse error, stray 'g'"),
        (b"\xff\xfe", "JSON parse error, stray byte 0xff"),
        (b"[" * 100_000, "nested"),
    ],
)
def test_what_cannot_be_is_answered(served, line, words):
    with Raw(served.path) as client:
        client.negotiated()
        assert words in error(client.say(line))
        assert client.say(STATUS)["return"]["status"] == "running"


def test_unknown_things_have_their_own_class(served):
    with Raw(served.path) as client:
        client.negotiated()
        answer = client.say(b'{"execute":"foo","id":{"a":[1,"\\u00e9"]}}')
        assert error(answer, "CommandNotFound") == "The command foo has not been found"
        assert answer["id"] == {"a": [1, "é"]}
        for line in (b'{"execute":"query-balloon"}',
                     b'{"execute":"balloon","arguments":{"value":1}}'):  # fmt: skip
            error(client.say(line), "DeviceNotActive")


def test_several_values_on_a_line_and_one_on_several(served):
    with Raw(served.path) as client:
        client.negotiated()
        client.send(b'{"execute":"query-name","id":1}{"execute":\n"query-name"\n,"id":2} \n')
        assert [client.read()["id"] for _ in range(2)] == [1, 2]


def resident(pid: int) -> int:
    """The most that it has had, in bytes."""
    with open(f"/proc/{pid}/status") as file:
        (line,) = [line for line in file if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def test_a_line_of_64_mib(served):
    with Raw(served.path) as client:
        client.negotiated()
        before = resident(os.getpid())
        piece = b'{"execute":"' + b"x" * (1 << 16)
        for _ in range(1024):
            client.send(piece)
        assert "longer than" in error(client.say(b""))
        assert client.say(STATUS)["return"]["status"] == "running"
        assert resident(os.getpid()) < before + (16 << 20)


def test_half_of_a_message_and_gone(served):
    for how in (socket.SHUT_WR, socket.SHUT_RDWR, None):
        with Raw(served.path) as client:
            client.negotiated()
            client.send(b'{"execute":"st')
            if how is not None:
                client.socket.shutdown(how)
            if how is socket.SHUT_WR:
                assert client.read() is None  # the server closes its end, too
    with Raw(served.path) as client:
        client.negotiated()
        assert client.say(STATUS)["return"]["status"] == "running"


def test_one_who_does_not_read_holds_nobody_up(accel, tmp_path, nothing_left):
    one = Served(accel, str(tmp_path / "qmp.sock"), machine="microvm")
    one.vm.start(TIMEOUT)
    many = 20_000  # 1.7 MiB of events: more than waits for anyone
    with Raw(one.path) as slow, Raw(one.path) as other:
        slow.negotiated()
        other.negotiated()
        seen = []
        reader = threading.Thread(target=lambda: [seen.append(other.read()) for _ in range(many)])
        reader.start()
        for number in range(many):
            one.vm.press_power_button()
            while number - len(seen) > 5000:  # it does read, but it must get a turn
                threading.Event().wait(0.01)
        reader.join(TIMEOUT)
        told = 0
        while slow.read() is not None:  # what was sent is there, and then the end
            told += 1
        assert 0 < told < many
        assert len(seen) == many and {event["event"] for event in seen} == {"POWERDOWN"}
        assert other.say(STATUS)["return"]["status"] == "running"
    one.close()


def test_one_who_asks_and_does_not_read_answers(served):
    with Raw(served.path) as slow, Raw(served.path) as other:
        slow.negotiated()
        other.negotiated()
        slow.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):  # it is not listened to before it reads
            while True:
                slow.send(b'{"execute":"query-qmp-schema"}' * 100)
        assert other.say(STATUS)["return"]["status"] == "running"
        served.vm.pause()
        assert other.read()["event"] == "STOP"
        served.vm.resume()


def test_many_clients(served):
    clients = [Raw(served.path) for _ in range(50)]
    greetings = [client.read() for client in clients]
    assert sum("QMP" in greeting for greeting in greetings) == MOST_CLIENTS
    refused = [greeting for greeting in greetings if "QMP" not in greeting]
    assert all("too many clients" in error(greeting) for greeting in refused)
    for client in clients:
        client.__exit__()
    end = time.monotonic() + TIMEOUT
    while True:  # once their threads have ended there is room again
        with Raw(served.path) as client:
            if "QMP" in client.read():
                break
        assert time.monotonic() < end


def test_clients_see_what_others_do(served):
    with Client(served.path) as one, Client(served.path) as other:
        for _ in range(10):
            one.execute("stop")
            other.event("STOP")
            other.execute("cont")
            one.event("RESUME")


def test_a_brief_pause_is_no_event(served, tmp_path):
    with Raw(served.path) as client:
        client.negotiated()
        arguments = {"val": 0x1000, "size": len(SPIN), "filename": str(tmp_path / "m")}
        save = json.dumps({"execute": "pmemsave", "arguments": arguments}).encode()
        for _ in range(10):
            assert client.say(save) == {"return": {}}
        assert (tmp_path / "m").read_bytes() == SPIN


def test_a_descriptor_is_passed_on(served, tmp_path):
    with Raw(served.path) as client, open(tmp_path / "core", "wb") as file:
        client.negotiated()
        get = b'{"execute":"getfd","arguments":{"fdname":"out"}}'
        for _ in range(3):  # the last one of a name counts
            socket.send_fds(client.socket, [get], [file.fileno()])
            assert client.read() == {"return": {}}
        dump = b'{"execute":"dump-guest-memory","arguments":{"paging":false,"protocol":"fd:%s"}}'
        assert "named 'foo'" in error(client.say(dump % b"foo"))
        assert client.say(dump % b"out")["event"] == "DUMP_COMPLETED"
        assert client.read() == {"return": {}}
        assert "named 'out'" in error(client.say(dump % b"out"))
        assert (tmp_path / "core").stat().st_size == (1 << 20) + 4096
        socket.send_fds(client.socket, [get], [file.fileno()])
        assert client.read() == {"return": {}}
        close = b'{"execute":"closefd","arguments":{"fdname":"out"}}'
        assert client.say(close) == {"return": {}}
        assert "named 'out'" in error(client.say(close))


def test_a_dump_into_a_pipe_that_nobody_reads_ends_with_the_machine(accel, tmp_path, nothing_left):
    one = Served(accel, str(tmp_path / "qmp.sock"))
    os.mkfifo(tmp_path / "fifo")
    with Raw(one.path) as client:
        client.negotiated()
        protocol = f"file:{tmp_path / 'fifo'}"
        arguments = {"paging": False, "protocol": protocol}
        dump = json.dumps({"execute": "dump-guest-memory", "arguments": arguments}).encode()
        assert "Could not open" in error(client.say(dump))  # nobody has it open
        end = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        try:
            client.send(dump)
            one.vm.start(TIMEOUT)
            one.vm.stop()
            one.close()
        finally:
            os.close(end)


@pytest.mark.parametrize("command", ["memsave", "pmemsave"])
def test_so_does_what_the_monitor_saves(accel, tmp_path, nothing_left, monkeypatch, command):
    monkeypatch.setattr(sink, "_PATIENCE", 1e9)
    one = Served(accel, str(tmp_path / "qmp.sock"))
    os.mkfifo(tmp_path / "fifo")
    end = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    closing = threading.Thread(target=one.server.close)
    with Raw(one.path) as client:
        client.negotiated()
        line = {"command-line": f"{command} 0 0x80000 {tmp_path / 'fifo'}"}
        client.send(json.dumps({"execute": "human-monitor-command", "arguments": line}).encode())
        started = select.select([end], [], [], TIMEOUT)[0]
        closing.start()
        closing.join(TIMEOUT)
        ended = not closing.is_alive()
        os.close(end)
        closing.join()
    one.vm.close()
    assert started and ended


def test_a_part_of_memory_is_dumped(served, tmp_path):
    with Client(served.path) as qmp:
        where = f"file:{tmp_path / 'core'}"
        qmp.execute("dump-guest-memory", paging=False, protocol=where, begin=0x1000, length=4096)
    data = (tmp_path / "core").read_bytes()
    assert len(data) == 2 * 4096 and data[4096:].startswith(SPIN)
    assert struct.unpack_from("<QQQQ", data, 64 + 56 + 8) == (4096, 0x1000, 0x1000, 4096)


def test_quit_before_there_is_a_run(accel, tmp_path, nothing_left):
    one = Served(accel, str(tmp_path / "qmp.sock"))
    with Client(one.path) as qmp:
        assert qmp.execute("query-status") == {"running": False, "status": "prelaunch"}
        qmp.execute("quit")
        assert qmp.event("SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}
        stop = one.vm.run(TIMEOUT)
        assert (stop.reason, stop.status) == (StopReason.QUIT, 0)
    one.vm.start(0.01)
    one.close()


def test_who_quits_twice_is_told_once(served):
    with Raw(served.path) as client:
        client.negotiated()
        assert client.say(b'{"execute":"quit"}')["event"] == "SHUTDOWN"
        assert client.read() == {"return": {}}
        assert served.vm.wait(TIMEOUT).reason is StopReason.QUIT
        for _ in range(2):
            assert client.say(b'{"execute":"quit"}') == {"return": {}}
    assert served.vm.run(TIMEOUT).reason is StopReason.QUIT


def test_the_power_button_at_a_breakpoint(accel, tmp_path, nothing_left):
    one = Served(accel, str(tmp_path / "qmp.sock"), machine="microvm", serial="null")
    one.vm.decide(lambda stop: After.HOLD)
    one.vm.add_breakpoint(Point(0x1005))
    with Client(one.path) as qmp:
        one.vm.start(TIMEOUT)
        qmp.event("STOP")
        for _ in range(2):
            assert qmp.execute("query-status") == {"running": False, "status": "debug"}
            qmp.execute("system_powerdown")
            qmp.event("POWERDOWN")
        one.vm.remove_breakpoint(Point(0x1005))
        qmp.execute("cont")
        qmp.event("RESUME")
        qmp.execute("stop")
        qmp.event("STOP")
        assert qmp.execute("query-status") == {"running": False, "status": "paused"}
    one.close()


def test_two_servers_of_one_machine(served, tmp_path):
    second = str(tmp_path / "second.sock")
    server = QmpServer(served.vm, f"unix:{second}", name="x")
    with server, Client(second) as other, Client(served.path) as qmp:
        qmp.execute("quit")
        other.event("SHUTDOWN")
    assert served.vm.wait(TIMEOUT).reason is StopReason.QUIT


def test_tcp(accel, nothing_left):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=0x1000)
        with QmpServer(vm, "tcp:127.0.0.1:0") as server:
            kind, host, port = server.where.split(":")
            assert (kind, host) == ("tcp", "127.0.0.1")
            with Client((host, int(port))) as qmp:
                assert qmp.execute("query-status")["status"] == "prelaunch"


def test_only_the_owner_may_connect_and_the_path_goes(accel, tmp_path, nothing_left):
    path = tmp_path / "qmp.sock"
    with Machine(memory="1M", accel=accel) as vm:
        with QmpServer(vm, f"unix:{path}"):
            assert path.stat().st_mode & 0o777 == 0o600
            with pytest.raises(ConfigError, match="in use"):
                QmpServer(vm, f"unix:{path}")
            assert path.exists()
        assert not path.exists()
        for wrong in ("x", "unix:", "tcp:x", "unix:/nowhere/x", f"unix:{path},server=off",
                      f"unix:{path},nowait"):  # fmt: skip
            with pytest.raises(ConfigError):
                QmpServer(vm, wrong)


def test_the_end_reaches_who_reads(accel, tmp_path, nothing_left):
    path = str(tmp_path / "qmp.sock")
    for _ in range(10):
        with Machine(memory="1M", accel=accel) as vm:
            vm.load_bytes(b"\xf4", at=0x1000)
            with QmpServer(vm, f"unix:{path}"), Raw(path) as client:
                client.negotiated()
                assert vm.run(TIMEOUT).reason is StopReason.HALT
                vm_events = [client.read()["event"] for _ in range(2)]
            assert vm_events == ["RESUME", "SHUTDOWN"]


def test_a_subscriber_is_no_more_once_the_server_is_closed(accel, tmp_path):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=0x1000)
        seen = []
        vm.subscribe(lambda event: seen.append(event.kind))
        QmpServer(vm, f"unix:{tmp_path / 's'}").close()
        vm.run(0.05)
        assert seen == [EventKind.RESUMED, EventKind.PAUSED]
        assert vm.state is RunState.PAUSED


def test_nothing_is_loaded_that_is_not_asked_for():
    code = "import sys, vmexit.cli, vmexit.machine.machine; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.startswith("vmexit.control")]
