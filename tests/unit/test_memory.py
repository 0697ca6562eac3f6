"""Guest memory is exactly its regions: same bytes as a plain bytearray, and nothing beyond.

Every accessor is compared with a model, at and around each end of the regions.
"""

import ctypes
import gc
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.core.errors import ConfigError, GuestAddressError
from vmexit.core.memory import PAGE_SIZE, GuestMemory

pytestmark = pytest.mark.engine

# Two RAM ranges with a hole between them, and a ROM behind the hole.
LOW, HIGH, ROM = (0x0, 0x2000), (0x4000, 0x1000), (0x6000, 0x1000)
SPAN = 0x8000


class Model:
    """The same guest memory as a bytearray and a flag per byte that says whether it exists."""

    def __init__(self) -> None:
        self.data = bytearray(SPAN)
        self.there = bytearray(SPAN)
        for start, size in (LOW, HIGH, ROM):
            self.there[start : start + size] = b"\1" * size

    def has(self, gpa: int, size: int) -> bool:
        """Whether all of the range exists; regions here never touch, so it is in one of them."""
        return 0 <= gpa < SPAN and self.there[gpa : gpa + max(size, 1)] == b"\1" * max(size, 1)


def descriptors() -> set[str]:
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


def make() -> GuestMemory:
    memory = GuestMemory([LOW, HIGH])
    memory.add_rom(ROM[0], bytes(ROM[1]))
    return memory


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = make()
    yield memory
    memory.close()


edges = st.sampled_from([s + d for start, size in (LOW, HIGH, ROM) for s in (start, start + size)
                         for d in range(-9, 10)])  # fmt: skip
addresses = st.one_of(edges, st.integers(-16, SPAN + 16), st.integers(-(1 << 70), 1 << 70))
lengths = st.one_of(st.integers(0, 10), st.integers(0, 2 * SPAN))
steps = st.one_of(
    st.tuples(st.just("write"), addresses, st.binary(max_size=64)),
    st.tuples(st.just("slice"), addresses, st.binary(max_size=64)),
    st.tuples(st.just("read"), addresses, lengths),
    st.tuples(st.sampled_from([1, 2, 4, 8]), addresses, st.integers(0, (1 << 64) - 1)),
)


def value_access(memory: GuestMemory, model: Model, size: int, gpa: int, value: int) -> None:
    bits = 8 * size
    value &= (1 << bits) - 1
    write, read = getattr(memory, f"write_u{bits}"), getattr(memory, f"read_u{bits}")
    if model.has(gpa, size):
        assert read(gpa) == int.from_bytes(model.data[gpa : gpa + size], "little")
        write(gpa, value)
        model.data[gpa : gpa + size] = value.to_bytes(size, "little")
        assert read(gpa) == value
    else:
        for call in (lambda: write(gpa, value), lambda: read(gpa)):
            with pytest.raises(GuestAddressError):
                call()


@settings(deadline=None)
@given(st.lists(steps, max_size=30))
def test_any_sequence_of_accesses_does_what_it_does_to_a_bytearray(sequence) -> None:
    memory, model = make(), Model()
    for kind, gpa, what in sequence:
        if kind == "read":
            if model.has(gpa, what):
                assert memory.read(gpa, what) == model.data[gpa : gpa + what]
                assert memory[gpa : gpa + what] == model.data[gpa : gpa + what]
            else:
                with pytest.raises(GuestAddressError):
                    memory.read(gpa, what)
                with pytest.raises(GuestAddressError):
                    memory[gpa : gpa + what]
        elif kind in ("write", "slice"):
            end = gpa + len(what)
            if model.has(gpa, len(what)):
                model.data[gpa:end] = what
                if kind == "write":
                    memory.write(gpa, what)
                else:
                    memory[gpa:end] = what
            else:
                with pytest.raises(GuestAddressError):
                    memory.write(gpa, what)
        else:
            value_access(memory, model, kind, gpa, what)
    for start, size in (LOW, HIGH, ROM):
        assert memory.read(start, size) == model.data[start : start + size]
    memory.close()


