"""A hostile driver: random registers, rings, descriptors and headers; each device survives it.

To put another device to it: write its `Subject`, and add it to SUBJECTS.
"""

import random
import resource
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
from fakes import ManualClock
from p9_client import make_tree, message, text
from p9_client import number as u32
from virtio_driver import Driver, Ring

from vmexit.abi import p9
from vmexit.abi import virtio as v
from vmexit.backends.disk import Disk
from vmexit.backends.p9.server import Server
from vmexit.backends.vsock import VsockSockets
from vmexit.core.loop import EventLoop
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.balloon import DEFLATE, INFLATE, REPORTING, STATISTICS, Balloon
from vmexit.devices.virtio.blk import Blk
from vmexit.devices.virtio.console import Console
from vmexit.devices.virtio.console_port import Port
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.net import CONTROL, RECEIVE, TRANSMIT, Net
from vmexit.devices.virtio.p9 import P9
from vmexit.devices.virtio.queue import Chain, Queue
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
    def __init__(self, folder: Path, memory: GuestMemory, readonly: bool = False) -> None:
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
    def __init__(self, folder: Path, memory: GuestMemory) -> None:
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

    def __init__(self, folder: Path, memory: GuestMemory) -> None:
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


class Cable:
    """A backend of a network interface, whose other end is silent, or says anything."""

    offloads = False
    mtu = 1500
    gone = False

    def __init__(self) -> None:
        self.room = self.sent = 0
        self.coming: list[bytes] = []
        self.waiting: list[Callable[[], None]] = []

    def has_room(self) -> bool:
        return self.room > 0

    def send(self, frame: Sequence[memoryview]) -> None:
        assert self.room > 0 and 14 <= sum(map(len, frame)) <= 14 + (1 << 16)
        self.room -= 1
        self.sent += 1

    def receive(self) -> memoryview | None:
        return memoryview(self.coming.pop(0)) if self.coming else None

    def when_readable(self, function: Callable[[], None]) -> None:
        self.waiting.append(function)

    when_room = when_readable

    def set_offloads(self, features: int) -> None:
        assert features == 0


class NetSubject(Subject):
    def __init__(self, folder: Path, memory: GuestMemory) -> None:
        self.cable = Cable()
        self.device = Net(self.cable, b"\x52" * 6)

    def header(self, hostile: "Hostile") -> bytes:
        chance = hostile.chance
        return struct.pack("<BB", chance.randrange(6), chance.randrange(6)) + chance.randbytes(12)

    def chain(self, hostile: "Hostile", queue: int) -> tuple[Parts, Parts]:
        at = hostile.chance.randrange(BUFFERS, 0xF_0000)
        if queue == RECEIVE:
            return [], [(at, hostile.chance.choice((12, 100, 2048)))]
        if queue == TRANSMIT:
            return [(hostile.request, 12), (at, hostile.chance.choice((13, 14, 60, 1514)))], []
        return [(hostile.request, hostile.chance.choice((1, 2, 3, 8, 10)))], [(at, 1)]

    def host(self, chance: random.Random) -> None:
        if chance.random() < 0.3:
            self.cable.room = chance.randrange(4)
            if len(self.cable.coming) < 10:
                self.cable.coming.append(chance.randbytes(chance.choice((14, 60, 1514))))
            waiting, self.cable.waiting = self.cable.waiting, []
            for function in dict.fromkeys(waiting):
                function()

    def check(self, driver: Driver) -> None:
        assert self.cable.sent > 100
        self.cable.room, sent = 1, self.cable.sent
        ring = driver.rings[TRANSMIT]
        ring.offer(ring.chain([(BUFFERS, 100)], []))
        driver.kick(TRANSMIT)
        assert ring.done() == [(0, 0)] and self.cable.sent == sent + 1
        self.cable.coming = [b"f" * 60]
        ring = driver.rings[RECEIVE]
        for _ in range(2):  # one had been taken from the cable before
            ring.offer(ring.chain([], [(BUFFERS, 2048)]))
            driver.kick(RECEIVE)
        assert ring.done()[-1] == (0, 72) and driver.memory.read(BUFFERS + 12, 60) == b"f" * 60
        ring = driver.rings[CONTROL]
        driver.memory.write(BUFFERS, struct.pack("<BB6s", 1, 1, b"\x52" * 6))
        ring.offer(ring.chain([(BUFFERS, 8)], [(0x9_0000, 1)]))
        driver.kick(CONTROL)
        assert ring.done() == [(0, 1)] and driver.memory.read_u8(0x9_0000) == v.NET_OK


