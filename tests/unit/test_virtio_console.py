"""The console device: ports and their data, control messages, sizes, backends that are slow."""

import struct
from collections.abc import Callable

import pytest
from fakes import ManualClock
from virtio_driver import F_ALL, Driver

from vmexit.abi import virtio as v
from vmexit.core.errors import ConfigError
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.console import Console
from vmexit.devices.virtio.console_port import Port
from vmexit.machine.config import MachineConfig
from vmexit.machine.console import ConsoleOptions

BUFFERS = 0xA_0000
ONE_PORT = F_ALL & ~(1 << v.CONSOLE_F_MULTIPORT)
READY, ADD, _, PORT_READY, CONSOLE_PORT, RESIZE, OPEN, NAME = range(8)


class Line:
    """A backend whose other end is in the test's hand."""

    def __init__(self) -> None:
        self.out = b""
        self.coming = b""
        self.reads = 0
        self.terminal: tuple[int, int] | None = None
        self.readable: Callable[[], None] | None = None
        self.runs: list[bool] = []

    def write(self, data: bytes) -> None:
        self.out += data

    def read(self, size: int) -> bytes:
        self.reads += 1
        data, self.coming = self.coming[:size], self.coming[size:]
        return data

    def when_readable(self, function: Callable[[], None]) -> None:
        self.readable = function

    def size(self) -> tuple[int, int] | None:
        return self.terminal

    def running(self, runs: bool) -> None:
        self.runs.append(runs)

    def arrive(self, data: bytes) -> None:
        self.coming += data
        function, self.readable = self.readable, None
        if function is not None:
            function()


class Guest:
    """A driver with a console, hvc0, and two further ports."""

    def __init__(self, memory: GuestMemory, *names: str, features: int | None = F_ALL) -> None:
        """Without `features` the driver does not start."""
        self.lines = [Line() for _ in names]
        self.writer = ManualClock()  # what its timers call runs on threads that may wait
        self.clock = ManualClock()
        self.ports = [
            Port(line, self.writer, name) for line, name in zip(self.lines, names, strict=True)
        ]
        self.console = Console(self.ports, self.clock)
        self.driver = Driver(self.console, memory)
        self.memory = memory
        if features is not None:
            self.driver.start(features)

    def ring(self, queue: int):
        return self.driver.rings[queue]

    def offer(self, queue: int, count: int = 1, size: int = 64) -> None:
        """Buffers to write to."""
        ring = self.ring(queue)
        for number in range(count):
            at = BUFFERS + 0x8000 * (queue % 8) + 0x400 * number
            ring.describe(number, at, size, v.DESC_F_WRITE)
        ring.offer(*range(count))
        self.driver.kick(queue)

    def received(self, queue: int) -> list[bytes]:
        return [
            self.memory.read(BUFFERS + 0x8000 * (queue % 8) + 0x400 * head, size)
            for head, size in self.ring(queue).done()
        ]

    def send(self, queue: int, data: bytes) -> None:
        self.memory.write(0x9_0000, data)
        ring = self.ring(queue)
        ring.offer(ring.chain([(0x9_0000, len(data))], []))
        self.driver.kick(queue)

    def control(self, port: int, event: int, value: int = 1) -> None:
        self.send(v.CONSOLE_CONTROL_TX, struct.pack("<IHH", port, event, value))

    def told(self) -> list[tuple[int, int, int, bytes]]:
        """Control messages; the buffers are offered again."""
        found: list[tuple[int, int, int, bytes]] = []
        ring = self.ring(v.CONSOLE_CONTROL_RX)
        if not ring.index:
            self.offer(v.CONSOLE_CONTROL_RX, 4)
        while done := ring.done():
            for head, size in done:
                data = self.memory.read(
                    BUFFERS + 0x8000 * v.CONSOLE_CONTROL_RX + 0x400 * head, size
                )
                found.append((*struct.unpack_from("<IHH", data), data[8:]))
            ring.offer(*[head for head, _ in done])
            self.driver.kick(v.CONSOLE_CONTROL_RX)
        return found

    def open(self, *ports: int) -> None:
        """As Linux does it, up to a program that has opened the port."""
        self.control(0, READY)
        self.told()
        for port in ports:
            self.control(port, PORT_READY)
            self.told()
            self.control(port, OPEN)


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 1 << 20)])
    yield memory
    memory.close()


