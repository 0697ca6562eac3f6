"""--metrics: what is served is what the guest did, and no client harms it."""

import os
import re
import socket
import stat
import threading
import time

import pytest
from command import GUESTS, ROOT, assert_one_line, vmexit
from scraping import Metrics, ask, parse, raw, scrape
from terminal import Terminal

from vmexit import ConfigError, ExitStats, Machine
from vmexit.control.metrics import MetricsServer, http

pytestmark = pytest.mark.usefixtures("nothing_left")

PORTS = GUESTS / "ports.bin"
LOOP = GUESTS / "out-loop.bin"

# What ports.bin does: exits, by direction and port.
ACCESSES = {
    ("io in", "0x20"): 3, ("io in", "0x24"): 3, ("io out", "0x20"): 3, ("io out", "0x10"): 6,
    ("io out", "0x24"): 3, ("io out", "0x8020"): 1,
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.sock"


def test_what_a_guest_did(accel, path):
    stats = ExitStats()
    with (
        Machine("1M", accel, image=PORTS, observer=stats) as vm,
        MetricsServer(vm, f"unix:{path}", stats),
    ):
        before = scrape(path)
        assert before.value("vmexit_state", state="created") == 1
        assert not before.named("vmexit_exits_total")
        vm.on_pio(0x10, write=lambda access: None)
        vm.run(10)
        after = scrape(path)
        rows = {
            (labels["reason"], labels["address"]): value
            for labels, value in after.named("vmexit_exits_total")
        }
        assert rows == {**ACCESSES, ("hlt", ""): 1}
        assert after.value("vmexit_exits_total", address="0x10")
        assert after.value("vmexit_exits_total", device="on_pio 0x10") == 6
        assert 0 < after.value("vmexit_exit_seconds_total", address="0x10") < 10
        assert after.value("vmexit_unclaimed_accesses_total", bus="pio", access="read") == 6
        assert after.value("vmexit_unclaimed_accesses_total", bus="pio", access="write") == 7
        assert after.value("vmexit_unclaimed_accesses_total", bus="mmio", access="write") == 0
        states = {labels["state"]: value for labels, value in after.named("vmexit_state")}
        assert states["shutdown"] == sum(states.values()) == 1
        assert after.value("vmexit_info", accelerator=accel, machine="bare") == 1
        assert after.value("vmexit_memory_bytes") == 1 << 20
        assert 0 < after.value("vmexit_memory_resident_bytes") <= 1 << 20
        assert after.value("process_cpu_seconds_total") > 0
        assert after.value("process_resident_memory_bytes") > 1 << 20
        assert abs(after.value("process_start_time_seconds") - time.time()) < 86400


def test_memory_is_resident_once_the_host_has_given_it(accel, path):
    with Machine("16M", accel) as vm, MetricsServer(vm, f"unix:{path}"):
        before = scrape(path).value("vmexit_memory_resident_bytes")
        vm.memory.write(8 << 20, b"x" * (4 << 20))
        assert scrape(path).value("vmexit_memory_resident_bytes") - before == 4 << 20
        vm.memory.discard(8 << 20, 4 << 20)
        assert scrape(path).value("vmexit_memory_resident_bytes") == before


def test_without_stats_nothing_is_told_of_exits(accel, path):
    with Machine("1M", accel, image=PORTS) as vm, MetricsServer(vm, f"unix:{path}"):
        vm.run(10)
        names = {name for name, _ in scrape(path)}
        assert "vmexit_unclaimed_accesses_total" in names
        assert not {name for name in names if "exit_seconds" in name or "exits_" in name}
        assert "vmexit_vcpu_seconds_total" not in names


def test_counters_never_go_down_while_vcpus_run(accel, path):
    stats = ExitStats()
    with (
        Machine("1M", accel, image=LOOP, observer=stats) as vm,
        MetricsServer(vm, f"unix:{path}", stats),
    ):
        vm.start()
        failures: list[str] = []
        done = threading.Semaphore(0)

        def watch() -> None:
            before = scrape(path)
            for _ in range(30):
                now = scrape(path)
                for key, value in before.items():
                    if key[0].endswith("_total") and now[key] < value:
                        failures.append(f"{key}: {value}, then {now[key]}")
                before = now
            done.release()

        threads = [threading.Thread(target=watch) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
            assert done.acquire(blocking=False)
        running = scrape(path)
        assert running.value("vmexit_state", state="running") == 1
        assert running.value("vmexit_exits_total", address="0x10") > 0
        assert running.value("vmexit_vcpu_seconds_total", vcpu="0", where="guest") > 0
        vm.pause()
        assert scrape(path).value("vmexit_state", state="paused") == 1
        vm.stop()
        vm.wait(10)
        assert not failures


def test_a_hostile_guest_makes_no_more_series_than_there_may_be(path):
    # mov edi, 0xd0000000; mov [edi], eax; add edi, 4; jmp back: another address each time.
    code = bytes.fromhex("bf000000d0 8907 83c704 ebf9")
    stats = ExitStats()
    with (
        Machine("1M", "soft", observer=stats) as vm,
        MetricsServer(vm, f"unix:{path}", stats),
    ):
        vm.load_bytes(code, mode="protected")
        end = time.monotonic() + 60
        while stats.total < ExitStats.MAX_ADDRESSES + 1000:
            assert time.monotonic() < end
            vm.run(0.1)  # to look meanwhile would take the interpreter from the guest
        vm.start()
        rows = scrape(path).named("vmexit_exits_total")
        vm.stop()
        vm.wait(10)
    assert len(rows) == ExitStats.MAX_ADDRESSES + 1
    assert sum(value for labels, value in rows if labels["address"] == "elsewhere") >= 1000


def test_names_are_quoted_as_the_format_wants_it(path):
    stats = ExitStats()
    with Machine("1M", "soft", observer=stats) as vm, MetricsServer(vm, f"unix:{path}", stats):
        name = 'a "device"\\ of\ntwo lines'
        vm._parts.pio.attach(0x10, 1, vm._parts.pio.devices()[0][2], name=name)
        stats.io(0, True, 0x10, 1, 1, b"\0")
        assert scrape(path).value("vmexit_exits_total", device=name) == 1


def test_the_docs_tell_of_all_metrics_and_of_no_others(path, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(4096))
    stats = ExitStats()
    options = {"machine": "microvm", "drives": [f"file={tmp_path / 'disk'}"], "balloon": 0}
    with (
        Machine("16M", "soft", observer=stats, **options) as vm,
        MetricsServer(vm, f"unix:{path}", stats),
    ):
        stats.left(0)
        stats.io(0, True, 0x10, 1, 1, b"\0")
        served = {name for name, _ in scrape(path)}
    page = (ROOT / "docs" / "metrics.md").read_text()
    told = {name for row in re.findall(r"^\| (`.*?) \|", page, re.M) for name in row.split(", ")}
    assert {name.strip("`") for name in told} == served


# Clients.


@pytest.fixture
def served(path):
    with Machine("1M", "soft") as vm, MetricsServer(vm, f"unix:{path}"):
        yield path
        assert ask(path).status == 200  # whatever was done to it


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    head, _, body = answer.partition(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length: "))
    assert len(body) in (int(length[16:]), 0)
    return int(answer[9:12])


def test_the_socket_is_the_users_own(served):
    mode = os.stat(served).st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600


def test_get_and_head(served):
    got = ask(served)
    assert got.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert int(got.headers["Content-Length"]) == len(got.body)
    head = ask(served, method="HEAD")
    assert (head.status, head.body) == (200, b"") and int(head.headers["Content-Length"]) > 1000
    bare = raw(served, b"HEAD /metrics HTTP/1.0\r\n\r\n")
    assert status(bare) == 200 and bare.endswith(b"\r\n\r\n")
    assert ask(served, "/metrics?name[]=up").status == 200
    assert ask(served, "http://localhost/metrics").status == 200


def test_what_there_is_not(served):
    assert ask(served, "/").status == 404
    assert ask(served, "/metrics/").status == 404
    assert ask(served, "http://localhost").status == 404
    refused = ask(served, method="POST")
    assert (refused.status, refused.headers["Allow"]) == (405, "GET, HEAD")


def test_an_old_client_and_one_that_types(served):
    assert status(raw(served, b"GET /metrics HTTP/1.0\r\n\r\n")) == 200
    assert status(raw(served, b"GET /metrics HTTP/1.1\nHost: x\n\n")) == 200


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: \0\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"\r\n\r\n", 400),
        (b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\nA: " + b"b" * 20000 + b"\r\n\r\n", 431),
    ],
)
def test_requests_that_cannot_be(served, request_, expected):
    assert status(raw(served, request_)) == expected


@pytest.mark.parametrize("piece", [b"x", b"\0", b"\xff\n", os.urandom(1)])
def test_a_very_long_line_is_not_read_to_its_end(served, piece):
    # Neither bytes beyond the bound nor those that are thrown away are kept.
    answer = raw(served, piece * ((64 << 20) // len(piece)))
    assert answer == b"" or status(answer) in (400, 431)


def test_the_answer_reaches_who_has_sent_too_much():
    with Machine("1M", "soft") as vm, MetricsServer(vm, "tcp:127.0.0.1:0") as server:
        port = int(server.where.rpartition(":")[2])
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port), 60) as client:
                client.sendall(b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 80000)
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1 << 16).startswith(b"HTTP/1.1 431 ")