@pytest.mark.parametrize(("start", "size"), [LOW, HIGH, ROM])
def test_the_last_byte_of_a_region_is_there_and_the_next_is_not(memory, start, size) -> None:
    end = start + size
    memory.write_u8(end - 1, 0xA5)
    assert memory.read(end - 1, 0) == b""
    assert memory.read(end - 1, 1) == b"\xa5"
    for call in (
        lambda: memory.read_u8(end),
        lambda: memory.read(end, 0),
        lambda: memory.read(end - 1, 2),
        lambda: memory.read_u64(end - 7),
        lambda: memory.write(end - 3, b"1234"),
        lambda: memory.hva(end),
    ):
        with pytest.raises(GuestAddressError, match=r"no guest memory at 0x"):
            call()
    assert memory.read(end - 3, 3) == b"\0\0\xa5"  # the write that did not fit wrote nothing


def test_an_access_across_two_regions_that_touch_is_refused_not_truncated() -> None:
    memory = GuestMemory([(0, PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE)])
    with pytest.raises(GuestAddressError):
        memory.read(PAGE_SIZE - 2, 4)
    with pytest.raises(GuestAddressError):
        memory.write(PAGE_SIZE - 2, b"abcd")
    assert memory.read(PAGE_SIZE - 2, 2) + memory.read(PAGE_SIZE, 2) == bytes(4)
    memory.close()


def test_a_negative_size_is_refused(memory) -> None:
    with pytest.raises(GuestAddressError):
        memory.view(0x100, -1)


def test_a_slice_is_a_view_and_sees_later_writes(memory) -> None:
    view = memory[0x100:0x104]
    memory.write(0x100, b"late")
    assert view == b"late"
    view[0] = ord("f")
    assert memory.read(0x100, 4) == b"fate"


@pytest.mark.parametrize("key", [5, slice(0, 8, 2), (1, 2)])
def test_what_is_no_plain_slice_is_a_type_error(memory, key) -> None:
    with pytest.raises(TypeError, match="plain slice"):
        memory[key]


@pytest.mark.parametrize("key", [slice(None, 8), slice(8, None), slice(-8, -4), slice(8, 4)])
def test_a_slice_needs_both_ends_in_order_and_not_negative(memory, key) -> None:
    with pytest.raises(GuestAddressError):
        memory[key]


def test_assigning_a_slice_needs_the_exact_length(memory) -> None:
    memory.write(0x10, b"abcd")
    for data in (b"123", b"12345", b""):
        with pytest.raises(ValueError, match="do not fill"):
            memory[0x10:0x14] = data
    assert memory.read(0x10, 4) == b"abcd"


@pytest.mark.parametrize(("start", "size"), [LOW, HIGH, ROM])
def test_the_hva_is_where_the_bytes_are_in_this_process(memory, start, size) -> None:
    gpa = start + size - 5
    memory.write(gpa, b"there")
    assert ctypes.string_at(memory.hva(gpa), 5) == b"there"
    ctypes.memmove(memory.hva(gpa), b"THERE", 5)
    assert memory.read(gpa, 5) == b"THERE"


def test_a_second_mapping_of_the_memfd_sees_the_ram_range_after_range(memory) -> None:
    memory.write(LOW[0], b"low")
    memory.write(HIGH[0], b"high")
    with mmap.mmap(memory.fd, LOW[1] + HIGH[1]) as other:
        assert other[:3] == b"low"
        assert other[LOW[1] : LOW[1] + 4] == b"high"
        other[0:3] = b"LOW"
    assert memory.read(LOW[0], 3) == b"LOW"


@pytest.mark.parametrize("length", [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1])
def test_a_rom_is_padded_with_zeros_to_whole_pages_and_marked_read_only(memory, length) -> None:
    region = memory.add_rom(0x10_0000, b"\xee" * length)
    pages = (length + PAGE_SIZE - 1) // PAGE_SIZE
    assert (region.size, region.readonly) == (pages * PAGE_SIZE, True)
    assert memory.read(0x10_0000, region.size) == (b"\xee" * length).ljust(region.size, b"\0")
    assert memory.region(0x10_0000 + length - 1) == region