@pytest.fixture
def guest(memory):
    return Guest(memory, "", "data", "")


def rx(port: int) -> int:
    return 2 * port + 2 if port else 0


def tx(port: int) -> int:
    return rx(port) + 1


def test_the_configuration_is_a_size_and_the_number_of_ports(guest):
    assert guest.driver.get(v.MMIO_DEVICE_ID) == 3 and guest.driver.features() & 7 == 7
    assert len(guest.driver.rings) == 8
    config = [guest.driver.get(v.MMIO_CONFIG + at) for at in (0, 4, 8)]
    assert config == [0, 3, 0]
    guest.console.resize(80, 25)
    assert guest.driver.get(v.MMIO_CONFIG) == 80 | 25 << 16


def test_ports_are_added_named_and_opened_in_the_order_of_the_standard(guest):
    assert guest.told() == []
    guest.control(0, READY)
    assert guest.told() == [(n, ADD, 1, b"") for n in range(3)]
    guest.console.resize(80, 25)
    guest.control(0, PORT_READY)
    guest.control(1, PORT_READY)
    size = struct.pack("<HH", 80, 25)
    assert guest.told() == [
        (0, CONSOLE_PORT, 1, b""), (0, RESIZE, 0, size), (0, OPEN, 1, b""),
        (1, NAME, 1, b"data"), (1, OPEN, 1, b""),
    ]  # fmt: skip
    guest.control(2, PORT_READY, 0)  # the driver could not
    assert guest.told() == [] and not guest.driver.broken


def test_output_goes_to_the_backend_of_its_port(guest):
    guest.open(0, 1, 2)
    for port in range(3):
        guest.send(tx(port), b"to %d" % port)
        assert guest.ring(tx(port)).done() == [(0, 0)]
    assert all(line.out == b"" for line in guest.lines)  # nothing waits for a backend here
    guest.writer.fire()
    assert [line.out for line in guest.lines] == [b"to 0", b"to 1", b"to 2"]


def test_input_is_taken_when_the_guest_has_a_buffer_for_it(guest):
    guest.open(0, 1)
    line = guest.lines[1]
    line.arrive(b"abcdefghij")
    assert line.reads == 0
    guest.offer(rx(1), 2, size=4)
    assert guest.received(rx(1)) == [b"abcd", b"efgh"] and line.coming == b"ij"
    guest.offer(rx(1), 2)
    assert guest.received(rx(1)) == [b"ij"]
    line.arrive(b"later")
    assert guest.received(rx(1)) == [b"later"]
    line.arrive(b"and more")
    assert line.coming == b"and more" and guest.lines[0].reads == 0
    guest.offer(rx(0))
    guest.lines[0].arrive(b"hvc")
    assert guest.received(rx(0)) == [b"hvc"]


def test_input_waits_until_a_program_of_the_guest_opens_the_port(guest):
    guest.open(0)
    guest.offer(rx(1), 3)
    guest.lines[1].arrive(b"early")
    assert guest.lines[1].reads == 0
    guest.control(1, OPEN)
    assert guest.received(rx(1)) == [b"early"]
    guest.control(1, OPEN, 0)
    guest.lines[1].arrive(b"late")
    assert guest.received(rx(1)) == []
    guest.control(1, OPEN)
    assert guest.received(rx(1)) == [b"late"]


def test_input_that_never_ends_is_given_a_queue_at_a_time(guest):
    guest.open(0)
    line = guest.lines[0]
    line.coming = b"x" * 100
    guest.offer(rx(0), 16, size=1)
    assert len(guest.received(rx(0))) == 16 and line.readable is not None


