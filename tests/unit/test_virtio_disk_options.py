"""Disks past the page cache, with several queues, and with limits."""

import mmap
import os
import random
import struct

import pytest
from fakes import ManualClock
from hypothesis import given, settings
from hypothesis import strategies as st
from test_virtio_blk import DATA, HEADER, STATUS
from virtio_driver import Driver

from vmexit.abi import virtio as v
from vmexit.backends.direct import DirectDisk
from vmexit.backends.disk import Disk
from vmexit.core.errors import ConfigError
from vmexit.core.memory import GuestMemory
from vmexit.core.rate import Limit
from vmexit.devices.virtio.blk import Blk
from vmexit.machine.drive import Drive

SECOND = 1_000_000_000
SIZE = 3 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    return path


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 4 << 20)])
    yield memory
    memory.close()


def direct(path) -> DirectDisk:
    try:
        return DirectDisk(str(path))
    except ConfigError as error:
        pytest.skip(f"{error}; set TMPDIR")


# Direct I/O.


@pytest.fixture(scope="module", params=["the host's", 4096])
def aligned_disk(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("direct") / "disk"
    path.write_bytes(bytes(SIZE))
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(request.param, int):
            patch.setattr("vmexit.backends.direct._ALIGNMENTS", (request.param,))
        disk = direct(path)
    yield disk, path
    disk.close()


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, SIZE // 512 - 1),
            st.sampled_from((512, 1024, 4096, 8192, 65536, 1 << 20, (1 << 20) + 512)),
            st.sampled_from((0, 1, 2, 512, 4096 - 512)),
            st.lists(st.sampled_from((3, 511, 512, 1024, 4096, 5000)), max_size=3),
        ),
        max_size=8,
    )
)
@settings(deadline=None, max_examples=40)
def test_buffers_of_any_alignment(aligned_disk, operations):
    disk, path = aligned_disk
    model = bytearray(path.read_bytes())
    pages = memoryview(mmap.mmap(-1, 2 << 20))
    for number, (writes, sector, size, address, cuts) in enumerate(operations):
        start = sector * 512
        size = min(size, SIZE - start)
        buffer = pages[address : address + size]
        ends = sorted({cut for cut in cuts if cut < size} | {0, size})
        views = [buffer[a:b] for a, b in zip(ends, ends[1:], strict=False)]  # noqa: RUF007
        if writes:
            buffer[:] = random.Random(number).randbytes(size)
            disk.write_from(views, start)
            model[start : start + size] = buffer
        else:
            disk.read_into(views, start)
            assert buffer == model[start : start + size]
    disk.flush()
    assert path.read_bytes() == model


def test_zeros_and_a_file_that_ends_early(image, monkeypatch):
    disk, model = direct(image), bytearray(image.read_bytes())
    disk.write_zeroes(512, 5000 * 512, unmap=False)
    model[512 : 5001 * 512] = bytes(5000 * 512)
    assert image.read_bytes() == model

    def refuse(*arguments):
        raise OSError(95, "not here")

    monkeypatch.setattr("vmexit.core.holes.fallocate", refuse)
    disk.write_zeroes(5005 * 512, 3 * 512, unmap=True)
    model[5005 * 512 : 5008 * 512] = bytes(3 * 512)
    assert image.read_bytes() == model
    os.truncate(image, 1 << 20)
    for views in ([memoryview(mmap.mmap(-1, 8192))], [memoryview(bytearray(513))]):
        with pytest.raises(OSError, match="ends early"):
            disk.read_into(views, (1 << 20) - 4096 + 4096 * (len(views[0]) == 513))
    disk.close()


def test_what_is_written_passes_the_page_cache_by(image):
    """`/proc/self/fdinfo` shows the flag."""
    disk = direct(image)
    with open(f"/proc/self/fdinfo/{disk._fd}") as file:
        flags = int(file.read().split("flags:")[1].split()[0], 8)
    assert flags & os.O_DIRECT
    assert disk.block_size >= 512
    disk.close()


def test_a_size_that_is_no_whole_number_of_blocks(image, monkeypatch):
    monkeypatch.setattr("vmexit.backends.direct._ALIGNMENTS", (4096,))
    direct(image).close()
    os.truncate(image, SIZE - 512)
    with pytest.raises(ConfigError, match=r"whole blocks of 4096 here; use truncate -s %4096"):
        DirectDisk(str(image))
    Disk(str(image)).close()  # no lock is left


def test_a_file_system_without_direct_io():
    """sysfs has a file of some size. Its size is no disk's, so that is not looked at."""
    path = "/sys/kernel/btf/vmlinux"
    if not os.path.exists(path):
        pytest.skip("no large file in sysfs")
    disk = DirectDisk.__new__(DirectDisk)
    disk._fd = os.open(path, os.O_RDONLY)
    with pytest.raises(ConfigError, match=r"has no direct I/O \(.*\); leave out direct=on"):
        disk._go_direct(path)
    os.close(disk._fd)


# Queues.