def test_half_a_request(served):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(served))
        client.sendall(b"GET /metr")
        client.shutdown(socket.SHUT_WR)
        assert status(client.recv(1 << 16)) == 400


def test_one_who_says_nothing_is_cut_off(served, monkeypatch):
    monkeypatch.setattr(http, "_ASKING", 0.2)
    assert status(raw(served, b"")) == 408
    assert status(raw(served, b"GET /metrics HTTP/1.1\r\nHost: x\r\n")) == 408


def test_one_who_sends_byte_after_byte_is_cut_off(served, monkeypatch):
    monkeypatch.setattr(http, "_ASKING", 3)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(served))
        client.settimeout(0.01)
        answer = b""
        end = time.monotonic() + 60
        while not answer:
            assert time.monotonic() < end
            client.send(b"x")  # each within any time for one byte
            try:
                answer = client.recv(1 << 16)
            except TimeoutError:
                continue
        assert status(answer) == 408


def test_one_who_does_not_read_is_cut_off(path, monkeypatch):
    monkeypatch.setattr(http, "_TAKING", 0.2)
    stats = ExitStats()
    for address in range(ExitStats.MAX_ADDRESSES):  # more than a socket holds
        stats.mmio(0, True, address << 12, bytes(4))
    with Machine("1M", "soft") as vm, MetricsServer(vm, f"unix:{path}", stats) as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(str(path))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            answer = client.recv(1)
            end = time.monotonic() + 60
            while server._server._clients:
                assert time.monotonic() < end
            while piece := client.recv(1 << 16):
                answer += piece
        whole = ask(path)
        assert whole.status == 200 and len(answer) < len(whole.body)


