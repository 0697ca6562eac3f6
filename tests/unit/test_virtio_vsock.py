"""The socket device: real Unix sockets at one end, and a driver that can be wrong at the other."""

import os
import resource
import socket
import stat
import struct
import threading
from collections import deque
from contextlib import suppress

import pytest
from virtio_driver import Driver

from vmexit.abi import virtio as v
from vmexit.backends.vsock import VsockSockets
from vmexit.core.errors import ConfigError
from vmexit.core.loop import EventLoop
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio import vsock_connection
from vmexit.devices.virtio.vsock import Vsock
from vmexit.devices.virtio.vsock_packet import SIZE, Packet
from vmexit.machine.vsock import VsockOptions

pytestmark = pytest.mark.timeout(60)

CID, ROOM = 5, vsock_connection.BUF_ALLOC
BUFFERS, SENT, EVENT = 0x8_0000, 0x4_0000, 0x7_F000
RECEIVE, SEND = v.VSOCK_SHUTDOWN_F_RECEIVE, v.VSOCK_SHUTDOWN_F_SEND
RING = 128


class Guest:
    """The guest's side, packet by packet."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.failures: list[BaseException] = []
        self.loop = EventLoop(self.failures.append)
        self.memory = GuestMemory([(0, 1 << 20)])
        self.host = VsockSockets(path, self.loop)
        self.device = Vsock(CID, self.host)
        self.driver = Driver(self.device, self.memory)
        self.interrupts = threading.Semaphore(0)
        self.driver.lines.set_level = lambda gsi, level: level and self.interrupts.release()
        self.credit = ROOM
        self.forwarded = 0
        self.start()

    def start(self) -> None:
        self.driver.start(~(1 << v.F_EVENT_IDX), RING)
        self.rx, self.tx, self.event = self.driver.rings
        self.got: deque[tuple[Packet, bytes]] = deque()
        self.slot = 0

    def close(self) -> None:
        self.host.close()
        self.loop.close()
        self.memory.close()
        assert not self.failures

    def give(self, count: int, size: int = 4096) -> None:
        """Buffers for packets, each one a header and its payload."""
        for _ in range(count):
            slot = self.slot = (self.slot + 1) % RING
            self.rx.describe(slot, BUFFERS + 4096 * slot, size, v.DESC_F_WRITE)
            self.rx.offer(slot)
        self.driver.kick(v.VSOCK_RX)

    def look(self) -> None:
        """Take what has come."""
        for slot, size in self.rx.done():
            data = self.memory.read(BUFFERS + 4096 * slot, size)
            packet = Packet.unpack(data[:SIZE])
            assert packet.size == size - SIZE
            self.got.append((packet, data[SIZE:]))

    def packet(self) -> tuple[Packet, bytes]:
        """The next one that comes."""
        while True:
            self.driver.clock.fire()
            self.look()
            if self.got:
                return self.got.popleft()
            assert self.interrupts.acquire(timeout=20)

    def expect(self, op: int) -> Packet:
        packet, payload = self.packet()
        assert (packet.op, packet.src_cid, packet.dst_cid) == (op, 2, CID), packet
        assert packet.type == v.VSOCK_TYPE_STREAM and not payload and packet.buf_alloc in (0, ROOM)
        return packet

    def data(self, size: int) -> bytes:
        """So many bytes, in packets of data."""
        found = b""
        while len(found) < size:
            packet, payload = self.packet()
            assert packet.op == v.VSOCK_OP_RW, packet
            found += payload
        return found

    def quiet(self) -> bool:
        """Whether nothing comes, though buffers are there, after all that was done so far."""
        self.settle()
        return not self.got

    def settle(self) -> None:
        """Let the loop do what there is to do by now."""
        for _ in range(3):
            done = threading.Event()
            self.loop.timer(done.set).set(self.loop.now())
            assert done.wait(20)
        self.driver.clock.fire()
        self.look()

    def raw(self, packet: Packet, payload: bytes = b"") -> None:
        self.memory.write(SENT, packet.pack() + payload)
        parts = [(SENT, SIZE), (SENT + SIZE, len(payload))] if payload else [(SENT, SIZE)]
        self.tx.offer(self.tx.chain(parts, []))
        self.driver.kick(v.VSOCK_TX)

    def send(self, op: int, ports: tuple[int, int], payload: bytes = b"", flags: int = 0) -> None:
        """From the guest's first of the `ports` to the host's second."""
        self.raw(
            Packet(CID, 2, *ports, len(payload), 1, op, flags, self.credit, self.forwarded), payload
        )

    def rw(self, ports: tuple[int, int], payload: bytes) -> None:
        self.send(v.VSOCK_OP_RW, ports, payload)

    def listen(self, port: int) -> socket.socket:
        """What the guest can connect to."""
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{self.path}_{port}")
        server.listen(128)
        server.settimeout(20)
        return server

    def connect(self, guest_port: int, host_port: int) -> socket.socket:
        """A connection that the guest has begun; the host's end."""
        with self.listen(host_port) as server:
            self.give(1)
            self.send(v.VSOCK_OP_REQUEST, (guest_port, host_port))
            packet = self.expect(v.VSOCK_OP_RESPONSE)
            assert (packet.src_port, packet.dst_port) == (host_port, guest_port)
            connected, _ = server.accept()
        os.unlink(f"{self.path}_{host_port}")
        connected.settimeout(20)
        return connected

    def client(self, line: bytes) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(20)
        client.connect(self.path)
        if line:
            client.sendall(line)
        return client


