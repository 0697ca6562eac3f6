"""vmexit top: what it shows of a machine, in a real terminal and for scripts; how it ends."""

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO

import pytest
from command import GUESTS, VMEXIT, assert_one_line, vmexit
from qmp_client import Client
from rich.console import Console
from terminal import Terminal

from vmexit import ConfigError, ExitStats, HostError, Machine
from vmexit.control import qmp_client as qmp
from vmexit.control.qmp import QmpServer
from vmexit.control.qmp_client import GoneError, QmpClient
from vmexit.top import once
from vmexit.top.rates import rates
from vmexit.top.sample import Exits, Flow, FlowName, Place, Sample, Spent, take
from vmexit.top.view import view

LOOP = GUESTS / "out-loop.bin"
PORTS = GUESTS / "ports.bin"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "qmp.sock"


@contextmanager
def running(path, accel: str, *options: str, image=LOOP) -> Iterator[subprocess.Popen]:
    """A machine of the command, which listens already."""
    command = [*VMEXIT, "run", str(image), "--accel", accel, "--serial", "null"]
    command += ["--timeout", "100", "--qmp", f"unix:{path}", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 60
        while True:
            assert time.monotonic() < end and process.poll() is None
            try:
                QmpClient(str(path)).close()
                break
            except ConfigError:
                continue
        yield process
    finally:
        process.kill()
        process.communicate()


# Of one moment.


def test_the_command_of_qmp_tells_what_counters_has(accel, path, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    stats = ExitStats()
    options = {"machine": "microvm", "drives": [f"file={tmp_path / 'disk'}"], "balloon": "1M"}
    with (
        Machine("16M", accel, observer=stats, **options) as vm,
        QmpServer(vm, f"unix:{path}", exits=stats),
        Client(str(path)) as client,
    ):
        vm._parts.pio.write(0x7777, 1, 0)
        told, here = client.execute("x-query-counters"), vm.counters()
        assert told["state"] == here.state.value == "created"
        assert (told["accelerator"], told["machine"], told["vcpus"]) == (accel, "microvm", 1)
        assert tuple(told["memory"].values()) == here.memory and here.memory.size == 16 << 20
        assert tuple(told["balloon"].values()) == here.balloon == (1 << 20, 0)
        assert [tuple(one.values()) for one in told["unclaimed"]] == list(here.unclaimed)
        assert here.unclaimed[0] == ("port", 0, 1)
        for one, device in zip(told["devices"], here.devices, strict=True):
            assert (one["name"], one["kind"]) == device[:2]
            assert [tuple(flow.values()) for flow in one["flows"]] == list(device.flows)
            assert one.get("waited-ns") == device.waited_ns
        assert [device.name for device in here.devices] == ["disk0", "balloon"]
        assert told["process"]["cpu-seconds"] > 0


def test_exits_have_the_name_of_their_device(path):
    stats = ExitStats()
    with (
        Machine("1M", "soft", image=PORTS, observer=stats) as vm,
        QmpServer(vm, f"unix:{path}", exits=stats),
        QmpClient(str(path)) as client,
    ):
        vm.on_pio(0x10, write=lambda access: None)
        vm.run(10)
        sample = take(client)
    assert sample.state == "shutdown" and sample.exits is not None
    assert sample.exits[Place("io out", "0x0010/1", "on_pio 0x10")].exits == 2
    assert sample.exits[Place("io in", "0x0020/4", "")].exits == 1
    assert sample.exits[Place("hlt", "", "")].exits == 1


# Of two.


def sample(seconds: float, exits: dict, flows: dict, spent: tuple, waited: float) -> Sample:
    return Sample(
        round(seconds * 1e9), "running", "soft", "microvm", 1, 1 << 30, 1 << 20, None, seconds / 2,
        1 << 20, 0.0, 0, flows, {"disk0": round(waited * 1e9)}, exits, {0: Spent(*spent)},
    )  # fmt: skip


def test_rates_are_what_is_new_by_the_time_between():
    busy, idle = Place("io out", "0x0010/1", "UART"), Place("hlt", "", "")
    new = Place("io in", "0x0020/1", "")
    disk = FlowName("disk0", "virtio-blk", "read")
    before = sample(10, {busy: Exits(100, 0), idle: Exits(5, 0)}, {disk: Flow(1, 10)}, (1, 1, 1), 1)
    exits = {busy: Exits(400, 30000), idle: Exits(5, 0), new: Exits(100, 7)}
    now = sample(12, exits, {disk: Flow(5, 4106)}, (4, 2, 1), 2)
    found = rates(before, now)
    assert found.exits is not None and found.vcpus is not None
    assert [one.place for one in found.exits] == [busy, new, idle]
    assert found.exits[0][1:] == (150.0, 0.75, 100.0, 400)
    assert found.exits[2][1:] == (0.0, 0.0, None, 5)
    assert found.exit_rate == 200 and found.cpu == 0.5
    assert found.vcpus[0] == (0, 0.75, 0.25, 0.0) and found.vcpus[0].doing == "running"
    assert found.flows[0][1:] == (2.0, 2048.0, 0.5)
    still = rates(now, now)
    assert still.vcpus is not None and still.vcpus[0].doing == "paused"


# For scripts.


def test_one_table(accel, path):
    with running(path, accel, "--stats"):
        done = vmexit("top", path, "--once", "--interval", "0.5")
    assert (done.status, done.err) == (0, "")
    assert re.search(rf"^vmexit  bare on {accel}  running  up 00:0", done.out)
    assert re.search(
        r"^memory 128 MiB, resident [\d.]+ KiB; unclaimed accesses \d+$", done.out, re.M
    )
    assert re.search(r"^0     (running|exits)  +[\d.]+%  +[\d.]+%  +[\d.]+%$", done.out, re.M)
    row = re.search(r"^io out  0x0010/1 +(\d+)  100\.0%  +[\d.]+  (\d+)$", done.out, re.M)
    assert row and int(row[1]) > 100 and int(row[2]) > int(row[1]) / 3


def test_without_stats_it_says_what_is_missing(path):
    with running(path, "soft"):
        done = vmexit("top", f"unix:{path}", "--once", "--interval", "0.1")
    assert done.status == 0 and "runs with --stats, too" in done.out and "vcpu" not in done.out


def test_by_tcp():
    with (
        Machine("1M", "soft") as vm,
        QmpServer(vm, "tcp:127.0.0.1:0") as server,
    ):
        assert "bare on soft  created" in once(server.where, 0.1)


def test_devices_are_shown():
    disk = FlowName("disk0", "virtio-blk", "read")
    before = sample(10, {}, {disk: Flow(1, 4096)}, (0, 0, 0), 0)
    now = sample(
        11, {}, {disk: Flow(11, 3 << 20), FlowName("x", "y", "z"): Flow(0, 0)}, (0, 0, 1), 0.25
    )
    console = Console(width=100, record=True, file=StringIO())
    console.print(view(rates(before, now)))
    text = console.export_text()
    assert re.search(r"disk0 +virtio-blk +read +10 +3\.0 MiB +25% +3\.0 MiB", text), text
    assert "waiting" in text and not re.search(r"^x ", text, re.M)


# In a terminal.


@pytest.fixture
def top() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        made.append(Terminal("top", *arguments))
        made[-1].expect(b"\x1b[?1049h")  # a screen of its own
        made[-1].expect(b"io out")
        return made[-1]

    yield start
    for one in made:
        one.close()


def left_as_it_was(terminal: Terminal) -> None:
    assert terminal.mode() == terminal.before
    assert terminal.output.count(b"\x1b[?1049l") == 1 and b"Traceback" not in terminal.output


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_a_key_quits(path, top, key):
    with running(path, "soft", "--stats") as machine:
        terminal = top(str(path), "--interval", "0.2")
        terminal.wait_until_raw()
        shown = terminal.output
        while terminal.output.count(b"io out") < 4:  # it goes on by itself
            terminal.expect(b"io out")
            terminal.take(0.1)
        assert shown != terminal.output
        terminal.type(b"x?")  # which mean nothing
        terminal.type(key)
        assert terminal.wait() == 0
        left_as_it_was(terminal)
        assert machine.poll() is None


def test_the_end_of_the_machine_is_told_at_once(path, top):
    with running(path, "soft", "--stats") as machine:
        terminal = top(str(path), "--interval", "3600")
        machine.terminate()
        assert terminal.wait() == 0
        left_as_it_was(terminal)
    assert terminal.output.endswith(b"vmexit: the machine has ended\r\n")


def test_a_termination_leaves_the_terminal_as_it_was(path, top):
    with running(path, "soft", "--stats"):
        terminal = top(str(path))
        terminal.process.terminate()
        assert terminal.wait() == 143
        left_as_it_was(terminal)


# What cannot be.


def test_mistakes_are_one_line(path, tmp_path):
    assert_one_line(vmexit("top", tmp_path / "none", "--once"), 2, "No such file", "--qmp")
    (tmp_path / "file").write_text("")
    assert_one_line(vmexit("top", tmp_path / "file", "--once"), 2, "refused")
    assert_one_line(vmexit("top", "tcp:127.0.0.1:99999", "--once"), 2, "no address")
    assert_one_line(vmexit("top", path, "--once", "--interval", "4000"), 2, "3600")
    assert_one_line(vmexit("top", path, "--once", "--interval", "0"), 2, "no time")
    assert_one_line(vmexit("top", path), 2, "no terminal", "--once")


Serve = Callable[[socket.socket], object]
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n{"return": {}}\r\n'


@contextmanager
def listening(path, serve: Serve) -> Iterator[None]:
    """Somebody who is no machine of vmexit's."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def main() -> None:
            client, _ = server.accept()
            with client:
                try:
                    serve(client)
                    client.settimeout(60)
                    while client.recv(1 << 16):
                        pass
                except OSError:
                    return

        thread = threading.Thread(target=main)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def endless(client: socket.socket) -> None:
    for _ in range(32 << 4):  # MiB, and all of it is more than is taken
        client.sendall(b" " * (1 << 16))
    client.sendall(GREETING)


@pytest.mark.parametrize(
    "serve",
    [
        lambda client: client.sendall(b"SSH-2.0-OpenSSH_9\r\n"),
        lambda client: client.sendall(b"[1]\n"),
        lambda client: client.sendall(b'{"hello": 1}\n'),
        lambda client: client.sendall(b"\xff\xfe\n"),
        lambda client: client.sendall(b"[" * 100000 + b"\n"),
        lambda client: client.shutdown(socket.SHUT_RDWR),
        endless,
    ],
)
def test_what_is_no_qmp(path, serve):
    with listening(path, serve), pytest.raises(ConfigError, match="is no QMP"):
        once(str(path), 0.1)


def test_who_says_nothing(path, monkeypatch):
    monkeypatch.setattr(qmp, "_PATIENCE", 0.2)
    with listening(path, lambda client: None), pytest.raises(ConfigError, match="is no QMP"):
        once(str(path), 0.1)


def test_who_does_not_answer(path, monkeypatch):
    monkeypatch.setattr(qmp, "_PATIENCE", 0.2)
    with (
        listening(path, lambda client: client.sendall(GREETING)),
        pytest.raises(HostError, match="does not answer"),
    ):
        once(str(path), 0.1)


EVENT = b'{"event": "STOP", "timestamp": {}}\r\n'


def only_events(client: socket.socket) -> None:
    client.sendall(GREETING)
    events = EVENT * 100000  # faster than anybody reads them
    end = time.monotonic() + 20
    while time.monotonic() < end:
        client.sendall(events)
    client.shutdown(socket.SHUT_RDWR)


def test_who_has_nothing_but_events(path, monkeypatch):
    monkeypatch.setattr(qmp, "_PATIENCE", 0.2)
    with (
        listening(path, only_events),
        QmpClient(str(path)) as client,
        pytest.raises(HostError, match="does not answer"),
    ):
        take(client)


def test_events_without_end_hold_up_no_key(path):
    sent = threading.Event()

    def serve(client: socket.socket) -> None:
        client.sendall(GREETING)
        client.recv(1 << 16)  # the negotiation
        client.sendall(EVENT * 2500)  # more than is read at once
        client.shutdown(socket.SHUT_RDWR)
        sent.set()

    with listening(path, serve), QmpClient(str(path)) as client:
        assert sent.wait(60)
        assert not client.ended()  # a key may be looked at
        assert any(client.ended() for _ in range(10))


def test_another_machine_than_vmexits(path):
    unknown = {"error": {"class": "CommandNotFound", "desc": "not found \x1b[31m"}}
    answer = GREETING + json.dumps(unknown).encode() + b"\r\n"
    with (
        listening(path, lambda client: client.sendall(answer)),
        pytest.raises(ConfigError, match="no machine of vmexit") as error,
    ):
        once(str(path), 0.1)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("told", [{}, [], {"time-ns": "x"}, {"memory": {}, "process": []}])
def test_answers_that_are_not_understood(path, told):
    event = b'{"event": "STOP", "timestamp": {}}\r\n'
    answer = GREETING + event + (json.dumps({"return": told}) + "\r\n").encode() * 2
    with (
        listening(path, lambda client: client.sendall(answer)),
        pytest.raises(ConfigError, match="same version"),
    ):
        once(str(path), 0.1)


COUNTERS = {
    "time-ns": 0, "state": "running", "accelerator": "soft", "machine": "bare", "vcpus": 0,
    "memory": {"size": 0, "resident": 0}, "balloon": {"actual": 0},
    "process": {"cpu-seconds": 0.0, "resident": 0, "started": 0.0},
    "devices": [
        {"name": "x", "kind": "y", "waited-ns": 0,
         "flows": [{"operation": "z", "operations": 0, "size": 0}]},
    ],
    "unclaimed": [{"reads": 0, "writes": 0}],
}  # fmt: skip
EXITS = {
    "rows": [{"reason": "io out", "address": 0, "size": 0, "exits": 0, "host-ns": 0}],
    "vcpus": [{"cpu-index": 0, "guest-ns": 0, "host-ns": 0, "elsewhere-ns": 0}],
}
NUMBERS = re.findall(r"\b0(?:\.0)?\b", json.dumps([COUNTERS, EXITS]))


class Answering(QmpClient):
    """One whose numbers, all of them 0, are these."""

    def __init__(self, numbers: list[float]) -> None:
        left = iter(numbers)
        text = json.dumps([COUNTERS, EXITS])
        text = re.sub(r"\b0(?:\.0)?\b", lambda _: json.dumps(next(left)), text)
        self._answers = dict(
            zip(("x-query-counters", "x-query-exits"), json.loads(text), strict=True)
        )

    def execute(self, command: str) -> qmp.Json:
        return self._answers[command]


@pytest.mark.parametrize(
    "odd",
    [float("nan"), float("-inf"), float("inf"), 1 << 4096, -1 << 4096],
    ids=["NaN", "-Infinity", "Infinity", "huge", "-huge"],
)
def test_numbers_that_cannot_be(odd):
    for at in range(len(NUMBERS)):
        numbers: list[float] = [0] * len(NUMBERS)
        numbers[at] = odd
        with pytest.raises(ConfigError, match="same version"):
            take(Answering(numbers))


def test_the_largest_numbers_are_shown():
    moments = [take(Answering([one] * len(NUMBERS))) for one in (1 - (1 << 64), (1 << 64) - 1)]
    for before in moments:
        for now in moments:
            Console(file=StringIO()).print(view(rates(before, now)))


def test_the_machine_ends_before_the_table(path, tmp_path):
    with (
        Machine("1M", "soft") as vm,
        QmpServer(vm, f"unix:{tmp_path / 'real'}"),
        Client(str(tmp_path / "real")) as client,
    ):
        counters = {"return": client.execute("x-query-counters")}
    answers = [*GREETING.splitlines(), json.dumps(counters).encode(), b'{"error": {}}']

    def serve(client: socket.socket) -> None:
        client.sendall(answers[0] + b"\n")
        for answer in answers[1:]:
            client.recv(1 << 16)
            client.sendall(answer + b"\n")
        client.shutdown(socket.SHUT_RDWR)

    with listening(path, serve):
        done = vmexit("top", path, "--once", "--interval", "3600")
    assert (done.status, done.out, done.err) == (0, "", "vmexit: the machine has ended\n")


def test_the_end_between_two_answers(path):
    with Machine("1M", "soft") as vm:
        server = QmpServer(vm, f"unix:{path}")
        with QmpClient(str(path)) as client:
            take(client)
            server.close()
            assert client.ended()
            with pytest.raises(GoneError):
                take(client)
