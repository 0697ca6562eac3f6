"""The block device and its disks: requests, limits, failures."""

import errno
import os
import struct
import subprocess
import sys

import pytest
from virtio_driver import Driver

from vmexit.abi import virtio as v
from vmexit.backends.disk import Disk
from vmexit.core.errors import ConfigError
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.blk import Blk
from vmexit.machine.drive import Drive

SECTORS = 64
HEADER, DATA, STATUS = 0x8_0000, 0x8_1000, 0x8_F000


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 1 << 20)])
    yield memory
    memory.close()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"".join(struct.pack("<Q", n) * 64 for n in range(SECTORS)))
    return path


@pytest.fixture
def driver(memory, image):
    disk = Disk(str(image))
    driver = Driver(Blk(disk, "serial number 1"), memory)
    driver.start()
    yield driver
    disk.close()


def request(driver, kind: int, sector: int, out=(), into=()) -> int:
    """A request of one header, data to read and to write; its status."""
    driver.memory.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
    driver.memory.write_u8(STATUS, 0xFF)
    ring = driver.rings[0]
    ring.offer(ring.chain([(HEADER, 16), *out], [*into, (STATUS, 1)]))
    driver.kick()
    size = sum(size for _, size in into) + 1
    assert ring.done() == [(0, size)] and not driver.broken
    return driver.memory.read_u8(STATUS)


def test_the_configuration_describes_the_disk(driver, image):
    config = b"".join(
        driver.registers.read(0x100 + at, 4).to_bytes(4, "little") for at in range(0, 60, 4)
    )
    capacity, _, seg_max, block = struct.unpack_from("<QII4xI", config)
    assert (capacity, seg_max, block) == (SECTORS, 254, 512)
    physical, _, least = struct.unpack_from("<BBH", config, 24)
    assert 512 << physical == least * 512 == os.stat(image).st_blksize
    assert struct.unpack_from("<H", config, 34) == (1,)
    bits = [v.BLK_F_SEG_MAX, v.BLK_F_BLK_SIZE, v.BLK_F_FLUSH, v.BLK_F_DISCARD]
    assert all(driver.features() >> bit & 1 for bit in bits)
    assert not driver.features() >> v.BLK_F_RO & 1


def test_reads_and_writes_in_several_parts(driver, image, memory):
    into = [(DATA, 512), (DATA + 0x1000, 1024)]
    assert request(driver, v.BLK_T_IN, 5, into=into) == v.BLK_S_OK
    assert memory.read(DATA, 512) == struct.pack("<Q", 5) * 64
    assert memory.read(DATA + 0x1000 + 512, 512) == struct.pack("<Q", 7) * 64
    memory.write(DATA, b"a" * 700 + b"b" * 324)
    out = [(DATA, 700), (DATA + 700, 324)]
    assert request(driver, v.BLK_T_OUT, 10, out=out) == v.BLK_S_OK
    assert request(driver, v.BLK_T_FLUSH, 0) == v.BLK_S_OK
    disk = image.read_bytes()
    assert disk[5120:6144] == b"a" * 700 + b"b" * 324
    assert disk[:5120] + disk[6144:] == b"".join(
        struct.pack("<Q", n) * 64 for n in range(SECTORS) if n not in (10, 11)
    )


def test_a_header_may_be_split_and_the_status_share_a_part(driver, memory):
    memory.write(HEADER, struct.pack("<IIQ", v.BLK_T_IN, 0, 3))
    ring = driver.rings[0]
    ring.offer(ring.chain([(HEADER, 5), (HEADER + 5, 11)], [(DATA, 200), (DATA + 200, 313)]))
    driver.kick()
    assert ring.done() == [(0, 513)]
    assert memory.read(DATA, 513) == struct.pack("<Q", 3) * 64 + b"\0"


def test_a_request_that_names_the_same_memory_again_and_again_has_a_limit(memory, tmp_path):
    """As much as 256 MiB are a request; this one is larger, though not than its disk."""
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1 << 30)
    disk = Disk(str(big))
    driver = Driver(Blk(disk), memory)
    driver.start()
    memory.write(HEADER, struct.pack("<IIQ", v.BLK_T_IN, 0, 0))
    ring, table = driver.rings[0], 0x7_0000
    direct, ring.desc = ring.desc, table
    parts = 700
    ring.chain([(HEADER, 16)], [(0x8_1000, 0x7_0000)] * parts + [(STATUS - 0x8000, 1)])
    ring.desc = direct
    ring.describe(0, table, 16 * (parts + 2), v.DESC_F_INDIRECT)
    ring.offer(0)
    driver.kick()
    assert ring.done() == [(0, parts * 0x7_0000 + 1)]
    assert memory.read_u8(STATUS - 0x8000) == v.BLK_S_IOERR
    disk.close()