@pytest.fixture
def guest(tmp_path):
    guest = Guest(str(tmp_path / "v.sock"))
    yield guest
    guest.close()


def read(connected: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connected.recv(size - len(data))
        assert part
        data += part
    return data


def test_the_configuration_is_the_cid(guest):
    assert guest.driver.registers.read(0x100, 4) == CID
    assert guest.driver.registers.read(0x104, 4) == 0
    assert guest.driver.get(v.MMIO_DEVICE_ID) == 19


def test_the_guest_connects_and_both_send(guest):
    with guest.connect(1000, 52) as host:
        guest.rw((1000, 52), b"from the guest")
        assert read(host, 14) == b"from the guest"
        guest.give(2)
        host.sendall(b"from the host")
        packet, payload = guest.packet()
        assert payload == b"from the host" and packet.op == v.VSOCK_OP_RW
        assert (packet.src_port, packet.dst_port, packet.fwd_cnt) == (52, 1000, 14)


def test_a_port_where_nobody_listens_is_reset(guest):
    guest.give(1)
    guest.send(v.VSOCK_OP_REQUEST, (1000, 52))
    packet = guest.expect(v.VSOCK_OP_RST)
    assert (packet.src_port, packet.dst_port) == (52, 1000)


def test_the_host_connects_and_both_send(guest):
    with guest.client(b"CONNECT 7\nearly") as host:  # what is behind the line is for the guest
        guest.give(4)
        packet = guest.expect(v.VSOCK_OP_REQUEST)
        assert packet.dst_port == 7 and packet.src_port >= 1 << 30
        ports = 7, packet.src_port
        assert guest.quiet()
        guest.send(v.VSOCK_OP_RESPONSE, ports)
        ok = b"OK %d\n" % ports[1]
        assert read(host, len(ok)) == ok
        assert guest.data(5) == b"early"
        guest.rw(ports, b"hello")
        assert read(host, 5) == b"hello"


def test_a_client_that_the_guest_refuses_is_closed(guest):
    with guest.client(b"connect 7\r\n") as host:
        guest.give(1)
        packet = guest.expect(v.VSOCK_OP_REQUEST)
        guest.send(v.VSOCK_OP_RST, (7, packet.src_port))
        assert host.recv(10) == b""


@pytest.mark.parametrize(
    "line",
    [b"CONNECT\n", b"CONNECT x\n", b"CONNECT -1\n", b"CONNECT 4294967296\n", b"HELLO 1\n", b"\n",
     b"CONNECT 1 2\n", b"C" * 32, b"CONNECT " + b"0" * 30 + b"1\n", b"\xff\xfe\n"],
)  # fmt: skip
def test_a_client_that_says_something_else_is_closed(guest, line):
    guest.give(1)
    # Reset, if it has said more than was read.
    with guest.client(line) as host, suppress(ConnectionResetError):
        assert host.recv(10) == b""
    assert guest.quiet()


def test_the_line_may_come_in_pieces(guest):
    with guest.client(b"CON") as host:
        guest.settle()
        host.sendall(b"NECT 1")
        guest.settle()
        host.sendall(b"2\n")
        guest.give(1)
        assert guest.expect(v.VSOCK_OP_REQUEST).dst_port == 12


def test_clients_that_say_nothing_keep_no_more_than_some_waiting(guest):
    """The others wait to be accepted, until one of those has gone or has had its time."""
    silent = [guest.client(b"") for _ in range(64)]
    guest.settle()
    with guest.client(b"CONNECT 9\n"):
        guest.give(1)
        for _ in range(20):
            guest.settle()
        assert len(guest.host._waiting) == 64 and not guest.got
        silent.pop().close()
        assert guest.expect(v.VSOCK_OP_REQUEST).dst_port == 9
    for client in silent:
        client.close()


def test_clients_have_to_go_after_their_time(guest, monkeypatch):
    monkeypatch.setattr("vmexit.backends.vsock._PATIENCE", 1)
    with guest.client(b"") as host:
        assert host.recv(10) == b""
    guest.settle()
    assert not guest.host._waiting and not guest.host._streams


def test_clients_wait_for_the_driver(guest):
    guest.driver.set(v.MMIO_STATUS, 0)
    with guest.client(b"CONNECT 9\n"):
        guest.settle()
        guest.start()
        guest.give(1)
        assert guest.expect(v.VSOCK_OP_REQUEST).dst_port == 9


def test_no_more_is_sent_than_the_guest_has_room_for(guest):
    guest.credit = 10_000
    with guest.connect(1000, 52) as host:
        data = os.urandom(50_000)
        host.sendall(data)
        guest.give(20)
        found = guest.data(10_000)
        guest.expect(v.VSOCK_OP_CREDIT_REQUEST)
        assert guest.quiet()
        for step in (1, 4095, 9000):
            guest.forwarded += step
            guest.send(v.VSOCK_OP_CREDIT_UPDATE, (1000, 52))
            found += guest.data(step)
            guest.expect(v.VSOCK_OP_CREDIT_REQUEST)
            assert guest.quiet()
        guest.credit = 1 << 31
        guest.give(20)
        guest.send(v.VSOCK_OP_CREDIT_UPDATE, (1000, 52))
        assert found + guest.data(len(data) - len(found)) == data


def test_a_count_that_cannot_be_gives_no_credit(guest):
    guest.forwarded = 1  # of nothing that was sent
    with guest.connect(1000, 52) as host:
        host.sendall(b"data")
        guest.give(3)
        guest.expect(v.VSOCK_OP_CREDIT_REQUEST)
        assert guest.quiet()
        guest.forwarded = 0
        guest.send(v.VSOCK_OP_CREDIT_UPDATE, (1000, 52))
        assert guest.data(4) == b"data"


def fill(guest: Guest, ports: tuple[int, int]) -> int:
    """Send as the credit allows, while the host does not read; how much has gone in all."""
    sent = fwd = 0
    block = bytes(32 << 10)
    while ROOM - (sent - fwd) >= len(block):
        guest.rw(ports, block)
        sent += len(block)
        guest.send(v.VSOCK_OP_CREDIT_REQUEST, ports)
        while True:
            packet, _ = guest.packet()
            assert packet.op == v.VSOCK_OP_CREDIT_UPDATE
            fwd = packet.fwd_cnt
            guest.give(1)
            guest.look()
            if not guest.got:
                break
    return sent


def test_what_the_host_does_not_read_waits_and_the_guest_has_to_stop(guest):
    with guest.connect(1000, 52) as host:
        guest.give(20)
        sent = fill(guest, (1000, 52))
        assert ROOM <= sent < 2 * ROOM
        (connection,) = guest.device._connections.values()
        assert len(connection._output) <= ROOM
        assert len(read(host, sent)) == sent
        packet, _ = guest.packet()  # there is room again
        assert packet.op == v.VSOCK_OP_CREDIT_UPDATE
        while packet.fwd_cnt < sent - ROOM // 2:
            packet, _ = guest.packet()
        guest.rw((1000, 52), b"more")
        assert read(host, 4) == b"more"


def test_more_than_the_credit_is_reset(guest):
    with guest.connect(1000, 52) as host:
        guest.give(20)
        sent = fill(guest, (1000, 52))
        guest.rw((1000, 52), bytes(64 << 10))
        guest.expect(v.VSOCK_OP_RST)
        assert not guest.device._connections
        try:
            while host.recv(1 << 16):
                pass
        except ConnectionResetError:
            pytest.fail("what came before is there to read")
        assert sent


def test_a_length_beyond_all_credit_is_reset_without_reading_it(guest):
    with guest.connect(1000, 52):
        guest.give(1)
        guest.raw(Packet(CID, 2, 1000, 52, 0xFFFF_FFFF, 1, v.VSOCK_OP_RW, 0, ROOM, 0))
        guest.expect(v.VSOCK_OP_RST)
        assert not guest.driver.broken


def test_the_guest_half_closes(guest):
    with guest.connect(1000, 52) as host:
        guest.rw((1000, 52), b"last words")
        guest.send(v.VSOCK_OP_SHUTDOWN, (1000, 52), flags=SEND)
        assert read(host, 10) == b"last words" and host.recv(1) == b""
        guest.give(4)
        host.sendall(b"answer")
        assert guest.data(6) == b"answer"
        guest.rw((1000, 52), b"once more")  # it has said that it would not
        guest.expect(v.VSOCK_OP_RST)


def test_the_host_half_closes(guest):
    with guest.connect(1000, 52) as host:
        host.sendall(b"x" * 5000)
        host.shutdown(socket.SHUT_WR)
        guest.give(4)
        assert guest.data(5000) == b"x" * 5000
        assert guest.expect(v.VSOCK_OP_SHUTDOWN).flags == SEND
        guest.rw((1000, 52), b"answer")
        assert read(host, 6) == b"answer"
        guest.send(v.VSOCK_OP_SHUTDOWN, (1000, 52), flags=SEND | RECEIVE)
        guest.expect(v.VSOCK_OP_RST)
        assert host.recv(1) == b"" and not guest.device._connections


def test_the_host_closes(guest):
    host = guest.connect(1000, 52)
    host.sendall(b"x" * 5000)
    host.close()
    guest.give(4)
    assert guest.data(5000) == b"x" * 5000
    assert guest.expect(v.VSOCK_OP_SHUTDOWN).flags == SEND | RECEIVE
    guest.rw((1000, 52), b"nobody is there")
    assert guest.quiet()
    guest.send(v.VSOCK_OP_RST, (1000, 52))
    assert guest.quiet() and not guest.host._streams


def test_the_host_closes_without_having_read_all(guest):
    """What it has sent arrives; a reset would take it from a guest that has not read it yet."""
    host = guest.connect(1000, 52)
    guest.rw((1000, 52), b"not read")
    host.sendall(b"sent")
    host.close()
    guest.rw((1000, 52), b"nobody is there")
    guest.give(4)
    kinds = [guest.packet() for _ in range(3)]
    assert {packet.op for packet, _ in kinds} == {v.VSOCK_OP_RW, v.VSOCK_OP_SHUTDOWN}
    assert b"".join(payload for _, payload in kinds) == b"sent"
    assert kinds[-1][0].flags == SEND | RECEIVE


def test_the_guest_reads_no_more(guest):
    with guest.connect(1000, 52) as host:
        guest.send(v.VSOCK_OP_SHUTDOWN, (1000, 52), flags=RECEIVE)
        with pytest.raises(BrokenPipeError):
            host.sendall(b"x")
        guest.rw((1000, 52), b"still")
        assert read(host, 5) == b"still"
        guest.give(1)
        guest.send(v.VSOCK_OP_SHUTDOWN, (1000, 52), flags=SEND)
        guest.expect(v.VSOCK_OP_RST)
        assert host.recv(1) == b""


def test_what_the_guest_sent_before_its_end_arrives_though_the_port_is_free_again(guest):
    with guest.connect(1000, 52) as first:
        guest.give(20)
        sent = fill(guest, (1000, 52))
        guest.send(v.VSOCK_OP_SHUTDOWN, (1000, 52), flags=SEND | RECEIVE)
        guest.expect(v.VSOCK_OP_RST)
        with guest.connect(1000, 52) as second:
            guest.rw((1000, 52), b"second")
            assert read(second, 6) == b"second"
            assert len(read(first, sent)) == sent and first.recv(1) == b""
        guest.settle()
        assert not guest.device._draining


def test_a_reset_of_the_guest_closes(guest):
    with guest.connect(1000, 52) as host:
        guest.give(1)
        guest.send(v.VSOCK_OP_RST, (1000, 52))
        assert host.recv(1) == b"" and guest.quiet()


OPS = [v.VSOCK_OP_RESPONSE, v.VSOCK_OP_SHUTDOWN, v.VSOCK_OP_RW, v.VSOCK_OP_CREDIT_UPDATE]
OPS += [v.VSOCK_OP_CREDIT_REQUEST, 0, 8, 0xFFFF]


@pytest.mark.parametrize("op", OPS)
def test_packets_of_unknown_connections_are_reset(guest, op):
    guest.give(1)
    guest.send(op, (1, 2))
    packet = guest.expect(v.VSOCK_OP_RST)
    assert (packet.src_port, packet.dst_port) == (2, 1)


@pytest.mark.parametrize("op", [*OPS[1:], v.VSOCK_OP_REQUEST])
def test_only_a_response_may_follow_a_request(guest, op):
    with guest.client(b"CONNECT 9\n") as host:
        guest.give(2)
        ports = 9, guest.expect(v.VSOCK_OP_REQUEST).src_port
        guest.send(op, ports)
        guest.expect(v.VSOCK_OP_RST)
        assert host.recv(1) == b""


@pytest.mark.parametrize("op", [v.VSOCK_OP_REQUEST, v.VSOCK_OP_RESPONSE, 0, 8, 0xFFFF])
def test_what_an_open_connection_has_no_use_for_resets_it(guest, op):
    with guest.connect(1000, 52) as host:
        guest.give(1)
        guest.send(op, (1000, 52))
        guest.expect(v.VSOCK_OP_RST)
        assert host.recv(1) == b"" and not guest.device._connections


def test_a_reset_is_never_answered(guest):
    guest.give(2)
    guest.send(v.VSOCK_OP_RST, (1, 2))
    guest.raw(Packet(CID, 7, 1, 2, 0, 1, v.VSOCK_OP_RST))
    assert guest.quiet()


def test_other_cids_and_types_are_reset(guest):
    with guest.listen(2):
        for packet in (
            Packet(CID, 7, 1, 2, 0, 1, v.VSOCK_OP_REQUEST),
            Packet(CID, 2 | 1 << 32, 1, 2, 0, 1, v.VSOCK_OP_REQUEST),
            Packet(CID, 2, 1, 2, 0, 2, v.VSOCK_OP_REQUEST),
        ):
            guest.give(1)
            guest.raw(packet)
            answer, _ = guest.packet()
            assert answer == packet.answer(v.VSOCK_OP_RST)
        guest.give(1)
        guest.raw(Packet(CID + 1, 2, 1, 2, 0, 1, v.VSOCK_OP_REQUEST))
        assert guest.quiet()


def test_short_buffers_lose_nothing(guest):
    data = os.urandom(3000)
    with guest.connect(1000, 52) as host:
        host.sendall(data)
        found = b""
        while len(found) < len(data):
            guest.give(1, SIZE + 97)
            found += guest.data(1)
        assert found == data
        host.sendall(b"x")
        guest.give(1, SIZE)  # no room for anything but what has no payload
        guest.expect(v.VSOCK_OP_CREDIT_UPDATE)
        guest.give(1, SIZE + 1)
        assert guest.data(1) == b"x"


def test_a_buffer_may_be_in_parts(guest):
    with guest.connect(1000, 52) as host:
        host.sendall(b"0123456789")
        parts = [(BUFFERS, 10), (BUFFERS + 10, SIZE - 10), (BUFFERS + SIZE, 3)]
        guest.rx.offer(guest.rx.chain([], parts))
        guest.driver.kick(v.VSOCK_RX)
        while not (done := guest.rx.done()):
            assert guest.interrupts.acquire(timeout=20)
        assert done == [(0, SIZE + 3)]
        assert guest.memory.read(BUFFERS + SIZE, 3) == b"012"


def test_without_buffers_the_host_is_not_read_and_nothing_is_lost(guest):
    data = os.urandom(3 << 20)
    guest.credit = 1 << 30
    with guest.connect(1000, 52) as host:
        sender = threading.Thread(target=host.sendall, args=(data,))
        sender.start()
        for _ in range(10):
            guest.settle()
        (connection,) = guest.device._connections.values()
        assert len(connection._input) <= 64 << 10 and sender.is_alive()
        guest.give(20)
        found = b""
        while len(found) < len(data):
            found += guest.data(1)  # of one packet
            guest.give(1)
        sender.join()
        assert found == data


def test_resets_that_cannot_be_sent_stop_the_guest(guest):
    """256 of them wait, and the rest of what the guest sends stays where it is."""
    guest.raw(Packet(CID, 2, 1, 0, 0, 1, v.VSOCK_OP_CREDIT_REQUEST))
    for _ in range(999):
        guest.tx.offer(0)
        guest.driver.kick(v.VSOCK_TX)
        guest.driver.clock.fire()
    assert 256 <= len(guest.device._resets) < 256 + RING and not guest.driver.broken
    waiting = len(guest.device._resets)
    assert len(guest.tx.done()) == waiting
    guest.tx.index = guest.memory.read_u16(guest.tx.used + 2)
    guest.tx.offer(*[0] * 100)
    for _ in range(waiting + 100):
        guest.give(1)
        guest.expect(v.VSOCK_OP_RST)
    guest.give(1)
    assert guest.quiet() and len(guest.tx.done()) == 100


def test_there_are_not_more_connections_than_may_be(guest):
    guest.device._most = 3
    opened = [guest.connect(1000 + n, 52) for n in range(3)]
    with guest.listen(52) as server:
        guest.give(1)
        guest.send(v.VSOCK_OP_REQUEST, (2000, 52))
        guest.expect(v.VSOCK_OP_RST)
        with guest.client(b"CONNECT 1\n") as client:
            assert client.recv(1) == b""
        guest.send(v.VSOCK_OP_RST, (1001, 52))
        guest.give(1)
        guest.send(v.VSOCK_OP_REQUEST, (2000, 52))
        guest.expect(v.VSOCK_OP_RESPONSE)
        server.accept()[0].close()
    for one in opened:
        one.close()


def test_there_are_descriptors_left_for_others(guest):
    assert guest.host.capacity == resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4


def test_without_descriptors_clients_wait_and_the_guest_is_refused(guest):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    taken: list[int] = []
    with guest.listen(52), socket.socket(socket.AF_UNIX) as client:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limit[1]))
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.dup(client.fileno()))
            client.connect(guest.path)
            client.sendall(b"CONNECT 9\n")
            guest.settle()
            guest.give(2)
            guest.send(v.VSOCK_OP_REQUEST, (1000, 52))
            guest.expect(v.VSOCK_OP_RST)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            for fd in taken:
                os.close(fd)
        assert guest.expect(v.VSOCK_OP_REQUEST).dst_port == 9


