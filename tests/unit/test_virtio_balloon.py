"""The memory balloon: pages that go back to the host, statistics, free pages; what is no page."""

import os
import struct

import pytest
from virtio_driver import F_ALL, Driver

from vmexit.abi import virtio as v
from vmexit.core.errors import ConfigError
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.balloon import DEFLATE, INFLATE, REPORTING, STATISTICS, Balloon

SIZE = 1 << 20
BUFFER = 0x8_0000
PAGES = 0x9_0000


@pytest.fixture
def memory():
    memory = GuestMemory([(0, SIZE)])
    memory.write(PAGES, b"x" * 0x1_0000)
    yield memory
    memory.close()


@pytest.fixture
def driver(memory):
    driver = Driver(Balloon(memory), memory)
    driver.start()
    return driver


def pages(driver: Driver, queue: int, *numbers: int) -> None:
    ring = driver.rings[queue]
    driver.memory.write(BUFFER, struct.pack(f"<{len(numbers)}I", *numbers))
    ring.offer(ring.chain([(BUFFER, 4 * len(numbers))], []))
    driver.kick(queue)
    assert ring.done() == [(0, 0)] and not driver.broken


def blocks(memory: GuestMemory) -> int:
    return os.stat(f"/proc/self/fd/{memory.fd}").st_blocks


def test_pages_that_are_taken_are_zeros_and_the_hosts(driver, memory):
    written: list[tuple[int, int]] = []
    memory.on_host_write(lambda gpa, size: written.append((gpa, size)))
    first = PAGES // 4096
    memory.write(BUFFER, b"x")
    before = blocks(memory)
    pages(driver, INFLATE, first + 1, first, first + 3)
    assert blocks(memory) == before - 3 * 4096 // 512
    assert memory.read(PAGES, 0x2000) == bytes(0x2000)
    assert memory.read(PAGES + 0x2000, 0x1000) == b"x" * 0x1000
    assert memory.read(PAGES + 0x3000, 0x1000) == bytes(0x1000)
    assert (PAGES, 0x2000) in written  # in one
    pages(driver, DEFLATE, first)
    memory.write(PAGES, b"again")


def test_pages_that_there_are_not_are_passed_over(driver, memory):
    memory.add_rom(0xFFFF_0000, b"r" * 0x1_0000)
    pages(driver, INFLATE, 0xFFFF_FFFF, SIZE // 4096, 0xFFFF_0000 >> 12, 0x10_0000)
    assert memory.read(0xFFFF_0000, 4) == b"rrrr"
    assert memory.read(PAGES, 0x1_0000) == b"x" * 0x1_0000


def test_free_pages_go_back_whole_pages_only(driver, memory):
    ring = driver.rings[REPORTING]
    ring.offer(ring.chain([], [(PAGES + 100, 0x2000), (PAGES + 0x4000, 0x1000)]))
    driver.kick(REPORTING)
    assert ring.done() == [(0, 0)]
    expected = b"x" * 0x1000 + bytes(0x1000) + b"x" * 0x2000 + bytes(0x1000)
    assert memory.read(PAGES, 0x5000) == expected


def test_without_statistics_the_free_pages_have_their_number(memory):
    driver = Driver(Balloon(memory), memory)
    driver.start(F_ALL & ~(1 << v.BALLOON_F_STATS_VQ))
    ring = driver.rings[STATISTICS]
    ring.offer(ring.chain([], [(PAGES, 0x1000)]))
    driver.kick(STATISTICS)
    assert ring.done() == [(0, 0)] and memory.read(PAGES, 0x1000) == bytes(0x1000)


def offer_statistics(driver: Driver, *values: tuple[int, int]) -> None:
    data = b"".join(struct.pack("<HQ", tag, value) for tag, value in values)
    driver.memory.write(BUFFER, data)
    ring = driver.rings[STATISTICS]
    ring.offer(ring.chain([(BUFFER, len(data))], []))
    driver.kick(STATISTICS)


def test_statistics_are_kept_until_they_are_asked_for_anew(driver):
    device, ring = driver.device, driver.rings[STATISTICS]
    device.ask_for_statistics()  # there are none yet
    offer_statistics(driver, (4, 1000), (5, 1 << 40), (99, 7))
    assert device.statistics == {"free_memory": 1000, "total_memory": 1 << 40}
    assert ring.done() == []
    # The driver is to notify of the next buffer: 2.7.10.1.
    assert driver.memory.read_u16(ring.used + 4 + 8 * ring.size) == 1
    device.ask_for_statistics()
    assert ring.done() == [(0, 0)]
    offer_statistics(driver, (4, 2000))
    assert device.statistics == {"free_memory": 2000}


def test_a_target_changes_the_configuration(driver):
    device = driver.device
    device.set_target(64 << 20)
    assert driver.get(v.MMIO_CONFIG) == (64 << 20) // 4096 and driver.lines.edges == 1
    driver.set(v.MMIO_CONFIG, 5)  # only the driver's own word can be written
    driver.set(v.MMIO_CONFIG + 4, 100)
    assert (device.target, device.actual) == (64 << 20, 100 * 4096)
    with pytest.raises(ConfigError, match="use 0 or more"):
        device.set_target(-1)
    state = driver.registers.state()
    other = Driver(Balloon(driver.memory), driver.memory)
    other.registers.restore(state)
    assert (other.device.target, other.device.actual) == (64 << 20, 100 * 4096)
    with pytest.raises(ConfigError):
        other.device.restore({"version": 1, "target": -1, "actual": 0})
    driver.start()
    assert device.actual == 0
