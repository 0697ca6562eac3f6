"""The registers of a virtio device over MMIO, and its queues, as a driver sees them."""

import struct
import threading

import pytest
from virtio_driver import F_ALL, Driver

from vmexit.abi import virtio as v
from vmexit.core.errors import ConfigError
from vmexit.core.memory import GuestMemory
from vmexit.core.rate import Limit
from vmexit.devices.virtio.queue import MOST_SEGMENTS, Chain, Queue
from vmexit.devices.virtio.rng import Rng

MEMORY = 1 << 20
BUFFERS = 0x8_0000


class Echo:
    """Writes what it reads, in the same chain. Its configuration is 8 bytes."""

    device_id = 42
    features = 1 << 3 | 1 << 40
    queue_sizes = (64, 8)
    unsaved = ""
    flows = ()

    def __init__(self) -> None:
        self.data = bytearray(b"config!!")
        self.queues = []
        self.accepted = 0
        self.chains: list[Chain] = []

    def config(self):
        return bytes(self.data)

    def write_config(self, offset, data):
        self.data[offset : offset + len(data)] = data

    def activate(self, queues, features):
        self.queues, self.accepted = queues, features

    def notify(self, index):
        self.queues[index].serve(lambda chain: chain.write(chain.read(1 << 20)))

    def settle(self):
        """Nothing goes on by itself."""

    def reset(self):
        self.queues = []

    def state(self):
        return {"version": 1, "data": bytes(self.data)}

    def restore(self, state):
        self.data[:] = state["data"]


@pytest.fixture
def memory():
    memory = GuestMemory([(0, MEMORY)])
    yield memory
    memory.close()


@pytest.fixture
def driver(memory):
    return Driver(Echo(), memory)


def echo(driver, text: bytes, number: int = 0) -> bytes:
    ring = driver.rings[number]
    driver.memory.write(BUFFERS, text)
    driver.memory.write(BUFFERS + 0x1000, bytes(len(text)))
    ring.offer(ring.chain([(BUFFERS, len(text))], [(BUFFERS + 0x1000, len(text))]))
    driver.kick(number)
    assert ring.done() == [(0, len(text))]
    return driver.memory.read(BUFFERS + 0x1000, len(text))


def test_what_a_driver_looks_for_first(driver):
    assert driver.get(0) == 0x74726976 and driver.get(4) == 2 and driver.get(8) == 42
    assert driver.features() == 1 << 3 | 1 << 40 | 1 << 28 | 1 << 29 | 1 << 32
    driver.set(v.MMIO_DEVICE_FEATURES_SEL, 2)
    assert driver.get(v.MMIO_DEVICE_FEATURES) == 0
    for number, size in ((0, 64), (1, 8), (2, 0), (0xFFFF_FFFF, 0)):
        driver.set(v.MMIO_QUEUE_SEL, number)
        assert driver.get(v.MMIO_QUEUE_SIZE_MAX) == size
    assert [driver.get(register) for register in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFF_FFFF] * 4


def test_registers_have_32_bits_and_the_configuration_any_size(driver):
    assert driver.registers.read(0, 1) == driver.registers.read(1, 2) == 0
    driver.registers.write(v.MMIO_STATUS, 1, 1)
    assert driver.get(v.MMIO_STATUS) == 0
    assert driver.registers.read(0x101, 1) == ord("o")
    assert driver.registers.read(0x102, 4) == int.from_bytes(b"nfig", "little")
    assert driver.registers.read(0x107, 4) == ord("!")  # behind it there is nothing
    driver.registers.write(0x100, 2, 0x4241)
    driver.registers.write(0x106, 4, 0xFFFF_FFFF)
    assert driver.device.config() == b"ABnfig!!"


@pytest.mark.parametrize("features", [0, 1 << 3, 1 << 32 | 1 << 4, 1 << 32 | 1 << 63])
def test_a_device_does_not_agree_to_what_it_has_not_offered_or_to_a_legacy_driver(driver, features):
    assert not driver.accept(features)
    assert driver.accept(1 << 32)