def test_a_driver_of_one_port(memory):
    guest = Guest(memory, "", "data", features=ONE_PORT)
    guest.offer(rx(0), 2)
    guest.lines[0].arrive(b"in")
    assert guest.received(rx(0)) == [] and guest.lines[0].reads == 0  # Linux would drop it
    guest.send(tx(0), b"out")
    assert guest.received(rx(0)) == [b"in"]
    guest.writer.fire()
    assert guest.lines[0].out == b"out"
    guest.offer(v.CONSOLE_CONTROL_RX)
    guest.control(0, READY)
    guest.send(tx(1), b"no such port")
    guest.offer(rx(1))
    guest.lines[1].arrive(b"no such port")
    guest.writer.fire()
    assert guest.received(v.CONSOLE_CONTROL_RX) == guest.received(rx(1)) == []
    assert guest.lines[1].out == b"" and guest.lines[1].reads == 0
    edges = guest.driver.lines.edges
    guest.console.resize(100, 30)
    assert (
        guest.driver.lines.edges == edges + 1 and guest.driver.get(v.MMIO_CONFIG) == 30 << 16 | 100
    )
    assert not guest.driver.broken


def test_a_lone_console_needs_no_control_messages(memory):
    guest = Guest(memory, "")
    assert guest.driver.features() & 7 == 1 << v.CONSOLE_F_SIZE | 1 << v.CONSOLE_F_EMERG_WRITE
    assert len(guest.driver.rings) == 2
    guest.driver.kick(v.CONSOLE_CONTROL_TX)
    guest.offer(rx(0))
    guest.lines[0].arrive(b"in")
    assert guest.received(rx(0)) == [] and guest.lines[0].reads == 0  # Linux would drop it
    guest.send(tx(0), b"out")
    assert guest.received(rx(0)) == [b"in"]
    guest.writer.fire()
    assert guest.lines[0].out == b"out"
    guest.console.resize(80, 25)
    assert guest.driver.get(v.MMIO_CONFIG) == 25 << 16 | 80
    edges = guest.driver.lines.edges
    guest.driver.start()
    assert guest.driver.lines.edges == edges + 1  # for the size, to which it is new
    assert guest.driver.get(v.MMIO_INTERRUPT_STATUS) == v.INTERRUPT_CONFIG
    guest.driver.kick(rx(0))
    assert guest.driver.lines.edges == edges + 1
    named = Guest(memory, "name")
    assert named.driver.features() >> v.CONSOLE_F_MULTIPORT & 1 and len(named.driver.rings) == 4
    assert not guest.driver.broken


def test_emergency_writes_need_no_driver(guest):
    guest.driver.set(v.MMIO_STATUS, 0)
    for byte in b"oops":
        guest.driver.registers.write(v.MMIO_CONFIG + 8, 4, byte | 0x1234_5600)
    guest.driver.registers.write(v.MMIO_CONFIG + 8, 1, ord("!"))
    guest.driver.registers.write(v.MMIO_CONFIG + 9, 1, ord("?"))
    guest.driver.registers.write(v.MMIO_CONFIG, 4, ord("?"))
    guest.writer.fire()
    assert guest.lines[0].out == b"oops!"
    for _ in range(70_000):
        guest.driver.registers.write(v.MMIO_CONFIG + 8, 1, ord("x"))
    guest.writer.fire()
    assert len(guest.lines[0].out) == 5 + (64 << 10)


def test_a_slow_backend_makes_the_guest_wait_and_nothing_is_lost(guest):
    guest.open(0, 1)
    sent = [bytes([n]) * 16_000 for n in range(10)]
    ring = guest.ring(tx(1))
    used = 0
    for data in sent:
        guest.memory.write(0x9_0000, data)  # the last one's bytes, once it is used
        ring.offer(ring.chain([(0x9_0000, len(data))], []))
        guest.driver.kick(tx(1))
        used += len(done := ring.done())
        if not done:
            guest.writer.fire()
            assert ring.done() == [(0, 0)]
    assert used < len(sent)
    guest.send(tx(0), b"others go on")
    assert guest.ring(tx(0)).done() == [(0, 0)]
    guest.writer.fire()
    assert guest.lines[1].out == b"".join(sent)


def test_at_the_end_of_a_run_all_is_written(guest):
    guest.open(0, 1)
    guest.console.running(True)
    guest.send(tx(0), b"the last words")
    guest.driver.registers.hold(True)
    guest.console.running(False)
    assert guest.lines[0].out == b"the last words"
    assert guest.lines[1].runs == [True, False]


