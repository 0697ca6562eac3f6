"""The network device and its backends: frames in buffers of any kind, commands, limits, an end."""

import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence

import pytest
from virtio_driver import F_ALL, Driver

from vmexit.abi import virtio as v
from vmexit.backends.passt import Passt
from vmexit.backends.tap import Tap
from vmexit.core.errors import ConfigError, HostError
from vmexit.core.loop import EventLoop
from vmexit.core.memory import GuestMemory
from vmexit.core.rate import Limit
from vmexit.devices.virtio.net import CONTROL, RECEIVE, TRANSMIT, Net
from vmexit.machine.net import Forward, NetOptions

MAC = bytes.fromhex("525400123456")
BUFFERS = 0x8_0000
SECOND = 1_000_000_000


class Wire:
    """A backend whose other end is in the test's hand."""

    mtu = 1500

    def __init__(self, offloads: bool = False) -> None:
        self.offloads = offloads
        self.sent: list[bytes] = []
        self.coming: list[bytes] = []
        self.room, self.gone = 1 << 30, False
        self.readable: Callable[[], None] | None = None
        self.roomy: Callable[[], None] | None = None
        self.wanted = -1

    def has_room(self) -> bool:
        return self.room > 0

    def send(self, frame: Sequence[memoryview]) -> None:
        assert self.room > 0
        self.room -= 1
        self.sent.append(b"".join(frame))

    def receive(self) -> memoryview | None:
        return memoryview(self.coming.pop(0)) if self.coming else None

    def when_readable(self, function: Callable[[], None]) -> None:
        self.readable = function

    def when_room(self, function: Callable[[], None]) -> None:
        self.roomy = function

    def set_offloads(self, features: int) -> None:
        self.wanted = features

    def arrive(self, *frames: bytes) -> None:
        self.coming += frames
        function, self.readable = self.readable, None
        if function is not None:
            function()


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 1 << 20)])
    yield memory
    memory.close()


def make(memory, wire: Wire, features: int = F_ALL, **limits) -> Driver:
    driver = Driver(Net(wire, MAC, **limits), memory)
    driver.start(features)
    return driver


def offer_buffers(driver: Driver, count: int, size: int) -> None:
    ring = driver.rings[RECEIVE]
    for number in range(count):
        ring.describe(number, BUFFERS + 0x1000 * number, size, v.DESC_F_WRITE)
    ring.offer(*range(count))
    driver.kick(RECEIVE)


def received(driver: Driver) -> list[bytes]:
    """The frames in the buffers that were used, each with its header."""
    frames, left = [], 0
    for head, size in driver.rings[RECEIVE].done():
        data = driver.memory.read(BUFFERS + 0x1000 * head, size)
        if left:
            frames[-1] += data
            left -= 1
        else:
            (count,) = struct.unpack_from("<H", data, 10)
            left = count - 1
            frames.append(data)
    assert not left
    return frames


def send(driver: Driver, *frames: bytes) -> None:
    ring = driver.rings[TRANSMIT]
    for number, frame in enumerate(frames):
        gpa = BUFFERS + 0x1_0000 + 0x1000 * number
        driver.memory.write(gpa, bytes(12) + frame)
        ring.describe(number, gpa, 12 + len(frame))
    ring.offer(*range(len(frames)))
    driver.kick(TRANSMIT)


def frame(number: int, size: int = 60) -> bytes:
    return MAC + MAC + b"\x88\xb5" + bytes([number]) * (size - 14)


def test_the_configuration_is_address_status_and_mtu(memory):
    driver = make(memory, Wire())
    config = b"".join(
        driver.registers.read(0x100 + at, 1).to_bytes(1, "little") for at in range(12)
    )
    assert config == MAC + struct.pack("<HHH", 1, 1, 1500)
    assert not driver.features() & (1 << v.NET_F_CSUM | 1 << v.NET_F_HOST_TSO4)
    assert make(memory, Wire(offloads=True)).features() >> v.NET_F_HOST_TSO4 & 1