def test_a_request_of_more_bytes_than_a_length_can_say(image):
    memory, table, part = GuestMemory([(0, 128 << 20)]), 0x7_0000, 120 << 20
    disk = Disk(str(image))
    driver = Driver(Blk(disk), memory)
    driver.start()
    memory.write(HEADER, struct.pack("<IIQ", v.BLK_T_IN, 0, 0))
    ring = driver.rings[0]
    direct, ring.desc = ring.desc, table
    ring.chain([(HEADER, 16)], [(0x10_0000, part)] * 40)
    ring.desc = direct
    ring.describe(0, table, 16 * 41, v.DESC_F_INDIRECT)
    ring.offer(0)
    driver.kick()
    assert ring.done() == [(0, 0xFFFF_FFFF)]
    assert memory.read_u8(0x10_0000 + part - 1) == v.BLK_S_IOERR
    disk.close()
    memory.close()


def test_the_serial_number(driver, memory):
    assert request(driver, v.BLK_T_GET_ID, 0, into=[(DATA, 20)]) == v.BLK_S_OK
    assert memory.read(DATA, 20) == b"serial number 1\0\0\0\0\0"
    assert request(driver, v.BLK_T_GET_ID, 0, into=[(DATA, 19)]) == v.BLK_S_IOERR


@pytest.mark.parametrize(
    ("kind", "sector", "size"),
    [
        (v.BLK_T_IN, SECTORS, 512),
        (v.BLK_T_IN, SECTORS - 1, 1024),
        (v.BLK_T_IN, (1 << 64) - 1, 512),
        (v.BLK_T_IN, 0, 511),
        (v.BLK_T_OUT, SECTORS, 512),
        (v.BLK_T_OUT, (1 << 55) - 1, 512),
        (v.BLK_T_OUT, 0, 1),
    ],
)
def test_what_is_not_on_the_disk_is_an_error(driver, image, memory, kind, sector, size):
    before = image.read_bytes()
    memory.write(DATA, b"x" * 1024)
    parts = {"into" if kind == v.BLK_T_IN else "out": [(DATA, size)]}
    assert request(driver, kind, sector, **parts) == v.BLK_S_IOERR
    assert image.read_bytes() == before and memory.read(DATA, 1024) == b"x" * 1024


def test_an_unknown_request_is_unsupported(driver):
    assert request(driver, 3, 0, into=[(DATA, 512)]) == v.BLK_S_UNSUPP


def clear(driver, kind: int, sector: int, count: int, flags: int = 0) -> int:
    driver.memory.write(DATA, struct.pack("<QII", sector, count, flags))
    return request(driver, kind, 0, out=[(DATA, 16)])


@pytest.mark.parametrize(
    ("kind", "flags"), [(v.BLK_T_DISCARD, 0), (v.BLK_T_WRITE_ZEROES, 0), (v.BLK_T_WRITE_ZEROES, 1)]
)
def test_ranges_are_discarded_and_zeroed(driver, image, kind, flags):
    before = image.read_bytes()
    assert clear(driver, kind, 8, 16, flags) == v.BLK_S_OK
    assert image.read_bytes() == before[: 8 * 512] + bytes(16 * 512) + before[24 * 512 :]


@pytest.mark.parametrize("mode", ["punch", "zero"])
def test_zeros_are_written_where_the_file_system_cannot_do_it(driver, image, monkeypatch, mode):
    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr("vmexit.core.holes.fallocate", refuse)
    before = image.read_bytes()
    assert clear(driver, v.BLK_T_WRITE_ZEROES, 1, 2, int(mode == "punch")) == v.BLK_S_OK
    assert image.read_bytes() == before[:512] + bytes(1024) + before[1536:]
    assert clear(driver, v.BLK_T_DISCARD, 1, 2) == v.BLK_S_OK  # which is only advice


@pytest.mark.parametrize(
    ("kind", "sector", "count", "flags", "status"),
    [
        (v.BLK_T_DISCARD, 0, SECTORS + 1, 0, v.BLK_S_IOERR),
        (v.BLK_T_WRITE_ZEROES, (1 << 64) - 1, 2, 0, v.BLK_S_IOERR),
        (v.BLK_T_WRITE_ZEROES, 0, 0xFFFF_FFFF, 0, v.BLK_S_IOERR),
        (v.BLK_T_DISCARD, 0, 1, 1, v.BLK_S_UNSUPP),
        (v.BLK_T_WRITE_ZEROES, 0, 1, 2, v.BLK_S_UNSUPP),
    ],
)
def test_ranges_that_cannot_be(driver, image, kind, sector, count, flags, status):
    before = image.read_bytes()
    assert clear(driver, kind, sector, count, flags) == status
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("out", "into"), [([(HEADER, 15)], [(STATUS, 1)]), ([], [(STATUS, 1)]), ([(HEADER, 16)], [])]
)
def test_a_request_without_header_or_status_breaks_the_device(driver, out, into):
    ring = driver.rings[0]
    ring.offer(ring.chain(out, into))
    driver.kick()
    assert driver.broken
    driver.start()
    assert request(driver, v.BLK_T_IN, 0, into=[(DATA, 512)]) == v.BLK_S_OK