def test_a_chain_that_would_fill_the_hosts_memory_is_cut(guest):
    guest.open(0)
    ring = guest.ring(tx(0))
    ring.offer(ring.chain([(0, 1 << 20)] * 15, []))
    guest.driver.kick(tx(0))
    guest.writer.fire()
    assert ring.done() == [(0, 0)] and len(guest.lines[0].out) == 1 << 20


@pytest.mark.parametrize(
    "message",
    [
        b"", b"\1", struct.pack("<IH", 0, OPEN), struct.pack("<IHH", 3, PORT_READY, 1),
        struct.pack("<IHH", 0xFFFF_FFFF, OPEN, 1), struct.pack("<IHH", 0, 0xFFFF, 1),
        struct.pack("<IHH", 0, ADD, 1), struct.pack("<IHH", 1, RESIZE, 1) + bytes(5000),
        struct.pack("<IHH", 0, OPEN, 0xFFFF),
    ],
)  # fmt: skip
def test_control_messages_that_make_no_sense_are_passed_over(guest, message):
    guest.open(1)
    ring = guest.ring(v.CONSOLE_CONTROL_TX)
    ring.done()
    guest.send(v.CONSOLE_CONTROL_TX, message or b"x")
    assert ring.done() == [(0, 0)] and not guest.driver.broken
    assert guest.told() == []
    guest.offer(rx(1))
    guest.lines[1].arrive(b"still")
    assert guest.received(rx(1)) == [b"still"]


def test_what_is_asked_for_again_and_again_is_told_once(guest):
    guest.control(0, READY)
    for _ in range(1000):
        guest.control(0, PORT_READY)
        guest.control(1, PORT_READY)
    assert len(guest.console._messages) == 3 + 4
    assert len(guest.told()) == 7


@pytest.mark.parametrize("size", [1, 7, 11])
def test_a_buffer_too_small_for_a_message_breaks_the_device(guest, size):
    guest.offer(v.CONSOLE_CONTROL_RX, 8, size)
    guest.control(0, READY)
    assert guest.driver.broken == (size < 8)
    guest.control(1, PORT_READY)
    assert guest.driver.broken


def test_buffers_of_the_wrong_direction(guest):
    guest.open(0)
    ring = guest.ring(rx(0))
    ring.offer(ring.chain([(BUFFERS, 64)], []))
    guest.driver.kick(rx(0))
    assert guest.driver.broken
    guest.driver.start()
    guest.open(0)
    guest.offer(tx(0))  # nothing to read in it
    guest.writer.fire()
    assert guest.ring(tx(0)).done() == [(0, 0)] and guest.lines[0].out == b""


def resizes(guest) -> list[tuple[int, int, int]]:
    """Port, columns and rows of each message."""
    told = guest.told()
    assert all(event == RESIZE for _, event, _, _ in told)
    return [(port, *struct.unpack("<HH", data)) for port, _, _, data in told]


def test_sizes_are_told_when_they_change(guest):
    guest.open(0, 1, 2)
    guest.console.resize(80, 25)
    guest.console.resize(132, 43, 1)  # the second console: port 2
    assert resizes(guest) == [(0, 80, 25), (2, 132, 43)]
    guest.console.resize(80, 25)
    assert resizes(guest) == []
    for number, columns, rows in ((2, 80, 25), (-1, 80, 25), (0, 0, 25), (0, 80, 1 << 16)):
        with pytest.raises(ConfigError, match=r"; "):
            guest.console.resize(columns, rows, number)
    assert resizes(guest) == []


def test_a_size_that_changes_before_the_port_is_open_is_told_then(guest):
    guest.control(0, READY)
    guest.control(0, PORT_READY)
    guest.told()
    guest.console.resize(80, 25)
    assert guest.told() == []
    guest.control(0, OPEN)
    assert resizes(guest) == [(0, 80, 25)]