def test_frames_from_the_guest_lose_their_header_unless_the_backend_wants_it(memory):
    wire = Wire()
    send(make(memory, wire), frame(1), frame(2, 1514))
    assert wire.sent == [frame(1), frame(2, 1514)]
    wire = Wire(offloads=True)
    send(make(memory, wire), frame(3))
    assert wire.sent == [bytes(12) + frame(3)]


def test_a_frame_in_parts_is_one_and_one_too_short_or_too_long_is_lost(memory):
    wire = Wire()
    driver = make(memory, wire)
    ring = driver.rings[TRANSMIT]
    memory.write(BUFFERS, bytes(12) + frame(1))
    ring.offer(ring.chain([(BUFFERS, 5), (BUFFERS + 5, 20), (BUFFERS + 25, 47)], []))
    driver.kick(TRANSMIT)
    assert wire.sent == [frame(1)]
    ring.offer(ring.chain([(BUFFERS, 13)], []))
    ring.offer(ring.chain([(BUFFERS, 0x1_0000), (BUFFERS, 0x1_0000)], [], 1))
    driver.kick(TRANSMIT)
    assert wire.sent == [frame(1)] and len(ring.done()) == 3 and not driver.broken


def test_the_guest_waits_while_the_backend_has_no_room(memory):
    wire = Wire()
    wire.room = 1
    driver = make(memory, wire)
    send(driver, frame(1), frame(2))
    assert wire.sent == [frame(1)] and len(driver.rings[TRANSMIT].done()) == 1
    wire.room = 5
    assert wire.roomy is not None
    wire.roomy()
    assert wire.sent == [frame(1), frame(2)] and len(driver.rings[TRANSMIT].done()) == 1


@pytest.mark.parametrize("features", [F_ALL, F_ALL & ~(1 << v.NET_F_MRG_RXBUF)])
def test_frames_to_the_guest_have_a_header_that_counts_buffers(memory, features):
    wire = Wire()
    driver = make(memory, wire, features)
    offer_buffers(driver, 4, 2048)
    wire.arrive(frame(1), frame(2, 1514))
    assert received(driver) == [
        bytes(10) + b"\1\0" + frame(1), bytes(10) + b"\1\0" + frame(2, 1514),
    ]  # fmt: skip
    assert driver.lines.edges == 1


def test_a_large_frame_takes_as_many_buffers_as_it_needs_and_all_at_once(memory):
    wire = Wire()
    driver = make(memory, wire)
    offer_buffers(driver, 3, 500)
    wire.arrive(frame(1, 1600), frame(2))  # four buffers with the header: one is missing
    assert driver.rings[RECEIVE].done() == [] and wire.coming == [frame(2)]
    ring = driver.rings[RECEIVE]
    for number in range(3, 6):
        ring.describe(number, BUFFERS + 0x1000 * number, 500, v.DESC_F_WRITE)
    ring.offer(3)
    driver.kick(RECEIVE)
    assert received(driver) == [bytes(10) + b"\4\0" + frame(1, 1600)]
    ring.offer(4)
    driver.kick(RECEIVE)
    assert received(driver) == [bytes(10) + b"\1\0" + frame(2)]


def test_what_comes_before_the_driver_is_ready_waits(memory):
    wire = Wire()
    driver = Driver(Net(wire, MAC), memory)
    wire.arrive(frame(7))
    driver.start()
    assert wire.readable is not None
    wire.arrive()
    offer_buffers(driver, 1, 2048)
    assert received(driver) == [bytes(10) + b"\1\0" + frame(7)]


