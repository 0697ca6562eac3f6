"""A hostile driver: random registers, rings, descriptors and headers; each device survives it.

To put another device to it: write its `Subject`, and add it to SUBJECTS.
"""

import random
import socket
import struct
import tracemalloc
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
from virtio_driver import Driver, Ring

from vmexit.abi import virtio as v
from vmexit.backends.disk import Disk
from vmexit.backends.vsock import VsockSockets
from vmexit.core.loop import EventLoop
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.blk import Blk
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.queue import Queue
from vmexit.devices.virtio.rng import Rng
from vmexit.devices.virtio.vsock import Vsock
from vmexit.devices.virtio.vsock_packet import SIZE as VSOCK_HEADER
from vmexit.devices.virtio.vsock_packet import Packet

MEMORY = 1 << 20
BUFFERS = 0x8_0000  # from here on there are no rings
DISK = 64 * 512
REGISTERS = [value for name, value in vars(v).items() if name.startswith("MMIO_")]
INTERESTING = [0, 1, 2, 3, 8, 15, 16, 17, 255, 256, 0x1000, MEMORY - 1, MEMORY, 1 << 31]
INTERESTING += [0xFFFF_FFFF, 0xFFFF_FFFE]

Parts = list[tuple[int, int]]
"""GPA and size of each."""


class Subject:
    """A device, and what it would take for a request."""

    device: VirtioDevice

    def header(self, hostile: "Hostile") -> bytes:
        """A header that makes some sense, mostly."""
        return b""

    def chain(self, hostile: "Hostile", queue: int) -> tuple[Parts, Parts]:
        """Parts to read and parts to write, of a request whose header is at `hostile.request`."""
        raise NotImplementedError

    def host(self, chance: random.Random) -> None:
        """Something happens on the host."""

    def check(self, driver: Driver) -> None:
        """It still does what it is for; the driver has just started."""
        raise NotImplementedError

    def close(self) -> None:
        """The end."""


class BlkSubject(Subject):
    def __init__(self, folder: Path, readonly: bool = False) -> None:
        self.image = folder / "disk"
        self.image.write_bytes(b"d" * DISK)
        self.disk = Disk(str(self.image), readonly=readonly)
        self.device = Blk(self.disk)

    def header(self, hostile: "Hostile") -> bytes:
        chance, number = hostile.chance, hostile.number
        sector = chance.choice((0, 1, 63, 64, number(64)))
        data = struct.pack("<IIQ", chance.choice((0, 1, 4, 8, 11, 13, number())), number(), sector)
        return data + struct.pack("<QII", sector, chance.choice((1, 2, number())), number(3))

    def chain(self, hostile: "Hostile", queue: int) -> tuple[Parts, Parts]:
        """A header, data in either direction, a status."""
        data = [(hostile.chance.randrange(BUFFERS, 0xF_0000), 512)]
        into = data if hostile.chance.random() < 0.5 else []
        out = [(hostile.request, 16 if into else 32)] if hostile.chance.random() < 0.9 else []
        return out, [*into, (0xF_8000, 1)]

    def check(self, driver: Driver) -> None:
        ring = driver.rings[0]
        driver.memory.write(0x8_0000, struct.pack("<IIQ", v.BLK_T_IN, 0, 0))
        ring.offer(ring.chain([(0x8_0000, 16)], [(0x9_0000, 512), (0x9_1000, 1)]))
        driver.kick()
        assert ring.done() == [(0, 513)]
        data = self.image.read_bytes()
        assert driver.memory.read(0x9_0000, 512) == data[:512] and len(data) == DISK
        assert (data == b"d" * DISK) == self.disk.readonly

    def close(self) -> None:
        self.disk.close()


class RngSubject(Subject):
    def __init__(self, folder: Path) -> None:
        self.device = Rng()

    def chain(self, hostile: "Hostile", queue: int) -> tuple[Parts, Parts]:
        return [], [(hostile.address(), hostile.length())]

    def check(self, driver: Driver) -> None:
        ring = driver.rings[0]
        ring.offer(ring.chain([(0x8_0000, 16)], [(0x9_0000, 512), (0x9_1000, 1)]))
        driver.kick()
        assert ring.done() == [(0, 513)]


