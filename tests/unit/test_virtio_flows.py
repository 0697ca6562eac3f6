"""What devices count of their operations and bytes, and how long limits hold requests back."""

import struct

import pytest
from fakes import ManualClock
from test_virtio_blk import DATA, request
from test_virtio_net import Wire, frame, make, offer_buffers, send
from virtio_driver import Driver

from vmexit.abi import virtio as v
from vmexit.backends.disk import Disk
from vmexit.core.memory import GuestMemory
from vmexit.core.rate import Limit
from vmexit.devices.virtio.blk import Blk, DiskFlows
from vmexit.devices.virtio.queue import Chain
from vmexit.devices.virtio.rng import Rng

SECOND = 1_000_000_000


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 1 << 20)])
    yield memory
    memory.close()


def flows(driver: Driver) -> dict[str, tuple[int, int]]:
    """Operations and bytes, of those that there were any of."""
    counted = driver.registers.flows
    return {flow.name: (flow.operations, flow.size) for flow in counted if flow.operations}


def make_disk(memory, tmp_path, clock=None, limit=None) -> Driver:
    path = tmp_path / "disk"
    path.write_bytes(bytes(64 * 512))
    driver = Driver(Blk(Disk(str(path)), limit=limit), memory, clock)
    driver.start()
    return driver


def test_a_disk_counts_what_was_done_and_not_what_failed(memory, tmp_path):
    driver = make_disk(memory, tmp_path)
    for size in (512, 4096):
        assert request(driver, v.BLK_T_IN, 0, into=[(DATA, size)]) == v.BLK_S_OK
    assert request(driver, v.BLK_T_OUT, 1, out=[(DATA, 1024)]) == v.BLK_S_OK
    assert request(driver, v.BLK_T_FLUSH, 0) == v.BLK_S_OK
    memory.write(DATA, struct.pack("<QII", 0, 8, 0))
    assert request(driver, v.BLK_T_DISCARD, 0, out=[(DATA, 16)]) == v.BLK_S_OK
    assert request(driver, v.BLK_T_WRITE_ZEROES, 0, out=[(DATA, 16)]) == v.BLK_S_OK
    expected = {
        "read": (2, 4608), "write": (1, 1024), "flush": (1, 0), "discard": (1, 4096),
        "write_zeroes": (1, 4096),
    }  # fmt: skip
    assert flows(driver) == expected
    assert request(driver, v.BLK_T_IN, 64, into=[(DATA, 512)]) == v.BLK_S_IOERR
    assert request(driver, v.BLK_T_OUT, 64, out=[(DATA, 512)]) == v.BLK_S_IOERR
    assert request(driver, v.BLK_T_GET_ID, 0, into=[(DATA, 20)]) == v.BLK_S_OK
    assert request(driver, 77, 0) == v.BLK_S_UNSUPP
    driver.registers.reset()
    assert flows(driver) == expected
    driver.device._disk.close()


@pytest.mark.parametrize(
    ("kind", "out", "into", "expected"),
    [
        (v.BLK_T_IN, b"", 512, {"read": (1, 512)}),
        (v.BLK_T_OUT, bytes(1024), 0, {"write": (1, 1024)}),
        (v.BLK_T_FLUSH, b"", 0, {"flush": (1, 0)}),
        (v.BLK_T_DISCARD, struct.pack("<QII", 0, 8, 0), 0, {"discard": (1, 4096)}),
        (v.BLK_T_DISCARD, b"short", 0, {"discard": (1, 0)}),
        (v.BLK_T_GET_ID, b"", 20, {}),
        (None, b"", 0, {}),
    ],
)
def test_a_disk_of_another_program_counts_by_what_is_asked(kind, out, into, expected):
    data = b"?" if kind is None else struct.pack("<IIQ", kind, 0, 0) + out
    disk = DiskFlows()
    disk.count_request(Chain(0, [memoryview(data)], [], [(0, len(data))], [(0x1000, into + 1)]))
    assert {f.name: (f.operations, f.size) for f in disk.all if f.operations} == expected


@pytest.mark.parametrize("offloads", [False, True])
def test_a_network_counts_frames_without_virtios_header(memory, offloads):
    wire = Wire(offloads)
    driver = make(memory, wire)
    send(driver, frame(1), frame(2, 1514), bytes(5))  # the last one is too short
    offer_buffers(driver, 2, 2048)
    header = bytes(12) if offloads else b""
    wire.arrive(*(header + frame(n, 100) for n in range(3)))  # one more than there is room for
    assert flows(driver) == {"transmit": (2, 1574), "receive": (2, 200)}


def test_other_devices_count_the_bytes_of_their_queues(memory):
    driver = Driver(Rng(), memory)
    driver.start()
    ring = driver.rings[0]
    for number in range(3):
        ring.offer(ring.chain([], [(0x8_0000, 100)], first=number))
        driver.kick()
    assert flows(driver) == {"to_guest": (3, 300)}
    ring.offer(ring.chain([(0x8_0000, 7)], [(0x8_1000, 100)], first=3))
    driver.kick()
    assert flows(driver) == {"to_guest": (4, 400), "from_guest": (1, 7)}
    assert driver.registers.waited_ns is None


def ask(driver: Driver, first: int) -> None:
    """Read a sector, without waiting for it."""
    driver.memory.write(0x8_0000, struct.pack("<IIQ", v.BLK_T_IN, 0, 0))
    ring = driver.rings[0]
    ring.offer(ring.chain([(0x8_0000, 16)], [(DATA, 512), (0x8_F000, 1)], first=first))
    driver.kick()


def test_time_that_requests_wait_counts_once(memory, tmp_path):
    clock = ManualClock()
    driver = make_disk(memory, tmp_path, clock, Limit(clock, 2))
    ask(driver, 0)
    ask(driver, 3)
    assert driver.registers.waited_ns == 0  # none has to wait yet
    clock.advance(SECOND // 4)
    ask(driver, 6)
    assert driver.registers.waited_ns == SECOND // 4
    driver.kick()
    ask(driver, 9)  # waits with it
    assert driver.registers.waited_ns == SECOND // 4
    clock.advance(2 * SECOND)
    assert len(driver.rings[0].done()) == 4
    assert driver.registers.waited_ns == SECOND // 4 + SECOND // 2
    driver.device._disk.close()


def test_a_limit_without_requests_makes_nobody_wait(memory, tmp_path):
    clock = ManualClock()
    driver = make_disk(memory, tmp_path, clock, Limit(clock, 1))
    ask(driver, 0)
    driver.kick()
    clock.advance(SECOND // 2)
    driver.kick()
    assert driver.registers.waited_ns == 0
    driver.device._disk.close()
