"""Which pages were written: the set, the bitmap, and memory that goes back by them."""

import ctypes
import itertools
import random
import struct
import sys
import threading
from contextlib import closing

import pytest
from virtio_driver import Driver

from vmexit.abi import virtio as v
from vmexit.backends.disk import Disk
from vmexit.core.errors import ConfigError
from vmexit.core.memory import PAGE_SIZE, GuestMemory, Region
from vmexit.core.written import WrittenPages, runs
from vmexit.devices.virtio.blk import Blk
from vmexit.machine.rewind import Rewind

SIZE = 1 << 20
HEADER, DATA, STATUS = 0x8_0000, 0x8_1000, 0x8_F000


def bits(bitmap: bytes) -> set[int]:
    return {n for n in range(len(bitmap) * 8) if bitmap[n // 8] >> n % 8 & 1}


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 1])
def test_runs_are_the_bits_that_are_set(share):
    chance = random.Random(share)
    for words in (1, 2, 40):
        value = sum((chance.random() <= share) << n for n in range(words * 64))
        bitmap = value.to_bytes(words * 8, "little")
        found = list(runs(bitmap))
        assert [n for first, end in found for n in range(first, end)] == sorted(bits(bitmap))
        for (_, end), (first, _) in itertools.pairwise(found):
            assert end < first, "two runs that are one"


def test_no_bits_no_runs():
    assert list(runs(bytes(4096))) == []


def test_parts_of_pages_are_pages():
    pages = WrittenPages()
    pages.add(0x1FFF, 2)
    pages.add(0x5000, 0x1000)
    pages.add(0x9000, 0)
    bitmap = bytearray(8)
    pages.mark(bitmap, 0, 64)
    assert bits(bitmap) == {1, 2, 5}
    later = bytearray(8)
    pages.mark(later, 0x2000, 3)  # the last of them is that at 0x4000
    assert bits(later) == {0}


@pytest.mark.parametrize("size", [WrittenPages.MOST * PAGE_SIZE + 1, 1 << 60])
def test_too_many_pages_are_not_counted(size):
    pages = WrittenPages()
    pages.add(0, size)
    assert pages.too_many
    assert pages.take().too_many
    for number in range(WrittenPages.MOST):
        pages.add(number * 2 * PAGE_SIZE, 1)
    assert not pages.too_many
    pages.add(PAGE_SIZE, 1)
    assert pages.too_many