class VsockSubject(Subject):
    CID = 3
    PORTS = (52, 53)

    def __init__(self, folder: Path) -> None:
        self.failures: list[BaseException] = []
        self.loop = EventLoop(self.failures.append)
        self.path = str(folder / "v.sock")
        self.sockets = VsockSockets(self.path, self.loop)
        self.device = self.vsock = Vsock(self.CID, self.sockets)
        self.servers = [socket.socket(socket.AF_UNIX) for _ in self.PORTS]
        for port, server in zip(self.PORTS, self.servers, strict=True):
            server.bind(f"{self.path}_{port}")
            server.listen(16)
            server.setblocking(False)
        self.connected: list[socket.socket] = []
        self.exchanged = 0

    def header(self, hostile: "Hostile") -> bytes:
        chance, number = hostile.chance, hostile.number
        ports = chance.randrange(4), chance.choice((*self.PORTS, 54))
        if (open_now := list(self.vsock._connections)) and chance.random() < 0.7:
            ports = chance.choice(open_now)
        cids = chance.choice([(self.CID, 2)] * 20 + [(self.CID, number(64)), (number(64), 2)])
        op = chance.choice((1, 1, 1, 2, 2, 3, 4, 5, 5, 5, 6, 6, 7, number(16)))
        return Packet(
            *cids, *ports, chance.choice((0, 1, 100, 512, number())),
            chance.choice([1] * 20 + [2, number(16)]), op, chance.choice((0, 1, 2, 3, number())),
            chance.choice((0, 4096, 1 << 18, number())), chance.choice((0, 0, 1, number())),
        ).pack()  # fmt: skip

    def chain(self, hostile: "Hostile", queue: int) -> tuple[Parts, Parts]:
        at = hostile.chance.randrange(BUFFERS, 0xF_0000)
        if queue == v.VSOCK_TX:
            return [(hostile.request, VSOCK_HEADER), (at, 512)], []
        if queue == v.VSOCK_EVENT:
            return [], [(at, 4)]
        return [], [(at, VSOCK_HEADER), (at + 0x100, hostile.chance.choice((1, 100, 4096)))]

    def host(self, chance: random.Random) -> None:
        with suppress(OSError):
            if chance.random() < 0.2:
                self.connected.append(chance.choice(self.servers).accept()[0])
            if chance.random() < 0.1:
                client = socket.socket(socket.AF_UNIX)
                self.connected.append(client)
                client.setblocking(False)
                client.connect(self.path)
                client.send(chance.choice((b"CONNECT 1\nmore", b"CONNECT 2\n", b"CON", b"x\n")))
        if not self.connected:
            return
        one = chance.choice(self.connected)
        with suppress(OSError):
            one.setblocking(False)
            match chance.randrange(8):
                case 0 | 1 | 2:
                    self.exchanged += len(one.recv(chance.randrange(1, 4096)))
                case 3 | 4 | 5:
                    one.send(bytes(chance.randrange(1, 10_000)))
                case 6:
                    one.shutdown(chance.randrange(3))
        if chance.random() < 0.1 or len(self.connected) > 50:
            self.connected.remove(one)
            one.close()

    def check(self, driver: Driver) -> None:
        assert self.exchanged > 100 and len(self.sockets._streams) <= 64  # which still wait
        for server in self.servers:
            with suppress(OSError):
                while True:
                    server.accept()[0].close()
        rx, tx, _ = driver.rings
        packet = Packet(self.CID, 2, 9, 52, 0, 1, v.VSOCK_OP_REQUEST, 0, 1 << 18, 0)
        driver.memory.write(BUFFERS, packet.pack())
        tx.offer(tx.chain([(BUFFERS, VSOCK_HEADER)], []))
        driver.kick(v.VSOCK_TX)
        while True:  # requests of clients that still wait come, too
            rx.offer(rx.chain([], [(0x9_0000, 4096)]))
            driver.kick(v.VSOCK_RX)
            if not rx.done():
                raise AssertionError("no answer")
            answer = Packet.unpack(driver.memory.read(0x9_0000, VSOCK_HEADER))
            if answer.op != v.VSOCK_OP_REQUEST:
                break
        assert (answer.op, answer.dst_port) == (v.VSOCK_OP_RESPONSE, 9)
        with self.servers[0].accept()[0] as connected:
            packet = packet._replace(op=v.VSOCK_OP_RW, size=5)
            driver.memory.write(BUFFERS, packet.pack() + b"hello")
            tx.offer(tx.chain([(BUFFERS, VSOCK_HEADER + 5)], []))
            driver.kick(v.VSOCK_TX)
            assert connected.recv(10) == b"hello"

    def close(self) -> None:
        for one in (*self.connected, *self.servers):
            one.close()
        self.sockets.close()
        self.loop.close()
        assert not self.failures


SUBJECTS = {
    "blk": BlkSubject,
    "readonly": partial(BlkSubject, readonly=True),
    "rng": RngSubject,
    "vsock": VsockSubject,
}