def test_the_size_of_a_terminal_is_looked_at_while_the_machine_runs(guest):
    guest.lines[0].terminal = (0, 0)  # a new pseudo-terminal
    guest.console.running(True)
    assert guest.ports[0].size is None
    guest.lines[0].terminal = (80, 24)
    guest.clock.advance(1_000_000_000)
    assert guest.driver.get(v.MMIO_CONFIG) == 24 << 16 | 80
    guest.open(0)
    guest.told()
    guest.lines[0].terminal = (100, 50)
    guest.clock.advance(1_000_000_000)
    assert resizes(guest) == [(0, 100, 50)]
    guest.console.resize(10, 10)
    guest.clock.advance(1_000_000_000)
    assert resizes(guest) == [(0, 10, 10)]  # until the terminal has another size
    guest.lines[0].terminal = None  # it is gone
    guest.clock.advance(1_000_000_000)
    assert guest.clock.armed == [] and resizes(guest) == []
    guest.lines[0].terminal = (1, 1)
    guest.console.running(False)
    guest.console.running(True)
    assert resizes(guest) == [(0, 1, 1)] and guest.clock.armed
    guest.console.running(False)
    assert guest.clock.armed == []


def test_without_a_terminal_nothing_is_looked_at(guest):
    guest.console.running(True)
    assert guest.clock.armed == []


def test_ports_are_as_before_after_a_restore(guest, memory):
    guest.open(0, 1)
    guest.console.resize(80, 25)
    guest.told()
    guest.control(2, PORT_READY)
    guest.console._messages[1, NAME] = None  # one that the driver has no buffer for
    registers = guest.driver.registers
    registers.hold(True)
    state = registers.state()
    other = Guest(memory, "", "data", "", features=None)
    other.driver.rings = guest.driver.rings
    other.driver.registers.hold(True)
    other.driver.registers.restore(state)
    assert other.driver.registers.state() == state
    assert [port.open for port in other.ports] == [True, True, False]
    other.driver.registers.hold(False)
    other.offer(rx(1), 2)
    other.lines[1].arrive(b"goes on")
    assert other.received(rx(1)) == [b"goes on"]
    assert (1, NAME, 1, b"data") in other.told()
    other.lines[0].terminal = (90, 30)  # that of another user
    for _ in range(2):  # and once more in the same machine
        other.console.running(True)
        assert other.ports[0].size == (90, 30)
        other.console.running(False)
        other.driver.registers.restore(state)
        assert other.ports[0].size == (80, 25)


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["", "other", ""]}, {"names": None}, {"open": [1, 1]}, {"open": [2, 0, 0]},
        {"sizes": [0] * 5}, {"told": [1 << 16] * 6}, {"messages": 1}, {"messages": 1 << 20},
        {"messages": 1, "ports": [3], "events": [ADD]}, {"version": 2},
        {"messages": 1, "ports": [0], "events": [READY]},
    ],
)  # fmt: skip
def test_what_is_no_state(guest, change):
    state = guest.console.state()
    guest.console.restore(state)
    with pytest.raises(ConfigError, match=r"state"):
        guest.console.restore(state | change)


def test_options():
    assert ConsoleOptions.parse("pty") == ("pty", "")
    assert ConsoleOptions.parse("unix:/a,,b,name=org.example.0") == ("unix:/a,b", "org.example.0")
    config = MachineConfig(machine="microvm", consoles=("null", "pty,name=x"), rng=True)
    assert config.virtio_devices == 2


@pytest.mark.parametrize(
    "texts",
    [
        ("",), ("null,",), ("null,name=",), ("null,name=a/b",), ("null,name=" + "x" * 256,),
        ("null,name=a\nb",), ("null,size=1",), ("null,name=a,name=b",),
        ("null,name=a", "pty,name=a"), ("stdio", "stdio"), ("null",) * 17,
    ],
)  # fmt: skip
def test_options_that_cannot_be(texts):
    with pytest.raises(ConfigError, match=r"; "):
        MachineConfig(machine="microvm", consoles=texts)


def test_standard_input_has_one_place(memory):
    MachineConfig(machine="microvm", consoles=("stdio",), serial="null")
    with pytest.raises(ConfigError, match=r"standard input .*; "):
        MachineConfig(machine="microvm", consoles=("stdio,name=a",), serial="stdio")
    with pytest.raises(ConfigError, match=r"no virtio devices; "):
        MachineConfig(consoles=("null",))