def test_one_client_too_many(served, monkeypatch):
    idle = []
    for _ in range(16):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(served))
        idle.append(client)
    assert status(raw(served, b"GET /metrics HTTP/1.0\r\n\r\n")) == 503
    for client in idle:
        client.close()
    end = time.monotonic() + 60
    # Who is refused may find the socket closed before it has asked.
    while b" 200 " not in raw(served, b"GET /metrics HTTP/1.0\r\n\r\n")[:20]:
        assert time.monotonic() < end


def test_the_end_waits_for_no_client(path):
    with Machine("1M", "soft") as vm:
        server = MetricsServer(vm, f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET")
            server.close()
        assert not path.exists()


# The command.


def by_tcp(port: int) -> Metrics:
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while piece := client.recv(1 << 16):
            answer += piece
    return parse(answer.partition(b"\r\n\r\n")[2].decode())


def test_the_command_serves_by_tcp_and_says_where():
    options = ["--stats", "--metrics", "tcp:127.0.0.1:0", "--accel", "soft", "--serial", "null"]
    terminal = Terminal("run", str(LOOP), *options)
    try:
        terminal.expect(b"metrics at tcp:127.0.0.1:")
        terminal.expect(b"\r\n")
        port = int(terminal.output.split(b"metrics at tcp:127.0.0.1:")[1].split()[0])
        end = time.monotonic() + 60
        while not (rows := by_tcp(port).named("vmexit_exits_total")):  # it has just begun
            assert time.monotonic() < end
        assert rows[0][0] == {"reason": "io out", "address": "0x10", "device": ""}
        terminal.type(b"\x03")
        assert terminal.wait() == 130
    finally:
        terminal.close()


@pytest.mark.parametrize("where", ["nowhere", "unix:", "tcp:127.0.0.1:99999", "unix:/no/such/m"])
def test_an_address_that_cannot_be(where):
    done = vmexit("run", PORTS, "--accel", "soft", "--metrics", where)
    assert_one_line(done, 2, "use")


def test_an_address_that_cannot_be_in_python(path):
    with Machine("1M", "soft") as vm, pytest.raises(ConfigError, match="--metrics"):
        MetricsServer(vm, "here")