def test_64_connections_have_their_turn_each(guest):
    guest.credit = 1 << 20
    with guest.listen(52) as server:
        hosts = {}
        for port in range(64):
            guest.give(1)
            guest.send(v.VSOCK_OP_REQUEST, (port, 52))
            guest.expect(v.VSOCK_OP_RESPONSE)
            hosts[port], _ = server.accept()
        for port, host in hosts.items():
            host.sendall(bytes([port]) * 10_000)
        for _ in range(4):
            guest.settle()
        found = dict.fromkeys(hosts, b"")
        for turn in range(1, 4):
            for _ in range(64):
                guest.give(1)
                packet, payload = guest.packet()
                found[packet.dst_port] += payload
            assert {len(data) for data in found.values()} == {min(10_000, turn * (4096 - SIZE))}
        assert all(data == bytes([port]) * 10_000 for port, data in found.items())
        for host in hosts.values():
            host.close()


def test_a_reset_of_the_driver_closes_all(guest):
    with guest.connect(1000, 52) as one, guest.client(b"CONNECT 1\n") as two:
        guest.give(1)
        guest.expect(v.VSOCK_OP_REQUEST)
        guest.driver.set(v.MMIO_STATUS, 0)
        assert one.recv(1) == two.recv(1) == b""
        assert not guest.host._streams
        guest.start()
        guest.give(1)
        assert guest.quiet()
    with guest.connect(1000, 52) as host:
        guest.rw((1000, 52), b"again")
        assert read(host, 5) == b"again"