class BalloonSubject(Subject):
    def __init__(self, folder: Path, memory: GuestMemory) -> None:
        self.device = self.balloon = Balloon(memory)

    def header(self, hostile: "Hostile") -> bytes:
        chance = hostile.chance
        pages = [chance.randrange(0x80, 0x100) for _ in range(chance.randrange(1, 12))]
        if chance.random() < 0.2:
            pages.append(hostile.number())
        return struct.pack(f"<{len(pages)}I", *pages)

    def chain(self, hostile: "Hostile", queue: int) -> tuple[Parts, Parts]:
        if queue == REPORTING:
            return [], [(hostile.chance.randrange(0x80, 0xF8) << 12, 4096)]
        return [(hostile.request, hostile.chance.choice((3, 4, 20, 40)))], []

    def host(self, chance: random.Random) -> None:
        if chance.random() < 0.1:
            self.balloon.ask_for_statistics()
            self.balloon.set_target(chance.choice((0, 4096, 1 << 44)))

    def check(self, driver: Driver) -> None:
        memory = driver.memory
        memory.write(0x9_0000, b"x" * 8192)
        memory.write_u32(BUFFERS, 0x90)
        for queue, content in ((INFLATE, bytes(4096)), (DEFLATE, b"x" * 4096)):
            ring = driver.rings[queue]
            ring.offer(ring.chain([(BUFFERS, 4)], []))
            driver.kick(queue)
            assert ring.done() == [(0, 0)] and memory.read(0x9_0000, 4096) == content
            memory.write(0x9_0000, b"x" * 4096)
        ring = driver.rings[STATISTICS]
        memory.write(BUFFERS, struct.pack("<HQ", 4, 123))
        ring.offer(ring.chain([(BUFFERS, 10)], []))
        driver.kick(STATISTICS)
        assert self.balloon.statistics == {"free_memory": 123}


class ShareSubject(Subject):
    """What a server makes of messages has a fuzz of its own; here they come in odd chains."""

    def __init__(self, folder: Path, memory: GuestMemory) -> None:
        self.server = Server(str(make_tree(folder)))
        self.device = P9(self.server, "tag")

    def header(self, hostile: "Hostile") -> bytes:
        chance = hostile.chance
        fid, other = u32(chance.randrange(4)), u32(chance.randrange(4))
        kind, body = chance.choice(
            [
                (p9.TVERSION, u32(8192) + text(p9.VERSION)),
                (p9.TATTACH, fid + u32(p9.NOFID) + text(b"") * 2 + u32(0)),
                (p9.TATTACH, fid + u32(p9.NOFID) + text(b"") * 2 + u32(0)),
                (
                    p9.TWALK,
                    fid + other + struct.pack("<H", 1) + text(chance.choice((b"a", b".."))),
                ),
                (p9.TLOPEN, fid + u32(0)),
                (p9.TREADDIR, fid + bytes(8) + u32(hostile.number())),
                (p9.TREAD, fid + bytes(8) + u32(hostile.number())),
                (p9.TGETATTR, fid + struct.pack("<Q", 0x7FF)),
                (p9.TCLUNK, fid),
                (chance.randrange(256), chance.randbytes(chance.randrange(40))),
            ]
        )
        return message(kind, body)[:60]

    def chain(self, hostile: "Hostile", queue: int) -> tuple[Parts, Parts]:
        size = int.from_bytes(hostile.driver.memory.read(hostile.request, 4), "little")
        at = hostile.chance.randrange(BUFFERS, 0xF_0000)
        return [(hostile.request, min(max(size, 1), 64))], [(at, 11), (at + 100, 4096)]

    def check(self, driver: Driver) -> None:
        ring = driver.rings[0]
        request = message(p9.TVERSION, u32(8192) + text(p9.VERSION), p9.NOTAG)
        driver.memory.write(BUFFERS, request)
        ring.offer(ring.chain([(BUFFERS, len(request))], [(0x9_0000, 100)]))
        driver.kick()
        assert ring.done() == [(0, 21)] and driver.memory.read_u8(0x9_0004) == p9.TVERSION + 1

    def close(self) -> None:
        self.server.close()


class Line:
    """A backend of a console's port."""

    def __init__(self) -> None:
        self.written = 0
        self.coming = 0
        self.waiting: list[Callable[[], None]] = []

    def write(self, data: bytes) -> None:
        self.written += len(data)

    def read(self, size: int) -> bytes:
        size = min(self.coming, size)
        self.coming -= size
        return bytes(size)

    def when_readable(self, function: Callable[[], None]) -> None:
        self.waiting.append(function)

    def size(self) -> None:
        """It is no terminal."""

    def running(self, runs: bool) -> None:
        """It makes no difference."""


