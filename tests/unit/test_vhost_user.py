"""Devices that another program serves, with a back end that we script, also to do wrong."""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest
from vhost_back_end import BackEnd
from virtio_driver import Driver

from vmexit.abi import vhost_user as u
from vmexit.abi import virtio as v
from vmexit.backends.program import Program
from vmexit.backends.vhost_ring import SLOTS, RingMemory
from vmexit.backends.vhost_user import Shared, VhostUser
from vmexit.core.errors import HostError
from vmexit.core.loop import EventLoop
from vmexit.core.memory import GuestMemory
from vmexit.core.rate import Limit
from vmexit.devices.virtio.vhost import Vhost

RINGS = 1 << 40
BUFFERS = 0x8_0000


class Peer(BackEnd):
    """With our end of the connection, and a configuration that can be told from zeros."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        super().__init__(theirs)
        data = u.CONFIG.pack(0, 60, 0) + b"c" * 60
        header = u.HEADER.pack(u.GET_CONFIG, u.VERSION | u.REPLY, len(data))
        self.wrong[u.GET_CONFIG] = header + data

    def connect(self) -> socket.socket:
        return self.ours


class Machine:
    """A driver, a device, and what is between it and the peer."""

    def __init__(self, peer: Peer, patience: float = 0, limit: Limit | None = None) -> None:
        self.memory = GuestMemory([(0, 1 << 20)])
        self.failures: list[BaseException] = []
        self.failed = threading.Event()
        self.loop = EventLoop(self.fail)
        self.peer = peer
        shared = [
            Shared(r.gpa, r.size, r.hva, self.memory.fd, offset)
            for r, offset in self.memory.shared()
        ]
        self.backend = VhostUser(
            "the peer", lambda: self.peer.connect(), self.loop, shared, 1, RINGS
        )
        self.device = Vhost(
            v.BLOCK, self.backend, 1 << 9, self.backend.config(60), [256], self.loop, self.fail,
            patience, limit,
        )  # fmt: skip
        self.driver = Driver(self.device, self.memory)

    def fail(self, error: BaseException) -> None:
        self.failures.append(error)
        self.failed.set()

    def close(self) -> None:
        self.loop.close()
        self.backend.close()
        self.memory.close()


@pytest.fixture
def make():
    made: list[Machine] = []
    peers: list[Peer] = []

    def make(peer: Peer | None = None, **options) -> Machine:
        peers.append(peer or Peer())
        made.append(Machine(peers[-1], **options))
        return made[-1]

    before = open_files()
    yield make
    for machine in made:
        machine.close()
        machine.peer.close()
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.close()
    for peer in peers:
        peer.ours.close()
    assert open_files() == before


def open_files() -> int:
    """How many sockets and eventfds there are."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(link.startswith(("socket:", "anon_inode:")) for link in links)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


class Server:
    """The device's half of the ring that the peer was given, in our own memory."""

    def __init__(self, machine: Machine) -> None:
        self.ring = machine.backend._rings[0]
        self.view, self.machine = self.ring._view, machine

    def offered(self) -> list[list[tuple[int, int, int]]]:
        """The tables of all requests so far: address, size, flags."""
        found = []
        (end,) = struct.unpack_from("<H", self.view, 0x1002)
        for index in range(end):
            (slot,) = struct.unpack_from("<H", self.view, 0x1004 + 2 * (index % SLOTS))
            at, size, flags, _ = struct.unpack_from("<QIHH", self.view, 16 * slot)
            assert flags == v.DESC_F_INDIRECT and at - RINGS >= 0x3000
            parts = [
                struct.unpack_from("<QIHH", self.view, at - RINGS + n) for n in range(0, size, 16)
            ]
            found.append([(gpa, length, flags) for gpa, length, flags, _ in parts])
        return found

    def finish(self, slot: int, written: int) -> None:
        (index,) = struct.unpack_from("<H", self.view, 0x2002)
        struct.pack_into("<II", self.view, 0x2004 + 8 * (index % SLOTS), slot, written)
        struct.pack_into("<H", self.view, 0x2002, index + 1 & 0xFFFF)

    def call(self) -> None:
        os.eventfd_write(self.machine.peer.calls[0], 1)