def test_a_queue_echoes_and_interrupts(driver):
    driver.start()
    assert driver.device.accepted == driver.features()
    for number in (0, 1):
        assert echo(driver, b"hello, device", number) == b"hello, device"
    assert driver.lines.edges == 2
    assert driver.get(v.MMIO_INTERRUPT_STATUS) == v.INTERRUPT_USED
    driver.set(v.MMIO_INTERRUPT_ACK, v.INTERRUPT_USED)
    assert driver.get(v.MMIO_INTERRUPT_STATUS) == 0


def test_the_rings_wrap(driver):
    driver.start(size=4)
    ring = driver.rings[0]
    ring.index = ring.seen = 0
    for turn in range(70_000):
        ring.offer(ring.chain([(BUFFERS, 1)], [(BUFFERS + 16, 1)]))
        if turn % 3 == 0:
            driver.kick()
            assert len(ring.done()) == (1 if turn == 0 else 3)
    assert not driver.broken


def test_an_indirect_table_and_many_parts(driver):
    driver.start()
    ring, memory = driver.rings[0], driver.memory
    memory.write(BUFFERS, bytes(range(100)))
    table = 0x7_0000
    direct = ring.desc
    ring.desc = table
    ring.chain(
        [(BUFFERS + 10 * i, 10) for i in range(10)], [(0x9_0000 + 64 * i, 7) for i in range(20)]
    )
    ring.desc = direct
    ring.describe(3, table, 30 * 16, v.DESC_F_INDIRECT)
    ring.offer(3)
    driver.kick()
    assert ring.done() == [(3, 100)]
    assert b"".join(memory.read(0x9_0000 + 64 * i, 7) for i in range(20))[:100] == bytes(range(100))


def test_interrupts_can_be_declined(driver):
    driver.start(~(1 << v.F_EVENT_IDX))
    ring = driver.rings[0]
    driver.memory.write_u16(ring.avail, v.AVAIL_F_NO_INTERRUPT)
    echo(driver, b"x")
    assert driver.lines.edges == 0
    driver.memory.write_u16(ring.avail, 0)
    echo(driver, b"x")
    assert driver.lines.edges == 1


def test_the_event_index_says_when_each_side_wants_to_know(driver):
    driver.start()
    ring = driver.rings[0]
    ring.want_interrupt_at(2)
    for number in range(5):
        echo(driver, b"x")
        # With the third one used, the index passes 2; from then on it is behind.
        assert driver.lines.edges == (number >= 2), number
        # The device wants to know of the very next one.
        assert driver.memory.read_u16(ring.used + 4 + 8 * ring.size) == number + 1


def test_a_batch_makes_one_interrupt(driver):
    driver.start()
    ring = driver.rings[0]
    ring.offer(*[ring.chain([(BUFFERS, 1)], [(BUFFERS + 16, 1)], 2 * i) for i in range(8)])
    driver.kick()
    assert [head for head, _ in ring.done()] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert driver.lines.edges == 1


OUTSIDE = MEMORY - 8


@pytest.mark.parametrize(
    ("number", "descriptors"),
    [
        (16, []),  # a head that is no descriptor
        (0xFFFF, []),
        (0, [(BUFFERS, 16, v.DESC_F_NEXT, 16)]),
        (0, [(BUFFERS, 16, v.DESC_F_NEXT, 0)]),  # a loop
        (0, [(BUFFERS, 16, v.DESC_F_NEXT, 1), (BUFFERS, 16, v.DESC_F_NEXT, 0)]),
        (0, [(BUFFERS, 0, 0, 0)]),
        (0, [(OUTSIDE, 16, 0, 0)]),
        (0, [((1 << 64) - 8, 16, 0, 0)]),
        (0, [(BUFFERS, 0xFFFF_FFFF, v.DESC_F_WRITE, 0)]),
        (0, [(BUFFERS, 16, v.DESC_F_WRITE | v.DESC_F_NEXT, 1), (BUFFERS, 16, 0, 0)]),
        (0, [(BUFFERS, 15, v.DESC_F_INDIRECT, 0)]),
        (0, [(BUFFERS, 0, v.DESC_F_INDIRECT, 0)]),
        (0, [(OUTSIDE, 16, v.DESC_F_INDIRECT, 0)]),
        (0, [(BUFFERS, 16, v.DESC_F_INDIRECT | v.DESC_F_NEXT, 1)]),
    ],
)  # fmt: skip
def test_a_broken_chain_breaks_the_device_until_it_is_reset(driver, number, descriptors):
    driver.start()
    ring = driver.rings[0]
    for index, descriptor in enumerate(descriptors):
        ring.describe(index, *descriptor)
    ring.offer(number)
    driver.kick()
    assert driver.broken and ring.done() == []
    assert driver.get(v.MMIO_INTERRUPT_STATUS) & v.INTERRUPT_CONFIG
    driver.start()
    assert not driver.broken and echo(driver, b"again") == b"again"