def test_no_more_at_a_time_than_a_queue_holds(memory):
    wire = Wire()
    driver = make(memory, wire)
    offer_buffers(driver, 8, 2048)
    ring = driver.rings[RECEIVE]
    receive = wire.receive

    def endless():  # each buffer is offered again at once, as by another vCPU
        ring.offer(0)
        wire.coming.append(frame(1))
        return receive()

    wire.receive = endless  # type: ignore[method-assign]
    wire.arrive()
    assert len(ring.done()) == 16
    assert wire.readable is not None  # and goes on when others had their turn


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([(BUFFERS, 100)], [(BUFFERS, 100)]), ([(BUFFERS, 100)], []), ([], [(BUFFERS, 11)])],
)
def test_a_buffer_that_cannot_take_a_frame_breaks_the_device(memory, readable, writable):
    wire = Wire()
    driver = make(memory, wire)
    ring = driver.rings[RECEIVE]
    ring.offer(ring.chain(readable, writable))
    driver.kick(RECEIVE)
    assert not driver.broken
    wire.arrive(frame(1))
    assert driver.broken
    driver.start()
    offer_buffers(driver, 1, 2048)
    wire.arrive(frame(2))
    assert received(driver) == [bytes(10) + b"\1\0" + frame(2)] and not driver.broken


@pytest.mark.parametrize(
    ("readable", "writable"), [([(BUFFERS, 11)], []), ([(BUFFERS, 80)], [(BUFFERS, 1)])]
)
def test_what_is_no_frame_breaks_the_device(memory, readable, writable):
    driver = make(memory, Wire())
    ring = driver.rings[TRANSMIT]
    ring.offer(ring.chain(readable, writable))
    driver.kick(TRANSMIT)
    assert driver.broken


def command(driver: Driver, data: bytes) -> int:
    ring = driver.rings[CONTROL]
    driver.memory.write(BUFFERS, data)
    driver.memory.write_u8(BUFFERS + 0x1000, 0xFF)
    ring.offer(ring.chain([(BUFFERS, len(data))], [(BUFFERS + 0x1000, 1)]))
    driver.kick(CONTROL)
    assert ring.done() == [(0, 1)]
    return driver.memory.read_u8(BUFFERS + 0x1000)


def test_commands(memory):
    wire = Wire(offloads=True)
    driver = make(memory, wire)
    every = [v.NET_F_GUEST_CSUM, v.NET_F_GUEST_TSO4, v.NET_F_GUEST_TSO6, v.NET_F_GUEST_ECN]
    assert wire.wanted == sum(1 << bit for bit in every)
    assert command(driver, b"\0\0\1") == v.NET_OK  # promiscuous
    assert command(driver, b"\0\7\1") == v.NET_ERR
    assert command(driver, b"\1\0" + bytes(8)) == v.NET_OK  # tables of addresses
    new = bytes.fromhex("525400aabbcc")
    assert command(driver, b"\1\1" + new) == v.NET_OK
    assert driver.device.config()[:6] == new
    assert command(driver, b"\1\1" + new[:5]) == v.NET_ERR
    offloads = struct.pack("<Q", 1 << v.NET_F_GUEST_CSUM)
    assert command(driver, b"\5\0" + offloads) == v.NET_OK and wire.wanted == 2
    assert command(driver, b"\5\0" + struct.pack("<Q", 1 << 40)) == v.NET_ERR
    assert command(driver, b"\5\0") == v.NET_ERR
    assert command(driver, b"\x63\0") == v.NET_ERR and command(driver, b"\0") == v.NET_ERR
    assert command(make(memory, Wire()), b"\5\0" + offloads) == v.NET_ERR
    state = driver.registers.state()
    other = Driver(Net(Wire(), MAC), memory)
    del state["accepted"]
    with pytest.raises(ConfigError):
        other.registers.restore(state)
    other.device.restore(driver.device.state())
    assert other.device.config()[:6] == new