class ConsoleSubject(Subject):
    def __init__(self, folder: Path, memory: GuestMemory) -> None:
        self.lines = [Line(), Line()]
        self.writer = ManualClock()
        ports = [Port(self.lines[0], self.writer), Port(self.lines[1], self.writer, "name")]
        self.device = self.console = Console(ports, ManualClock())

    def header(self, hostile: "Hostile") -> bytes:
        chance, number = hostile.chance, hostile.number
        event = chance.choice((0, 3, 3, 6, 6, 6, number(4), number(16)))
        return struct.pack(
            "<IHH",
            chance.choice((0, 1, 1, 2, number())),
            event,
            chance.choice((1, 1, 0, number(16))),
        )

    def chain(self, hostile: "Hostile", queue: int) -> tuple[Parts, Parts]:
        at, size = hostile.chance.randrange(BUFFERS, 0xF_0000), hostile.chance.choice((1, 64, 4096))
        if queue == v.CONSOLE_CONTROL_TX:
            return [(hostile.request, hostile.chance.choice((8, 8, 8, 7, 100)))], []
        if queue == v.CONSOLE_CONTROL_RX:
            return [], [(at, hostile.chance.choice((12, 64, 4096)))]
        return ([(at, size), (hostile.request, 60)], []) if queue % 2 else ([], [(at, size)])

    def host(self, chance: random.Random) -> None:
        if chance.random() < 0.2:
            self.writer.fire()
        if chance.random() < 0.1:
            self.console.resize(chance.randrange(1, 200), chance.randrange(1, 200))
        line = chance.choice(self.lines)
        line.coming = min(line.coming + chance.randrange(100), 10_000)
        waiting, line.waiting = line.waiting, []
        for function in dict.fromkeys(waiting):
            function()

    def check(self, driver: Driver) -> None:
        self.writer.fire()
        assert all(line.written > 1000 for line in self.lines)
        assert len(self.console._messages) <= 10
        for queue, port in ((0, 0), (4, 1)):
            driver.memory.write(BUFFERS, struct.pack("<IHH", port, v.CONSOLE_PORT_OPEN, 1))
            ring = driver.rings[v.CONSOLE_CONTROL_TX]
            ring.offer(ring.chain([(BUFFERS, 8)], []))
            driver.kick(v.CONSOLE_CONTROL_TX)
            self.lines[port].coming, self.lines[port].written = 100, 0
            ring = driver.rings[queue]
            ring.offer(ring.chain([], [(0x9_0000, 4096)]))
            driver.kick(queue)
            assert ring.done() == [(0, 100)]
            ring = driver.rings[queue + 1]
            ring.offer(ring.chain([(0x9_0000, 4096)], []))
            driver.kick(queue + 1)
            self.writer.fire()
            assert ring.done() == [(0, 0)] and self.lines[port].written == 4096


SUBJECTS = {
    "blk": BlkSubject,
    "readonly": partial(BlkSubject, readonly=True),
    "rng": RngSubject,
    "vsock": VsockSubject,
    "net": NetSubject,
    "balloon": BalloonSubject,
    "share": ShareSubject,
    "console": ConsoleSubject,
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
            if self.subject.device.unsaved:  # as a folder that is mounted
                return
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


def peak() -> int:
    """Bytes of the process's largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


MOST_GROWTH = 16 << 20


@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.parametrize(
    "steps",
    [10_000, pytest.param(400_000, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])],
)
def test_a_device_survives_a_hostile_driver(memory, tmp_path, monkeypatch, kind, steps):
    served = 0
    push_all = Queue.push_all

    def count(queue: Queue, done: Iterable[tuple[Chain, int]]) -> None:
        nonlocal served
        done = list(done)
        served += len(done)
        push_all(queue, done)

    monkeypatch.setattr(Queue, "push_all", count)
    with ExitStack() as stack:
        subject = SUBJECTS[kind](tmp_path, memory)
        stack.callback(subject.close)
        driver = Driver(subject.device, memory)
        before = peak()
        if steps > 10_000:  # exact, but it makes all several times as slow
            tracemalloc.start()
            stack.callback(tracemalloc.stop)
        for turn in range(steps // 1000):
            driver.start()
            hostile = Hostile(driver, subject, turn)
            for _ in range(1000):
                hostile.step()
                if hostile.chance.random() < (0.01 if works(driver) else 0.4):
                    driver.start()
        if steps > 10_000:
            assert tracemalloc.get_traced_memory()[1] < MOST_GROWTH
        else:
            assert peak() - before < MOST_GROWTH
        assert served > steps // 100  # much of it was taken seriously
        driver.start()
        subject.check(driver)
        assert not driver.broken