def test_an_indirect_table_within_an_indirect_table_is_refused(driver):
    driver.start()
    ring, direct = driver.rings[0], driver.rings[0].desc
    ring.desc = 0x7_0000
    ring.describe(0, 0x7_1000, 16, v.DESC_F_INDIRECT)
    ring.desc = direct
    ring.describe(0, 0x7_0000, 16, v.DESC_F_INDIRECT)
    ring.offer(0)
    driver.kick()
    assert driver.broken


def test_nobody_is_held_up_by_a_driver_that_always_has_more(memory):
    """Each buffer that is used is offered again at once, as by another vCPU."""
    driver = Driver(Rng(), memory)
    driver.start(size=8)
    ring = driver.rings[0]
    ring.chain([], [(BUFFERS, 8)])
    before = Queue.push

    def push(queue, chain, written):
        before(queue, chain, written)
        ring.offer(0)

    driver.device.queues[0].push = push.__get__(driver.device.queues[0])
    ring.offer(0)
    driver.kick()
    assert len(ring.done()) == 8
    driver.clock.fire()
    assert len(ring.done()) == 8
    del driver.device.queues[0].push
    driver.clock.fire()
    assert len(ring.done()) == 1
    driver.clock.fire()
    assert ring.done() == []


def test_nobody_is_held_up_for_long_by_large_requests():
    memory, part = GuestMemory([(0, 128 << 20)]), 100 << 20
    driver = Driver(Rng(), memory)
    driver.start()
    ring = driver.rings[0]
    ring.offer(*[ring.chain([(0x10_0000, part)], [(BUFFERS, 1)])] * 5)
    driver.kick()
    assert len(ring.done()) == 3  # 300 MiB
    driver.clock.fire()
    assert len(ring.done()) == 2
    memory.close()


def test_a_rom_is_not_written(memory):
    memory.add_rom(0x10_0000, b"ROM" * 1000)
    driver = Driver(Echo(), memory)
    driver.start()
    ring = driver.rings[0]
    ring.offer(ring.chain([(0x10_0000, 3)], [(BUFFERS, 3)]))
    driver.kick()
    assert ring.done() == [(0, 3)] and memory.read(BUFFERS, 3) == b"ROM"
    ring.offer(ring.chain([(BUFFERS, 3)], [(0x10_0003, 3)]))
    driver.kick()
    assert driver.broken and memory.read(0x10_0000, 9) == b"ROMROMROM"
    assert driver.accept(1 << 32)
    driver.set(v.MMIO_QUEUE_SEL, 0)
    driver.set(v.MMIO_QUEUE_SIZE, 4)
    driver.place(0x10_0000, 0x10_0100, 0x10_0200)
    driver.set(v.MMIO_QUEUE_READY, 1)
    assert driver.get(v.MMIO_QUEUE_READY) == 0