def test_regions_are_kept_in_order_whatever_the_order_they_come_in() -> None:
    memory = GuestMemory([(0x8000, PAGE_SIZE), (0, PAGE_SIZE)])
    memory.add_rom(0x4000, b"rom")
    assert [r.gpa for r in memory.regions] == [0, 0x4000, 0x8000]
    assert memory.read(0x4000, 3) == b"rom"
    memory.close()


@pytest.mark.parametrize(
    "ram", [[(0, 0)], [(0, -4096)], [(0, 100)], [(0, 4097)], [(1, 4096)], [(0, 4096), (8, 4096)]]
)
def test_memory_that_is_not_whole_pages_is_refused(ram) -> None:
    with pytest.raises(ConfigError, match="whole pages; use a multiple of 4096"):
        GuestMemory(ram)


@pytest.mark.parametrize("size", [1 << 62, 1 << 63, 1 << 80])
def test_more_memory_than_can_be_mapped_is_a_config_error_that_leaves_nothing_open(size) -> None:
    before = descriptors()
    with pytest.raises(ConfigError, match=rf"cannot map {size} bytes.*; use a smaller --memory"):
        GuestMemory([(0, size)])
    assert descriptors() == before


@pytest.mark.parametrize("gpa", [0, 0x1000])
def test_regions_that_overlap_are_refused(memory, gpa) -> None:
    before = memory.regions.copy()
    with pytest.raises(ConfigError, match=r"overlaps 0x0\.\.0x1fff; use"):
        memory.add_rom(gpa, b"x" * 0x2000)
    assert memory.regions == before
    open_before = descriptors()
    with pytest.raises(ConfigError, match="overlaps"):
        GuestMemory([(0, 0x2000), (0x1000, 0x2000)])
    assert descriptors() == open_before


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:vmexit-ram")


def test_close_gives_back_descriptor_and_mappings_and_may_be_called_twice() -> None:
    fds, maps = descriptors(), mappings()
    memory = make()
    assert mappings() > maps
    memory.close()
    memory.close()
    assert (descriptors(), mappings()) == (fds, maps)
    with pytest.raises(GuestAddressError, match="closed"):
        memory.read_u8(0)
    with pytest.raises(GuestAddressError, match="closed"):
        memory.write(0, b"x")


def test_a_slice_that_outlives_close_stays_usable_and_frees_its_pages_when_it_goes() -> None:
    maps = mappings()
    memory = make()
    kept = memory[HIGH[0] : HIGH[0] + 4]
    memory.close()
    kept[:] = b"kept"  # unmapped pages would end the process here
    assert kept == b"kept"
    assert mappings() == maps + 1
    del kept
    assert mappings() == maps


# Images.


def everything(memory: GuestMemory) -> bytes:
    return b"".join(bytes(region.view) for region in memory.regions)


def test_an_image_stays_as_it_is_and_the_views_of_memory_stay_good(memory) -> None:
    view = memory.view(HIGH[0], 8)
    memory.write(HIGH[0], b"before")
    before = everything(memory)
    image = memory.capture()
    assert everything(memory) == before
    memory.write(HIGH[0], b"after")
    memory.write(LOW[0] + 0x1000, b"too")
    assert bytes(view[:5]) == b"after"
    memory.restore(image)
    assert everything(memory) == before
    assert bytes(view[:6]) == b"before"
    with pytest.raises(OSError):
        os.pwrite(image.fd, b"x", 0)
    view.release()
    image.close()


def test_an_image_of_a_private_copy_has_both_what_is_old_and_what_is_new(memory) -> None:
    memory.write(LOW[0], b"old")
    first = memory.capture()
    memory.write(HIGH[0], b"new")
    second = memory.capture()
    memory.write(LOW[0], b"newest")
    for image, old, new in ((first, b"old", bytes(3)), (second, b"old", b"new")) * 2:
        memory.restore(image)
        assert (memory.read(LOW[0], 3), memory.read(HIGH[0], 3)) == (old, new)
    first.close()
    second.close()


def test_an_image_is_copied_where_somebody_else_could_write_to_it(memory) -> None:
    memory.write(LOW[0], b"mine")
    with mmap.mmap(memory.fd, LOW[1] + HIGH[1]) as other:
        image = memory.capture()
        other[:5] = b"their"
        assert memory.read(LOW[0], 4) == b"mine"
        memory.restore(image)
        assert memory.read(LOW[0], 4) == b"mine"
    image.close()