def test_a_cable_that_is_pulled_out_carries_nothing(memory):
    wire = Wire()
    driver = make(memory, wire)
    offer_buffers(driver, 2, 2048)
    driver.device.set_link(False)
    assert driver.device.config()[6:8] == b"\0\0" and driver.lines.edges == 1
    send(driver, frame(1))
    assert wire.sent == [] and len(driver.rings[TRANSMIT].done()) == 1
    wire.arrive(frame(2))
    assert received(driver) == []
    driver.device.set_link(True)
    assert received(driver) == [bytes(10) + b"\1\0" + frame(2)]
    wire.gone = True
    wire.arrive()
    assert not driver.device.link


def test_both_directions_have_a_limit_of_their_own(memory):
    wire = Wire()
    clock = Driver(Net(wire, MAC), memory).clock
    driver = make(memory, wire, sent=Limit(clock, 1), received=Limit(clock, 0, 60))
    driver.clock = clock
    offer_buffers(driver, 4, 2048)
    wire.arrive(frame(1), frame(2))
    assert received(driver) == [bytes(10) + b"\1\0" + frame(1)]
    send(driver, frame(3), frame(4))
    assert wire.sent == [frame(3)]


# passt.

needs_passt = pytest.mark.skipif(
    shutil.which("passt") is None, reason="no passt; apt-get install passt"
)


@pytest.fixture
def loop():
    failures: list[BaseException] = []
    loop = EventLoop(failures.append)
    yield loop
    loop.close()
    assert not failures


@needs_passt
def test_passt_answers_and_ends_with_its_socket(loop):
    passt = Passt(loop, MAC)
    process = passt._process
    came = threading.Event()
    passt.when_readable(came.set)
    request = struct.pack("!6s6sHHHBBH", b"\xff" * 6, MAC, 0x0806, 1, 0x0800, 6, 4, 1)
    request += MAC + socket.inet_aton("10.0.2.15") + bytes(6) + socket.inet_aton("10.0.2.2")
    assert passt.has_room()
    passt.send([memoryview(request[:20]), memoryview(request[20:])])
    assert came.wait(60)
    answer = passt.receive()
    assert answer is not None and answer[12:14] == b"\x08\x06" and answer[28:32] == b"\x0a\0\2\2"
    passt.close()
    assert process.returncode == 0


@needs_passt
def test_a_port_in_use_is_told(loop):
    with socket.create_server(("127.0.0.1", 0)) as server:
        forward = Forward(False, "127.0.0.1", server.getsockname()[1], 80).for_passt()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(
            ConfigError, match=r"passt does not run: .*; is a port of hostfwd= in use"
        ):
            Passt(loop, MAC, forwards=forward)
        assert len(os.listdir("/proc/self/fd")) == before


def test_without_passt_the_remedy_is_named(loop, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match="apt-get install passt"):
        Passt(loop, MAC)


class FakePasst(Passt):
    """The frames' side of it, with a socket of the test's."""

    def __init__(self, loop: EventLoop) -> None:
        self.mtu, self.gone, self._loop, self._unsent = 1500, False, loop, b""
        self._buffer, self._start, self._end = bytearray(4 * 65539), 0, 0
        self._socket, self.other = socket.socketpair()
        self._socket.setblocking(False)
        self._writer = self._socket.dup()


@pytest.fixture
def pair(loop):
    passt = FakePasst(loop)
    yield passt
    passt._close_sockets()
    passt.other.close()


def test_frames_come_whole_however_the_stream_is_cut(pair):
    stream = b"".join(struct.pack(">I", n) + bytes([n % 251]) * n for n in (1, 60, 65535, 3, 1514))
    got = []
    for at in range(0, len(stream), 1000):
        pair.other.sendall(stream[at : at + 1000])
        while (one := pair.receive()) is not None:
            got.append((len(one), one[0]))
    assert got == [(n, n % 251) for n in (1, 60, 65535, 3, 1514)] and not pair.gone
    pair.other.sendall(struct.pack(">I", 65536))
    assert pair.receive() is None and pair.gone