def test_a_restored_driver_is_told_of_the_reset(guest):
    guest.event.describe(0, EVENT, 4, v.DESC_F_WRITE)
    guest.memory.write_u32(EVENT, 0xFFFF_FFFF)
    guest.event.offer(0)
    guest.driver.kick(v.VSOCK_EVENT)
    with guest.connect(1000, 52) as host:
        state = guest.driver.registers.state()
        assert not guest.event.done()
        guest.driver.registers.restore(state)
        assert host.recv(1) == b""
        assert guest.event.done() == [(0, 4)]
        assert guest.memory.read_u32(EVENT) == v.VSOCK_EVENT_TRANSPORT_RESET
        guest.event.offer(0)
        guest.driver.kick(v.VSOCK_EVENT)
        assert not guest.event.done()  # once is enough
        guest.give(1)
        guest.rw((1000, 52), b"gone")
        guest.expect(v.VSOCK_OP_RST)


def test_a_restored_driver_is_told_when_it_has_a_buffer(guest):
    guest.driver.registers.restore(guest.driver.registers.state())
    guest.event.describe(0, EVENT, 4, v.DESC_F_WRITE)
    guest.event.offer(0)
    guest.driver.kick(v.VSOCK_EVENT)
    assert guest.event.done() == [(0, 4)]


