"""A hostile driver: random registers, rings, descriptors and headers; each device survives it."""

import random
import struct
import tracemalloc

import pytest
from virtio_driver import Driver, Ring

from vmexit.abi import virtio as v
from vmexit.backends.disk import Disk
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.blk import Blk
from vmexit.devices.virtio.queue import Queue
from vmexit.devices.virtio.rng import Rng

MEMORY = 1 << 20
RING = 0x1_0000
DISK = 64 * 512
REGISTERS = [value for name, value in vars(v).items() if name.startswith("MMIO_")]
INTERESTING = [0, 1, 2, 3, 8, 15, 16, 17, 255, 256, 0x1000, MEMORY - 1, MEMORY, 1 << 31]
INTERESTING += [0xFFFF_FFFF, 0xFFFF_FFFE]


class Hostile:
    """One step is one thing that a driver can do. Mostly it does what makes some sense."""

    def __init__(self, driver: Driver, seed: int) -> None:
        self.driver, self.chance = driver, random.Random(seed)
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
        kind = self.chance.choice((0, 1, 4, 8, 11, 13, self.number()))
        sector = self.chance.choice((0, 1, 63, 64, self.number(64)))
        data = struct.pack("<IIQ", kind, self.number(), sector)
        data += struct.pack(
            "<QII", sector, self.chance.choice((1, 2, self.number())), self.number(3)
        )
        self.request = self.chance.randrange(0x8_0000, MEMORY - 64)
        self.driver.memory.write(self.request, data)

    def good_chain(self) -> int:
        """A header, data in either direction, a status; its head."""
        ring, data = self.driver.rings[0], [(self.chance.randrange(0x8_0000, 0xF_0000), 512)]
        into = data if self.chance.random() < 0.5 else []
        out = [(self.request, 16 if into else 32)] if self.chance.random() < 0.9 else []
        return ring.chain(out, [*into, (0xF_8000, 1)], self.chance.randrange(ring.size - 3))

    def descriptors(self) -> None:
        if self.chance.random() < 0.5:
            self.good_chain()
            return
        ring = self.driver.rings[0]
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
        ring: Ring = self.driver.rings[0]
        if self.chance.random() < 0.95:
            ring.index = self.driver.memory.read_u16(ring.avail + 2)
            if self.chance.random() < 0.8:
                self.header()
                ring.offer(self.good_chain())
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
        chance = self.chance.random()
        if chance < 0.3:
            self.driver.kick()
        elif chance < 0.5:
            self.descriptors()
        elif chance < 0.65:
            self.header()
        elif chance < 0.85:
            self.available()
        elif chance < 0.97:
            self.register()
        elif chance < 0.99 or not self.driver.broken:
            state = self.driver.registers.state()
            self.driver.registers.restore(state)
            assert self.driver.registers.state() == state
        else:
            self.driver.start()


def works(driver: Driver) -> bool:
    """Whether it could serve a request."""
    status = driver.get(v.MMIO_STATUS) & (v.DRIVER_OK | v.FEATURES_OK | v.NEEDS_RESET)
    driver.set(v.MMIO_QUEUE_SEL, 0)
    return status == v.DRIVER_OK | v.FEATURES_OK and bool(driver.get(v.MMIO_QUEUE_READY))


@pytest.fixture
def memory():
    memory = GuestMemory([(0, MEMORY)])
    yield memory
    memory.close()


@pytest.mark.parametrize("kind", ["blk", "readonly", "rng"])
@pytest.mark.parametrize(
    "steps",
    [10_000, pytest.param(400_000, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])],
)
def test_a_device_survives_a_hostile_driver(memory, tmp_path, monkeypatch, kind, steps):
    served: list[int] = []
    push = Queue.push
    monkeypatch.setattr(Queue, "push", lambda *a: (served.append(a[2]), push(*a)))
    image = tmp_path / "disk"
    image.write_bytes(b"d" * DISK)
    disk = Disk(str(image), readonly=kind == "readonly")
    driver = Driver(Rng() if kind == "rng" else Blk(disk), memory)
    tracemalloc.start()
    try:
        for turn in range(steps // 1000):
            driver.start()
            hostile = Hostile(driver, turn)
            for _ in range(1000):
                hostile.step()
                if hostile.chance.random() < (0.01 if works(driver) else 0.4):
                    driver.start()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert len(served) > steps // 100  # much of it was taken seriously
    driver.start()
    ring = driver.rings[0]
    memory.write(0x8_0000, struct.pack("<IIQ", v.BLK_T_IN, 0, 0))
    ring.offer(ring.chain([(0x8_0000, 16)], [(0x9_0000, 512), (0x9_1000, 1)]))
    driver.kick()
    assert ring.done() == [(0, 513)] and not driver.broken
    disk.close()
    assert image.stat().st_size == DISK
    if kind == "readonly":
        assert image.read_bytes() == b"d" * DISK
    elif kind == "blk":
        assert memory.read(0x9_0000, 512) == image.read_bytes()[:512]
        assert image.read_bytes() != b"d" * DISK