def test_a_disk_that_is_only_read(memory, image):
    before = image.read_bytes()
    disk = Disk(str(image), readonly=True)
    driver = Driver(Blk(disk), memory)
    driver.start()
    assert driver.features() >> v.BLK_F_RO & 1 and not driver.features() >> v.BLK_F_DISCARD & 1
    assert request(driver, v.BLK_T_OUT, 0, out=[(DATA, 512)]) == v.BLK_S_IOERR
    assert clear(driver, v.BLK_T_WRITE_ZEROES, 0, 1) == v.BLK_S_IOERR
    assert request(driver, v.BLK_T_FLUSH, 0) == v.BLK_S_OK
    assert request(driver, v.BLK_T_IN, 63, into=[(DATA, 512)]) == v.BLK_S_OK
    disk.close()
    assert image.read_bytes() == before


def test_a_disk_that_shrinks_or_is_full_gives_errors(driver, image):
    os.truncate(image, 10 * 512)
    assert request(driver, v.BLK_T_IN, 9, into=[(DATA, 1024)]) == v.BLK_S_IOERR
    assert request(driver, v.BLK_T_IN, 9, into=[(DATA, 512)]) == v.BLK_S_OK


def test_a_full_file_system_gives_errors(memory):
    """/dev/full in place of the file: each write fails with ENOSPC."""
    with open("/dev/full", "r+b", buffering=0) as full:
        disk = Disk.__new__(Disk)
        disk.readonly, disk.size, disk.block_size, disk._fd = False, 1 << 20, 512, full.fileno()
        driver = Driver(Blk(disk), memory)
        driver.start()
        assert request(driver, v.BLK_T_OUT, 0, out=[(DATA, 512)]) == v.BLK_S_IOERR


def test_more_parts_than_one_system_call_takes(image):
    disk = Disk(str(image))
    data = bytearray(SECTORS * 512)
    view = memoryview(data)
    disk.read_into([view[i : i + 7] for i in range(0, len(data), 7)], 0)
    assert bytes(data) == image.read_bytes()
    disk.write_from([view[i : i + 13] for i in range(0, len(data) - 512, 13)], 512)
    assert image.read_bytes()[512 : 512 + 512] == bytes(data[:512])
    disk.close()


def test_a_disk_in_use_is_refused(image):
    hold = "import sys; from vmexit.backends.disk import Disk; d = Disk(sys.argv[1], readonly=len(sys.argv) > 2); print(1, flush=True); sys.stdin.read()"  # noqa: E501
    for more in ([], ["ro"]):
        with subprocess.Popen(
            [sys.executable, "-c", hold, str(image), *more],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as other:  # fmt: skip
            assert other.stdout.readline() == b"1\n"
            with pytest.raises(ConfigError, match=r"is in use, by another machine"):
                Disk(str(image))
            if more:
                Disk(str(image), readonly=True).close()
            other.stdin.close()
    Disk(str(image)).close()


def test_what_is_no_disk_is_refused_with_the_remedy(tmp_path):
    for name, data, message in (
        ("odd", b"x" * 513, "no whole sectors; use truncate -s %512"),
        ("empty", b"", "has no bytes"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            Disk(str(tmp_path / name))
    (tmp_path / "qcow2").write_bytes(b"QFI\xfb".ljust(512, b"\0"))
    Disk(str(tmp_path / "qcow2"), probe=False).close()
    for path, message in (
        (str(tmp_path / "none"), "No such file or directory; make one: truncate"),
        (str(tmp_path), "Is a directory|neither a file"),
        (str(tmp_path / "qcow2"), "looks like a qcow2 image; say format=qcow2, or format=raw"),
        ("/dev/null", "is neither a file nor a block device"),
        ("a\0b", "NUL"),
    ):
        with pytest.raises(ConfigError, match=message):
            Disk(path)


@pytest.mark.parametrize(
    ("text", "drive"),
    [
        ("file=a", Drive("a")),
        ("file=a,readonly=on", Drive("a", True)),
        ("file=a,format=raw", Drive("a", format="raw")),
        ("file=a.qcow2", Drive("a.qcow2", format="qcow2")),
        ("file=a.VDI,readonly=on", Drive("a.VDI", True, format="vdi")),
        ("file=a.qcow2,format=raw", Drive("a.qcow2", format="raw")),
        ("file=a,format=vpc", Drive("a", format="vpc")),
        ("vhost-user:/tmp/a=b,,c", Drive("", socket="/tmp/a=b,c")),
        ("vhost-user:/tmp/a,reconnect=5", Drive("", socket="/tmp/a", reconnect=5)),
        ("readonly=off,serial=s 1,file=a,,b=c", Drive("a,b=c", False, "s 1")),
    ],
)
def test_drives(text, drive):
    assert Drive.parse(text) == drive


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "file=",
        "file=a,readonly",
        "file=a,cache=none",
        "file=a,readonly=yes",
        "readonly=on",
        "file=a,",
        "file=a,file=a",
        "file=a,serial=\udcff",
        "file=a,format=qcow3",
        "file=a.qcow2,serial=1",
        "vhost-user:",
        "vhost-user:a,readonly=on",
        "vhost-user:a,reconnect=-1",
    ],
)
def test_what_is_no_drive(text):
    with pytest.raises(
        ConfigError,
        match=r"use |neither on nor off|leave (one|it) out|a file is file=PATH|did you mean",
    ):
        Drive.parse(text)