def offer(machine: Machine, head: int = 0) -> None:
    ring = machine.driver.rings[0]
    ring.offer(ring.chain([(BUFFERS, 16)], [(BUFFERS + 0x1000, 512), (BUFFERS + 0x2000, 1)], head))
    machine.driver.kick()


def test_the_other_side_gets_memory_rings_and_descriptors(make):
    machine = make()
    assert machine.device.config() == b"c" * 60
    assert machine.driver.features() >> v.F_VERSION_1 & 1
    machine.driver.start()
    numbers = [number for number, _, _ in machine.peer.messages]
    assert numbers[:4] == [
        u.GET_FEATURES, u.GET_PROTOCOL_FEATURES, u.SET_PROTOCOL_FEATURES, u.SET_OWNER,
    ]  # fmt: skip
    by_number = {number: (data, fds) for number, data, fds in machine.peer.messages}
    (features,) = u.U64.unpack(by_number[u.SET_FEATURES][0])
    assert features >> v.F_INDIRECT_DESC & 1 and not features >> v.F_EVENT_IDX & 1
    table, fds = by_number[u.SET_MEM_TABLE]
    assert fds == 2 and u.MEMORY.unpack_from(table) == (2,)
    assert u.REGION.unpack_from(table, 8)[:2] == (0, 1 << 20)
    assert u.REGION.unpack_from(table, 8 + u.REGION.size)[0] == RINGS
    assert set(machine.peer.kicks) == set(machine.peer.calls) == {0}


def test_requests_go_there_and_answers_come_back(make):
    machine = make()
    written: list[tuple[int, int]] = []
    machine.memory.on_host_write(lambda gpa, size: written.append((gpa, size)))
    machine.driver.start()
    offer(machine)
    server = Server(machine)
    assert server.offered() == [
        [(BUFFERS, 16, 1), (BUFFERS + 0x1000, 512, 3), (BUFFERS + 0x2000, 1, 2)]
    ]
    assert os.eventfd_read(machine.peer.kicks[0]) == 1
    written.clear()
    server.finish(SLOTS - 1, 513)
    server.call()
    ring = machine.driver.rings[0]
    until(lambda: machine.driver.lines.edges == 1)
    assert ring.done() == [(0, 513)]
    assert written == [(BUFFERS + 0x1000, 512), (BUFFERS + 0x2000, 1)]  # told to who has to know
    server.finish(SLOTS - 1, 1 << 30)  # what was not asked for
    server.call()
    assert machine.failed.wait(30)
    assert "it has done more than it was asked for" in str(machine.failures[0])


def test_more_is_not_believed_than_there_was_room_for(make):
    machine = make()
    machine.driver.start()
    offer(machine)
    server = Server(machine)
    server.finish(SLOTS - 1, 0xFFFF_FFFF)
    server.call()
    until(lambda: machine.driver.lines.edges == 1)
    assert machine.driver.rings[0].done() == [(0, 513)]
    assert not machine.failures


def test_as_many_requests_are_under_way_as_there_are_slots(make):
    machine = make()
    machine.driver.start(size=256)
    ring = machine.driver.rings[0]
    ring.chain([(BUFFERS, 16)], [(BUFFERS + 0x1000, 1)])
    for _ in range(2):  # a hostile driver offers the same head again and again
        ring.offer(*[0] * 256)
        machine.driver.kick()
    server = Server(machine)
    assert len(server.offered()) == SLOTS
    server.finish(3, 1)
    server.call()
    until(lambda: len(server.offered()) == SLOTS + 1)
    assert ring.done() == [(0, 1)] and not machine.driver.broken


def test_a_request_in_rom_is_refused(make):
    machine = make()
    machine.memory.add_rom(0xF_0000_0000, bytes(4096))
    machine.driver.start()
    ring = machine.driver.rings[0]
    ring.offer(ring.chain([(0xF_0000_0000, 16)], [(BUFFERS, 1)]))
    machine.driver.kick()
    assert machine.driver.broken and not machine.failures


def test_after_a_reset_the_ring_is_a_new_one(make):
    machine = make()
    machine.driver.start()
    offer(machine)
    server = Server(machine)
    server.finish(SLOTS - 1, 1)
    server.call()
    until(lambda: machine.driver.lines.edges == 1)
    machine.driver.set(v.MMIO_STATUS, 0)
    assert machine.peer.messages[-1][0] == u.GET_VRING_BASE
    machine.driver.start()
    offer(machine)
    assert len(Server(machine).offered()) == 1