def test_an_index_that_is_more_than_the_queue_ahead_is_refused(driver):
    driver.start()
    driver.memory.write_u16(driver.rings[0].avail + 2, 17)
    driver.kick()
    assert driver.broken


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used"),
    [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (128, 0x1000, 0x2000, 0x3000),
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
        (16, MEMORY, 0x2000, 0x3000),
        (16, 0x1000, MEMORY - 4, 0x3000),
        (16, 0x1000, 0x2000, MEMORY - 64),
        (16, 1 << 63, 0x2000, 0x3000),
    ],
)
def test_a_queue_that_cannot_be_does_not_become_ready(driver, size, desc, avail, used):
    assert driver.accept(1 << 32)
    driver.set(v.MMIO_QUEUE_SEL, 0)
    driver.set(v.MMIO_QUEUE_SIZE, size)
    driver.place(desc, avail, used)
    driver.set(v.MMIO_QUEUE_READY, 1)
    assert driver.get(v.MMIO_QUEUE_READY) == 0 and driver.broken


def test_a_kick_out_of_turn_does_nothing(driver):
    driver.kick()
    driver.kick(7)
    driver.accept(1 << 32)
    driver.kick()
    driver.start()
    driver.kick(2)
    driver.set(v.MMIO_QUEUE_SEL, 0)
    driver.set(v.MMIO_QUEUE_READY, 0)
    driver.rings[0].offer(0)
    driver.kick()
    assert not driver.broken and driver.rings[0].done() == []


def test_a_driver_cannot_be_ready_before_it_has_agreed(driver):
    driver.set(v.MMIO_DRIVER_FEATURES_SEL, 1)
    driver.set(v.MMIO_DRIVER_FEATURES, 1)
    driver.set(v.MMIO_STATUS, v.DRIVER_OK)
    driver.kick()
    driver.set(v.MMIO_STATUS, v.FEATURES_OK)
    driver.kick()
    assert driver.get(v.MMIO_STATUS) == v.FEATURES_OK
    driver.set(v.MMIO_STATUS, v.DRIVER_OK)
    driver.kick()
    assert driver.get(v.MMIO_STATUS) == v.FEATURES_OK | v.DRIVER_OK


def test_a_chain_has_a_limit_over_both_of_its_tables(driver):
    """Direct descriptors, and then an indirect table that has as many as there may be."""
    driver.start()
    ring, memory = driver.rings[0], driver.memory
    table, most = 0x7_0000, MOST_SEGMENTS
    parts = [struct.pack("<QIHH", BUFFERS, 16, v.DESC_F_NEXT, i + 1) for i in range(most - 1)]
    memory.write(table, b"".join(parts) + struct.pack("<QIHH", BUFFERS, 16, v.DESC_F_WRITE, 0))
    ring.describe(1, table, 16 * most, v.DESC_F_INDIRECT)
    ring.offer(1)
    driver.kick()
    assert ring.done() == [(1, 16)]
    ring.describe(0, BUFFERS, 16, v.DESC_F_NEXT, 1)
    ring.offer(0)
    driver.kick()
    assert driver.broken and ring.done() == []


def test_the_parts_of_a_ready_queue_stay(driver):
    driver.start()
    driver.set(v.MMIO_QUEUE_SEL, 0)
    driver.set(v.MMIO_QUEUE_SIZE, 2)
    driver.place(0x100, 0x200, 0x300)
    assert echo(driver, b"as before") == b"as before"


def test_a_change_of_the_configuration_is_told(driver):
    before = driver.get(v.MMIO_CONFIG_GENERATION)
    driver.registers.config_changed()
    assert driver.lines.edges == 0  # nobody is there
    driver.start()
    driver.registers.config_changed()
    assert driver.get(v.MMIO_INTERRUPT_STATUS) == v.INTERRUPT_CONFIG and driver.lines.edges == 1
    assert driver.get(v.MMIO_CONFIG_GENERATION) == before + 2