class Hostile:
    """One step is one thing that a driver can do. Mostly it does what makes some sense."""

    def __init__(self, driver: Driver, subject: Subject, seed: int) -> None:
        self.driver, self.subject, self.chance = driver, subject, random.Random(seed)
        self.request = 0x8_0000  # where the last header was put

    def number(self, bits: int = 32) -> int:
        chance = self.chance
        if chance.random() < 0.5:
            return chance.choice(INTERESTING) & (1 << bits) - 1
        return chance.getrandbits(chance.randrange(1, bits + 1))

    def address(self) -> int:
        if self.chance.random() < 0.8:
            return self.chance.randrange(0x8_0000, MEMORY)
        return self.number(64) if self.chance.random() < 0.9 else self.chance.getrandbits(64)

    def length(self) -> int:
        if self.chance.random() < 0.8:
            return self.chance.choice((1, 16, 20, 512, 1024, 4096))
        return self.number()

    def header(self) -> None:
        data = self.subject.header(self)
        self.request = self.chance.randrange(BUFFERS, MEMORY - 64)
        self.driver.memory.write(self.request, data)

    def queue(self) -> int:
        return self.chance.randrange(len(self.driver.rings))

    def good_chain(self, queue: int) -> int:
        """What the device would take; its head."""
        ring = self.driver.rings[queue]
        out, into = self.subject.chain(self, queue)
        return ring.chain(out, into, self.chance.randrange(ring.size - len(out + into) + 1))

    def descriptors(self) -> None:
        queue = self.queue()
        if self.chance.random() < 0.5:
            self.good_chain(queue)
            return
        ring = self.driver.rings[queue]
        table = (
            ring.desc
            if self.chance.random() < 0.7
            else self.chance.randrange(0x8_0000, 0x9_0000) & ~15
        )
        for number in range(self.chance.randrange(1, 6)):
            flags = self.chance.choice((0, 1, 1, 2, 3, 3, 4, 5, self.number(16)))
            after = number + 1 if self.chance.random() < 0.9 else self.number(16)
            data = struct.pack("<QIHH", self.address(), self.length(), flags, after)
            self.driver.memory.write(table + 16 * number, data)
        if table != ring.desc:
            ring.describe(0, table, 16 * self.chance.randrange(1, 6), v.DESC_F_INDIRECT)

    def available(self) -> None:
        queue = self.queue()
        ring: Ring = self.driver.rings[queue]
        if self.chance.random() < 0.95:
            ring.index = self.driver.memory.read_u16(ring.avail + 2)
            if self.chance.random() < 0.8:
                for _ in range(self.chance.randrange(1, 8)):
                    self.header()
                    ring.offer(self.good_chain(queue))
                    self.driver.kick(queue)
                    queue = self.queue()
                    ring = self.driver.rings[queue]
                    ring.index = self.driver.memory.read_u16(ring.avail + 2)
                return
            ring.offer(*[self.chance.randrange(ring.size) for _ in range(self.chance.randrange(4))])
        else:
            self.driver.memory.write_u16(ring.avail + 2, self.number(16))
        if self.chance.random() < 0.1:
            self.driver.memory.write(ring.avail + 4, self.chance.randbytes(2 * ring.size + 2))

    def register(self) -> None:
        offset = self.chance.choice((*REGISTERS, self.chance.randrange(0x200)))
        size = self.chance.choice((4, 4, 4, 4, 1, 2))
        if self.chance.random() < 0.5:
            assert 0 <= self.driver.registers.read(offset, size) < 1 << 8 * size
        else:
            self.driver.registers.write(offset, size, self.number(8 * size))

    def step(self) -> None:
        self.subject.host(self.chance)
        chance = self.chance.random()
        if chance < 0.3:
            self.driver.kick(self.queue())
            self.driver.clock.fire()
        elif chance < 0.5:
            self.descriptors()
        elif chance < 0.65:
            self.header()
        elif chance < 0.85:
            self.available()
        elif chance < 0.97:
            self.register()
        elif chance < 0.99 or not self.driver.broken:
            registers = self.driver.registers
            registers.hold(True)
            state = registers.state()
            registers.restore(state)
            assert registers.state() == state
            registers.hold(False)
        else:
            self.driver.start()


def works(driver: Driver) -> bool:
    """Whether it could serve requests."""
    status = driver.get(v.MMIO_STATUS) & (v.DRIVER_OK | v.FEATURES_OK | v.NEEDS_RESET)
    ready = []
    for number in range(len(driver.rings)):
        driver.set(v.MMIO_QUEUE_SEL, number)
        ready.append(driver.get(v.MMIO_QUEUE_READY))
    return status == v.DRIVER_OK | v.FEATURES_OK and all(ready)


@pytest.fixture
def memory():
    memory = GuestMemory([(0, MEMORY)])
    yield memory
    memory.close()


@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.parametrize(
    "steps",
    [10_000, pytest.param(400_000, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])],
)
def test_a_device_survives_a_hostile_driver(memory, tmp_path, monkeypatch, kind, steps):
    served: list[int] = []
    push = Queue.push
    monkeypatch.setattr(Queue, "push", lambda *a: (served.append(a[2]), push(*a)))
    with ExitStack() as stack:
        subject = SUBJECTS[kind](tmp_path)
        stack.callback(subject.close)
        driver = Driver(subject.device, memory)
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for turn in range(steps // 1000):
            driver.start()
            hostile = Hostile(driver, subject, turn)
            for _ in range(1000):
                hostile.step()
                if hostile.chance.random() < (0.01 if works(driver) else 0.4):
                    driver.start()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
        assert len(served) > steps // 100  # much of it was taken seriously
        driver.start()
        subject.check(driver)
        assert not driver.broken