def test_an_image_of_other_memory_is_refused(memory) -> None:
    other = GuestMemory([(0, 0x1000)])
    image = other.capture()
    with pytest.raises(ConfigError, match="laid out otherwise"):
        memory.restore(image)
    image.close()
    other.close()


def test_what_is_discarded_of_a_private_copy_is_zeros_and_not_what_was_captured(memory) -> None:
    memory.write(LOW[0], b"x" * LOW[1])
    image = memory.capture()
    memory.discard(LOW[0] + 0x1000, 0x1000)
    assert memory.read(LOW[0], LOW[1]) == b"x" * 0x1000 + bytes(0x1000)
    memory.restore(image)
    assert memory.read(LOW[0], LOW[1]) == b"x" * LOW[1]
    image.close()


def taken(hva: int, size: int) -> int:
    """Bytes that this mapping has in memory of its own."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = hva <= int(found[1], 16) and int(found[2], 16) <= hva + size
        elif inside and line.startswith("Anonymous:"):
            total += int(line.split()[1]) << 10
    return total


def test_memory_that_was_never_used_takes_a_page_for_a_page() -> None:
    size = 64 << 20
    with closing(GuestMemory([(0, size)])) as memory:
        memory.write(0x5000, b"used")
        memory.write(40 << 20, b"used")
        with closing(memory.capture()) as image:
            before = os.fstat(image.fd).st_blocks
            for gpa in range(8 << 20, 32 << 20, 4096):
                assert memory.read_u8(gpa) == 0
                memory.write_u8(gpa, 1)
            assert os.fstat(image.fd).st_blocks == before
            (region,) = memory.regions
            assert 24 << 20 <= taken(region.hva, size) < 25 << 20
            assert memory.read(0x5000, 4) == memory.read(40 << 20, 4) == b"used"
            memory.discard(8 << 20, 24 << 20)
            assert taken(region.hva, size) < 1 << 20
            assert memory.read_u8(9 << 20) == 0
            memory.restore(image)
            assert bytes(image.view[0x5000:0x5004]) == memory.read(0x5000, 4) == b"used"
            assert sum(end - first for first, end in memory.in_use(region)) < 1 << 20


def test_a_later_image_holds_no_zeros() -> None:
    size = 32 << 20
    with closing(GuestMemory([(0, size)])) as memory:
        memory.write(0, b"x" * (8 << 20))
        with closing(memory.capture()):
            memory.write(16 << 20, b"used")
            assert memory.read(0, size).count(b"x") == 8 << 20
            memory.discard(1 << 20, 7 << 20)
            with closing(memory.capture()) as image:
                assert os.fstat(image.fd).st_blocks * 512 <= (1 << 20) + PAGE_SIZE
                assert memory.read(0, size).count(b"x") == 1 << 20
                assert memory.read(16 << 20, 4) == b"used"


def test_an_image_with_many_holes_has_few_mappings() -> None:
    size = 1 << 30
    with closing(GuestMemory([(0, size)])) as memory:
        for gpa in range(0, size, 2 << 20):
            memory.write_u32(gpa, gpa)
        before = len(Path("/proc/self/maps").read_text().splitlines())
        with closing(memory.capture()):
            assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 140
            for gpa in range(0, size, 2 << 20):
                assert memory.read_u32(gpa) == gpa


@pytest.mark.parametrize("private", [False, True])
def test_memory_in_use_is_what_was_written_to(private) -> None:
    memory = GuestMemory([(0, 1 << 20), (1 << 21, 1 << 20)])
    image = memory.capture() if private else None
    memory.write(0x5000, b"x")
    memory.write((1 << 21) + 0x8FFF, b"xx")
    found = [list(memory.in_use(region)) for region in memory.regions]
    assert found == [[(0x5000, 0x6000)], [(0x8000, 0xA000)]]
    memory.close()
    if image is not None:
        image.close()


def test_images_leave_no_descriptor_behind() -> None:
    before = descriptors()
    memory = make()
    images = [memory.capture() for _ in range(3)]
    for image in images:
        image.close()
        image.close()
    memory.close()
    assert descriptors() == before