def test_a_full_socket_keeps_the_rest_of_one_frame(pair, loop):
    data = memoryview(os.urandom(60000))
    count = 0
    while pair.has_room():
        pair.send([data[:14], data[14:]])
        count += 1
    room = threading.Event()
    pair.when_room(room.set)
    expected = (struct.pack(">I", 60000) + data) * count
    got = b""
    while len(got) < len(expected):
        got += pair.other.recv(1 << 20)
        pair.has_room()
    assert got == expected and room.wait(60)
    pair.other.close()
    pair.send([data])
    assert pair.receive() is None and pair.gone


# Options.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user", {"tap": "", "forwards": ()}),
        (
            "user,hostfwd=tcp:127.0.0.1:8080-:80,hostfwd=udp::53-:53,mtu=1400",
            {
                "forwards": (Forward(False, "127.0.0.1", 8080, 80), Forward(True, "", 53, 53)),
                "mtu": 1400,
            },
        ),
        ("tap=t0,address=10.0.0.1/24,bridge=br0", {"address": "10.0.0.1/24", "bridge": "br0"}),
        ("tap=t0,mac=52:54:00:12:34:56,bps=10M,pps=5", {"mac": MAC, "bps": 10 << 20, "pps": 5}),
        ("user,hostfwd=tcp:[::1]:1-:2", {"forwards": (Forward(False, "::1", 1, 2),)}),
    ],
)
def test_interfaces(text, expected):
    options = NetOptions.parse(text)
    assert {key: getattr(options, key) for key in expected} == expected
    assert len(options.mac) == 6 and not options.mac[0] & 1
    assert options.mac == NetOptions.parse(text).mac


@pytest.mark.parametrize(
    "text",
    [
        "", "tap", "tap=", "user=x", "bridge=br0", "user,tap=x", "user,address=10.0.0.1/24",
        "tap=t0,hostfwd=tcp::1-:2", "user,hostfwd=tcp:1-:2", "user,hostfwd=tcp::0-:2",
        "user,hostfwd=tcp::70000-:2", "user,hostfwd=tcp:localhost:1-:2", "user,mtu=60",
        "user,mtu=70000", "user,mac=01:00:00:00:00:00", "user,mac=52:54",
        "tap=t0,address=10.0.0.1/99",
        "user,mac=00:00:00:00:00:00", "user,bps=-1", "user,pps=x", "user,mac=1,mac=2",
        "tap=\udcff", "tap=a\nb", "user,mac=\n", "user,address=\n",
    ],
)  # fmt: skip
def test_what_is_no_interface(text):
    with pytest.raises(ConfigError, match=r"; use |; leave") as caught:
        NetOptions.parse(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a%d", "a b", "a/b", "a:1", "a\udcff", "a" * 16, ""])
def test_what_is_no_name_of_a_tap(name):
    with pytest.raises(ConfigError, match="is no name of an interface; use"):
        Tap(name, EventLoop(print))


def test_different_interfaces_have_different_addresses():
    names = ["user", "tap=a", "tap=b"]
    assert len({NetOptions.parse(name).mac for name in names}) == 3
    assert NetOptions.parse("user", 0).mac != NetOptions.parse("user", 1).mac


@pytest.mark.skipif(os.geteuid() != 0, reason="making a tap interface needs root")
def test_a_tap_that_was_deleted_is_a_cable_pulled_out(memory):
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("there is no /dev/net/tun")
    gone = threading.Event()
    failures: list[BaseException] = []
    loop = EventLoop(failures.append)
    tap = Tap("vmexit-gone", loop)
    driver = Driver(Net(tap, MAC), memory)
    driver.start()
    offer_buffers(driver, 16, 2048)  # the host may send something by itself
    before = driver.registers.config_changed
    driver.registers.config_changed = lambda: (before(), gone.set())
    subprocess.run(["ip", "link", "del", "vmexit-gone"], check=True)
    assert gone.wait(20)
    driver.start()
    driver.set(v.MMIO_STATUS, 0)
    loop.close()
    tap.close()
    assert failures == []