def test_while_held_nothing_reaches_the_guest(guest):
    with guest.connect(1000, 52) as host:
        guest.give(4)
        guest.driver.registers.hold(True)
        host.sendall(b"data")
        with guest.client(b"CONNECT 1\n"):
            assert guest.quiet()
            guest.driver.registers.hold(False)
            packets = [guest.packet() for _ in range(2)]
        assert {packet.op for packet, _ in packets} == {v.VSOCK_OP_RW, v.VSOCK_OP_REQUEST}


@pytest.mark.parametrize("size", [1, SIZE - 1])
def test_a_buffer_without_room_for_a_header_breaks_the_device(guest, size):
    guest.give(1, size)
    guest.send(v.VSOCK_OP_RW, (1, 2))
    assert guest.driver.broken
    guest.start()
    guest.connect(1000, 52).close()


@pytest.mark.parametrize("size", [1, SIZE - 1, SIZE + 9])
def test_a_packet_that_is_too_short_breaks_the_device(guest, size):
    with guest.connect(1000, 52):
        packet = Packet(CID, 2, 1000, 52, 10, 1, v.VSOCK_OP_RW, 0, ROOM, 0)
        guest.memory.write(SENT, packet.pack() + bytes(10))
        guest.tx.offer(guest.tx.chain([(SENT, size)], []))
        guest.driver.kick(v.VSOCK_TX)
        assert guest.driver.broken