def test_state_goes_on_in_another_device(driver, memory):
    driver.start(size=8)
    for _ in range(5):
        echo(driver, b"before")
    twin = Driver(Echo(), memory)
    twin.registers.restore(driver.registers.state())
    twin.rings = driver.rings
    assert twin.registers.state() == driver.registers.state()
    for _ in range(5):
        assert echo(twin, b"behind") == b"behind"
    assert twin.get(v.MMIO_STATUS) == 15


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"accepted": F_ALL},
        {"status": v.DRIVER_OK},
        {"interrupts": 4},
        {"queues": {}},
        {"device": None},
        {"selected": [0, 0]},
    ],
)
def test_another_state_is_refused(driver, change):
    driver.start()
    state = driver.registers.state()
    with pytest.raises(ConfigError, match="is not the state of a virtio device"):
        driver.registers.restore({**state, **change})


def test_a_ready_queue_outside_of_memory_is_refused(driver):
    driver.start()
    state = driver.registers.state()
    state["queues"]["0"]["desc"] = MEMORY
    with pytest.raises(ConfigError, match="is not the state of a virtio device"):
        driver.registers.restore(state)


def test_entropy_fills_what_it_is_given(memory):
    driver = Driver(Rng(), memory)
    driver.start()
    ring = driver.rings[0]
    ring.offer(ring.chain([], [(BUFFERS, 64), (BUFFERS + 0x1000, 64)]))
    driver.kick()
    assert ring.done() == [(0, 128)]
    first, second = memory.read(BUFFERS, 64), memory.read(BUFFERS + 0x1000, 64)
    assert first != bytes(64) and second != bytes(64) and first != second
    ring.offer(ring.chain([], [(BUFFERS, 0x7_0000)]))
    driver.kick()
    assert ring.done() == [(0, 0x1_0000)]  # enough at a time


def test_two_threads_kick_and_change_the_configuration(memory):
    """Each buffer is used once, whoever comes first."""
    driver = Driver(Rng(), memory)
    driver.start()
    ring = driver.rings[0]
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            driver.kick()
            driver.registers.config_changed()

    threads = [threading.Thread(target=disturb) for _ in range(2)]
    for thread in threads:
        thread.start()
    seen = 0
    for turn in range(2000):
        ring.offer(ring.chain([], [(BUFFERS + turn % 16, 8)], turn % 16))
        driver.kick()
        seen += len(ring.done())
    stop.set()
    for thread in threads:
        thread.join()
    seen += len(ring.done())
    assert seen == 2000 and not driver.broken


def test_a_held_device_waits_until_it_is_let_go(memory):
    driver = Driver(Rng(), memory)
    driver.start()
    ring = driver.rings[0]
    ring.offer(ring.chain([], [(BUFFERS, 8)]))
    driver.registers.hold(True)
    driver.kick()
    driver.kick()
    called: list[int] = []
    driver.registers.enter(lambda: called.append(1))
    assert ring.done() == [] and not called
    driver.registers.hold(False)
    assert ring.done() == [(0, 8)] and driver.lines.edges == 1 and called == [1]


def test_what_waits_for_a_held_device_is_forgotten_with_its_driver(memory):
    driver = Driver(Rng(), memory)
    driver.start()
    driver.registers.hold(True)
    called = []
    driver.registers.enter(lambda: called.append(1))
    driver.registers.reset()
    driver.registers.hold(False)
    driver.start()
    assert not called
    driver.registers.enter(lambda: called.append(1))
    assert called


def test_a_limit_holds_back_until_there_is_more(memory):
    driver = Driver(Rng(), memory)
    driver.start()
    driver.device.queues[0].limit = Limit(driver.clock, ops=2)
    ring = driver.rings[0]
    ring.chain([], [(BUFFERS, 8)])
    ring.offer(0, 0, 0, 0, 0)
    driver.kick()
    assert len(ring.done()) == 2
    driver.clock.fire()
    assert not ring.done()  # too early
    driver.clock.advance(500_000_000)
    assert len(ring.done()) == 1
    driver.clock.advance(1_000_000_000)
    assert len(ring.done()) == 2


def test_nothing_is_done_or_told_after_the_end(driver):
    """The controller is gone by then, and its eventfd may be another file."""
    driver.start()
    driver.registers.close()
    driver.registers.config_changed()
    called = []
    driver.registers.enter(lambda: called.append(1))
    assert driver.lines.edges == 0 and called == []