def test_another_thread_may_add_meanwhile():
    pages, done = WrittenPages(), threading.Event()

    def add():
        for number in itertools.cycle(range(3000)):
            pages.add(number * PAGE_SIZE, 1)
            if number == 2999:
                pages.take()
                if done.is_set():
                    return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    adding = threading.Thread(target=add)
    adding.start()
    try:
        for _ in range(300):
            pages.mark(bytearray(3000 // 8 + 8), 0, 3000)
    finally:
        sys.setswitchinterval(interval)
        done.set()
        adding.join()


class Guest:
    """A guest's log, and what the guest writes."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._pages: set[int] = set()
        self._told: set[int] = set()
        self.read = self.forgotten = 0
        self.meanwhile = lambda: None

    def write(self, gpa: int, data: bytes) -> None:
        """As the guest: no one but the log is told."""
        self._memory.region(gpa).part(gpa, len(data))[:] = data
        self._pages |= set(range(gpa >> 12, (gpa + len(data) - 1 >> 12) + 1))

    def start_dirty_log(self) -> None:
        self._pages.clear()

    def written(self, region: Region) -> bytearray:
        self.read += 1
        self.meanwhile()
        bitmap = bytearray(-(-region.size // PAGE_SIZE // 64) * 8)
        for page in self._pages:
            bitmap[page // 8] |= 1 << page % 8
        self._told = set(self._pages)
        return bitmap

    def forget_written(self, region: Region) -> None:
        self.forgotten += 1
        self._pages -= self._told


@pytest.fixture
def memory():
    memory = GuestMemory([(0, SIZE)])
    yield memory
    memory.close()


@pytest.fixture
def guest(memory):
    return Guest(memory)


@pytest.fixture
def rewind(memory, guest):
    """It copies from now on."""
    memory.write(0, random.Random(1).randbytes(SIZE // 2))
    rewind = Rewind(memory, guest)
    with_image = memory.capture()
    rewind.image = with_image
    rewind.to(with_image)
    rewind.to(with_image)
    yield rewind
    with_image.close()


def test_what_anybody_wrote_is_as_it_was(memory, guest, rewind):
    chance, before = random.Random(2), memory.read(0, SIZE)
    held = memory[0x3000:0x3010]
    mapped = memory.mapped
    for _ in range(50):
        guest.write(chance.randrange(SIZE - 9000), chance.randbytes(chance.randrange(1, 9000)))
        memory.write(chance.randrange(SIZE - 10), chance.randbytes(10))
        memory.write_u8(chance.randrange(SIZE), 0xAA)
        memory.view(chance.randrange(SIZE - 4), 4)[:] = b"view"
        memory.discard(chance.randrange(SIZE), 0x5000)
        held[:] = chance.randbytes(16)
        rewind.to(rewind.image)
        assert memory.read(0, SIZE) == before
    assert memory.mapped == mapped, "it has mapped the image anew"


def test_another_image_and_the_first_again(memory, guest, rewind):
    first = memory.read(0, SIZE)
    guest.write(0x4000, b"second")
    with closing(memory.capture()) as image:
        second = memory.read(0, SIZE)
        for _ in range(3):
            guest.write(0x8000, b"third")
            rewind.to(rewind.image)
            assert memory.read(0, SIZE) == first
            guest.write(0x9000, b"third")
            rewind.to(image)
            assert memory.read(0, SIZE) == second
            guest.write(0xA000, b"third")
            rewind.to(image)
            assert memory.read(0, SIZE) == second


def test_a_view_of_everything_is_no_reason_to_copy_everything(guest):
    with closing(GuestMemory([(0, (WrittenPages.MOST + 1) * PAGE_SIZE)])) as memory:
        guest = Guest(memory)
        rewind = Rewind(memory, guest)
        view = memory[0 : (WrittenPages.MOST + 1) * PAGE_SIZE]
        with closing(memory.capture()) as image:
            for _ in range(4):
                view[0x5000] = 5
                mapped = memory.mapped
                rewind.to(image)
                assert memory.mapped == mapped + 1
                assert view[0x5000] == 0
        view.release()


def test_what_another_thread_writes_meanwhile_goes_back_the_next_time(memory, guest, rewind):
    before = memory.read(0, SIZE)
    guest.meanwhile = lambda: memory.write(0x7000, b"another thread")
    rewind.to(rewind.image)
    guest.meanwhile = lambda: None
    rewind.to(rewind.image)
    assert memory.read(0, SIZE) == before


def test_what_is_written_by_its_host_address_goes_back_too(memory, rewind):
    before = memory.read(0, SIZE)
    address = memory.hva(0x6000)
    for _ in range(3):
        ctypes.memmove(address, b"by address", 10)
        rewind.to(rewind.image)
        assert memory.read(0, SIZE) == before


def test_copies_of_ever_more_pages_are_given_back():
    """Each page that was copied back is one of the machine's own until all is mapped anew."""
    size = 256 << 20
    with closing(GuestMemory([(0, size)])) as memory:
        guest = Guest(memory)
        rewind, (region,) = Rewind(memory, guest), memory.regions
        with closing(memory.capture()) as image:
            for at in range(0, size, 4 << 20):
                guest.write(at, b"x" * (4 << 20))
                rewind.to(image)
                used = sum(end - first for first, end in memory.in_use(region))
                assert used <= (4096 + 4 * 1024) * PAGE_SIZE
            counts = []
            for _ in range(20):  # the same again are no more
                guest.write(0, b"x" * (4 << 20))
                rewind.to(image)
                counts.append(memory.mapped)
            assert counts[1] == counts[-1]
            assert memory.read(0, 8) == bytes(8)


def test_the_log_keeps_what_is_written_again_and_again(memory, guest, rewind):
    before = memory.read(0, SIZE)

    def cycle(pages):
        for page in pages:
            guest.write(page * PAGE_SIZE, b"guest")
        rewind.to(rewind.image)
        assert memory.read(0, SIZE) == before

    cycle(range(3))
    forgotten = guest.forgotten
    for _ in range(10):
        cycle(range(3))
    assert guest.forgotten == forgotten
    cycle(range(100, 200))  # far more than at first
    assert guest.forgotten == forgotten + 1
    for _ in range(200):  # in the end it is known that these are not written any more
        cycle(range(3))
    assert guest.written(memory.regions[0])[12:] == bytes(20)


def test_the_log_belongs_to_somebody_else(memory, guest, rewind):
    before, read = memory.read(0, SIZE), guest.read
    rewind.leave_log()
    guest.write(0x4000, b"x")
    rewind.to(rewind.image)
    assert memory.read(0, SIZE) == before
    assert guest.read == read


def test_what_a_device_wrote_goes_back_too(memory, rewind, tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"\x5a" * 65536)
    disk = Disk(str(path))
    driver = Driver(Blk(disk, "serial"), memory)
    driver.start()
    image = memory.capture()
    try:
        for _ in range(3):
            rewind.to(image)
        before, mapped = memory.read(0, SIZE), memory.mapped
        ring = driver.rings[0]
        index = ring.index
        for _ in range(5):
            driver.memory.write(HEADER, struct.pack("<IIQ", v.BLK_T_IN, 0, 0))
            ring.offer(ring.chain([(HEADER, 16)], [(DATA, 8192), (STATUS, 1)]))
            driver.kick()
            assert ring.done() and memory.read(DATA, 8192) == b"\x5a" * 8192
            ring.index = ring.seen = index
            rewind.to(image)
            driver.registers.reset()
            assert memory.read(0, SIZE) == before
            driver.start()
            rewind.to(image)
        assert memory.mapped == mapped
    finally:
        image.close()
        disk.close()


class TestMemoryMadeFromAnImage:
    """What a clone has."""

    @pytest.fixture
    def image(self, memory):
        memory.write(0x3000, b"image")
        image = memory.capture()
        yield image
        image.close()

    @pytest.fixture
    def made(self, image):
        made = GuestMemory([(0, SIZE)], image)
        yield made
        made.close()

    def test_it_holds_that_and_is_its_own(self, memory, image, made):
        assert made.read(0, SIZE) == memory.read(0, SIZE)
        made.write(0x3000, b"other")
        assert memory.read(0x3000, 5) == image.view[0x3000:0x3005] == b"image"

    def test_it_is_not_mapped_once_more(self, image, made):
        rewind = Rewind(made, Guest(made), image)
        rewind.to(image)
        assert made.mapped == 0
        made.write(0x3000, b"other")
        rewind.to(image)
        assert made.mapped == 1
        assert made.read(0x3000, 5) == b"image"

    @pytest.mark.parametrize("how", ["write", "view"])
    def test_unless_somebody_has_written_to_it(self, image, made, how):
        rewind = Rewind(made, Guest(made), image)
        if how == "write":
            made.write(0x3000, b"other")
        else:
            made.view(0x3000, 5)[:] = b"other"
        rewind.to(image)
        assert made.read(0x3000, 5) == b"image"

    def test_another_image_is(self, memory, image, made):
        memory.write(0x3000, b"later")
        with closing(memory.capture()) as other:
            Rewind(made, Guest(made), image).to(other)
            assert made.read(0x3000, 5) == b"later"

    def test_one_of_another_layout_is_refused(self, image):
        with pytest.raises(ConfigError, match="laid out otherwise"):
            GuestMemory([(0, 2 * SIZE)], image)