def test_a_socket_of_its_owner_that_goes_away_again(tmp_path):
    path = tmp_path / "v.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    loop = EventLoop(lambda error: None)
    host = VsockSockets(str(path), loop)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="in use"):
        VsockSockets(str(path), loop)
    host.close()
    assert not path.exists()
    loop.close()


@pytest.mark.parametrize("path", ["/nowhere/at/all", "x" * 97, "a\0b", ""])
def test_paths_that_cannot_be(path):
    loop = EventLoop(lambda error: None)
    with pytest.raises(ConfigError, match="use another path"):
        VsockSockets(path, loop)
    loop.close()


def test_options():
    assert VsockOptions.parse("path=/a") == ("/a", 3)
    assert VsockOptions.parse("cid=42,path=/a,,b") == ("/a,b", 42)
    assert VsockOptions.parse(f"cid={0xFFFF_FFFE},path=a").cid == 0xFFFF_FFFE
    for bad in ("", "cid=3", "path=", "cid=2,path=a", "cid=4294967295,path=a", "cid=x,path=a",
                "path=a,path=b", "path=a,port=1"):  # fmt: skip
        with pytest.raises(ConfigError, match="; "):
            VsockOptions.parse(bad)


def test_the_header_has_44_bytes():
    assert SIZE == 44
    data = Packet(*range(1, 11)).pack()
    assert struct.unpack("<QQIIIHHIII", data) == tuple(range(1, 11))