def test_a_limit_holds_requests_back(make):
    from fakes import ManualClock

    machine = make(limit=Limit(ManualClock(), ops=2))
    machine.driver.start()
    ring = machine.driver.rings[0]
    ring.chain([(BUFFERS, 16)], [(BUFFERS + 0x1000, 1)])
    ring.offer(0, 0, 0, 0)
    machine.driver.kick()
    assert len(Server(machine).offered()) == 2


HEAD = u.HEADER.pack(u.GET_FEATURES, u.VERSION | u.REPLY, 8)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (u.HEADER.pack(99, u.VERSION | u.REPLY, 8) + bytes(8), "it answers 0x63"),
        (u.HEADER.pack(u.GET_FEATURES, u.VERSION, 8) + bytes(8), "it answers 0x1"),
        (u.HEADER.pack(u.GET_FEATURES, u.VERSION | u.REPLY, 1 << 31), "answers with 2147483648"),
        (HEAD + bytes(8), "it has no virtio 1"),
        (HEAD + u.U64.pack(1 << v.F_VERSION_1), "it has no virtio 1, protocol features"),
        (
            u.HEADER.pack(u.GET_FEATURES, u.VERSION | u.REPLY, 3) + bytes(3),
            "request 1 with 3 bytes",
        ),
    ],
)
def test_what_is_no_back_end_is_told(make, answer, why):
    peer = Peer()
    peer.wrong[u.GET_FEATURES] = answer
    with pytest.raises(HostError, match=why):
        make(peer)


@pytest.mark.parametrize("request_", [u.SET_OWNER, u.SET_MEM_TABLE, u.SET_VRING_KICK])
def test_a_refusal_is_told(make, request_):
    peer = Peer()
    reply = u.HEADER.pack(request_, u.VERSION | u.REPLY, 8) + u.U64.pack(1)
    peer.wrong[request_] = reply
    if request_ == u.SET_OWNER:
        with pytest.raises(HostError, match=f"it refuses request {request_}"):
            make(peer)
    else:
        machine = make(peer)
        machine.driver.start()
        assert "it refuses request" in str(machine.failures[0])


def test_an_end_is_told_at_once(make):
    machine = make()
    machine.driver.start()
    machine.peer.hang_up()
    assert machine.failed.wait(30)
    assert str(machine.failures[0]).startswith("the peer: it has ended; start it")


def test_what_was_not_answered_is_asked_for_again(make):
    machine = make(patience=60)
    machine.driver.start()
    for head in (0, 3):
        offer(machine, head)
    old = Server(machine)
    old.finish(SLOTS - 1, 513)
    old.call()
    until(lambda: machine.driver.lines.edges == 1)
    first, second = machine.peer, Peer()
    machine.peer = second
    first.close()
    assert second.enabled.wait(30)
    until(lambda: machine.backend._rings[0] is not old.ring and Server(machine).offered() != [])
    server = Server(machine)
    assert len(server.offered()) == 1
    server.finish(SLOTS - 1, 1)
    server.call()
    ring = machine.driver.rings[0]
    until(lambda: machine.memory.read_u16(ring.used + 2) == 2)
    assert ring.done() == [(0, 513), (3, 1)]
    first.ours.close()
    assert not machine.failures


def test_rings_wrap():
    memory = RingMemory(1, RINGS)
    ring = memory.ring(0)
    view = ring._view
    for number in range(70_000):
        slot = ring.add([(number, 1, True)])
        struct.pack_into("<II", view, 0x2004 + 8 * (number % SLOTS), slot, number & 7)
        struct.pack_into("<H", view, 0x2002, number + 1 & 0xFFFF)
        assert ring.done() == [(slot, number & 7)] and not ring.full
    memory.close()


def test_a_program_that_complains_for_ever_does_not_wait_for_us():
    """64 KiB of it are kept. A pipe would be full by then, and the program stand still."""
    script = "for i in $(seq 3000); do echo complaint $i of a program that says a lot >&2; done"
    program = Program("it", lambda fd: ["/bin/sh", "-c", script])
    until(lambda: program._process.poll() is not None)
    said = program.complaint()
    assert said.startswith("complaint ") and len(program._complaints.lines()) > 1000
    program.close()