def ask(driver: Driver, number: int, kind: int, sector: int, size: int) -> None:
    """Offer a request in queue `number`, with data at DATA."""
    driver.memory.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
    ring = driver.rings[number]
    data = [(DATA, size)] if size else []
    out, into = (data, []) if kind == v.BLK_T_OUT else ([], data)
    ring.offer(ring.chain([(HEADER, 16), *out], [*into, (STATUS, 1)]))
    driver.kick(number)


@pytest.mark.parametrize("queues", [1, 2, 16])
def test_queues(memory, image, queues):
    disk = Disk(str(image))
    driver = Driver(Blk(disk, queues=queues), memory)
    driver.start(at=0x10_0000)
    assert bool(driver.features() >> v.BLK_F_MQ & 1) == (queues > 1)
    assert driver.registers.read(0x100 + 34, 2) == queues == len(driver.rings)
    data = image.read_bytes()
    for number in range(queues):
        ask(driver, number, v.BLK_T_IN, number, 512)
        assert driver.rings[number].done() == [(0, 513)]
        assert memory.read(DATA, 512) == data[number * 512 : (number + 1) * 512]
        assert not any(ring.done() for ring in driver.rings)
    disk.close()


def test_a_driver_may_leave_queues_alone(memory, image):
    disk = Disk(str(image))
    driver = Driver(Blk(disk, queues=4), memory)
    driver.start(at=0x10_0000)
    driver.set(v.MMIO_QUEUE_SEL, 2)
    driver.set(v.MMIO_QUEUE_READY, 0)
    driver.kick(2)
    driver.kick(4)
    ask(driver, 3, v.BLK_T_IN, 0, 512)
    assert driver.rings[3].done() == [(0, 513)] and not driver.broken
    disk.close()


# Limits.


@pytest.mark.parametrize(
    ("limits", "size", "at_once"), [((5, 0), 512, 5), ((0, 4096), 1024, 4), ((4, 1 << 20), 512, 4)]
)
def test_limits_hold_for_all_queues_together(memory, image, limits, size, at_once):
    disk, clock = Disk(str(image)), ManualClock()
    driver = Driver(Blk(disk, queues=2, limit=Limit(clock, *limits)), memory, clock)
    driver.start(at=0x10_0000)
    first, second = driver.rings

    def done() -> int:
        return len(first.done()) + len(second.done())

    for number in range(at_once):
        ask(driver, number % 2, v.BLK_T_IN, 0, size)
        assert done() == 1
    ask(driver, 0, v.BLK_T_IN, 0, size)
    ask(driver, 1, v.BLK_T_IN, 0, size)
    assert done() == 0
    least = SECOND // (limits[0] or limits[1])
    clock.advance(least - 1)
    assert done() == 0
    clock.advance(2 * SECOND)
    assert done() == 2
    disk.close()


def test_a_reset_leaves_the_limit_as_it_is(memory, image):
    disk, clock = Disk(str(image)), ManualClock()
    driver = Driver(Blk(disk, limit=Limit(clock, 1)), memory, clock)
    for _ in range(2):
        driver.start(at=0x10_0000)
        ask(driver, 0, v.BLK_T_IN, 0, 512)
    assert not driver.rings[0].done()
    clock.advance(SECOND)
    assert driver.rings[0].done() == [(0, 513)]
    disk.close()


# What a user says.


@pytest.mark.parametrize(
    ("text", "drive"),
    [
        ("file=a,snapshot=on", Drive("a", snapshot=True)),
        ("file=a,overlay=b,,c", Drive("a", overlay="b,c")),
        ("file=a,direct=on,readonly=on", Drive("a", True, direct=True)),
        (
            "file=a,queues=16,iops=100,bps=2M,overlay=b,serial=s",
            Drive("a", serial="s", overlay="b", queues=16, iops=100, bps=2 << 20),
        ),
        (
            "file=a.qcow2,direct=on,queues=2",
            Drive("a.qcow2", format="qcow2", direct=True, queues=2),
        ),
    ],
)
def test_drives(text, drive):
    assert Drive.parse(text) == drive


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file=a,snapshot=on,overlay=b", "forgets what overlay= keeps; leave one out"),
        ("file=a,snapshot=on,readonly=on", "nothing to write to snapshot=on; leave one out"),
        ("file=a,overlay=b,readonly=on", "nothing to write to overlay=; leave one out"),
        ("file=a,direct=on,snapshot=on", "not possible with snapshot=on; leave one out"),
        ("file=a,direct=on,overlay=b", "not possible with overlay=; leave one out"),
        ("file=a,overlay=", "names no overlay; use overlay=PATH"),
        ("file=a,queues=0", "use a number from 1 to 16"),
        ("file=a,queues=17", "use a number from 1 to 16"),
        ("file=a,iops=-1", "use a number from 0 to"),
        ("file=a,bps=x", "is no size; use"),
        ("file=a.qcow2,snapshot=on", "qemu-img create -f qcow2 -b a.qcow2 -F qcow2"),
        ("file=a,format=vdi,overlay=b", "has no overlay=; .* qemu-img create -f qcow2 -b a -F vdi"),
    ],
)
def test_what_does_not_go_together(text, message):
    with pytest.raises(ConfigError, match=message):
        Drive.parse(text)
