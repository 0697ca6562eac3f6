"""The bus is an address space: whatever the widths and edges, an access equals byte-wise access.

The model is an array of bytes in which addresses without a device read as all ones.
"""

import struct
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.core.bus import Bus, State
from vmexit.core.errors import ConfigError

SPACE = 64


class Bytes:
    """A device of plain bytes that remembers its accesses and refuses a width it has not."""

    def __init__(self, size: int, widths: tuple[int, ...] = (1,)) -> None:
        self.widths = widths
        self.data = bytearray(size)
        self.seen: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        assert size in self.widths
        self.seen.append(("read", offset, size))
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        assert size in self.widths and 0 <= value < 1 << 8 * size
        self.seen.append(("write", offset, size))
        self.data[offset : offset + size] = value.to_bytes(size, "little")[: len(self.data)]

    def reset(self) -> None: ...

    def state(self) -> State:
        return {}

    def restore(self, state: State) -> None: ...


layouts = st.lists(
    st.tuples(
        st.integers(0, 5),  # gap before the device
        st.integers(1, 12),  # its size
        st.sets(st.sampled_from([2, 4, 8])).map(lambda more: tuple(sorted({1, *more}))),
    ),
    max_size=5,
)
accesses = st.lists(
    st.tuples(
        st.integers(0, SPACE - 8), st.integers(1, 8), st.none() | st.integers(0, (1 << 64) - 1)
    ),
    max_size=40,
)

pytestmark = pytest.mark.engine


@settings(deadline=None)
@given(layouts, accesses, st.randoms())
def test_every_access_equals_byte_wise_access_to_a_byte_array(layout, sequence, random) -> None:
    bus, model = Bus("test"), [None] * (SPACE + 64)
    place, ranges = 0, []
    for gap, size, widths in layout:
        place += gap
        ranges.append((place, size, Bytes(size, widths)))
        place += size
    random.shuffle(ranges)
    for base, size, device in ranges:
        bus.attach(base, size, device)
        model[base : base + size] = [0] * size
    nowhere = {"read": 0, "write": 0}
    for address, size, value in sequence:
        there = [b for b in range(address, address + size) if model[b] is not None]
        if value is None:
            expected = bytes(0xFF if b is None else b for b in model[address : address + size])
            assert bus.read(address, size) == int.from_bytes(expected, "little")
            nowhere["read"] += not there
        else:
            value &= (1 << 8 * size) - 1
            bus.write(address, size, value)
            for b in there:
                model[b] = value >> 8 * (b - address) & 0xFF
            nowhere["write"] += not there
    for base, size, device in ranges:
        assert list(device.data) == model[base : base + size]
    # Accesses that miss every device count once each; partial ones only for what nobody answered.
    assert bus.unclaimed_reads >= nowhere["read"] and bus.unclaimed_writes >= nowhere["write"]
    if len(sequence) == nowhere["read"] + nowhere["write"]:
        assert bus.unclaimed_reads == nowhere["read"]
        assert bus.unclaimed_writes == nowhere["write"]


def test_an_access_that_the_device_implements_arrives_in_one_piece_at_its_offset() -> None:
    bus, device = Bus("port"), Bytes(8, (1, 2, 4, 8))
    bus.attach(0x100, 8, device)
    bus.write(0x104, 4, 0x11223344)
    assert bus.read(0x100, 8) == 0x11223344 << 32
    assert device.seen == [("write", 4, 4), ("read", 0, 8)]


@pytest.mark.parametrize(
    ("size", "widths", "pieces"),
    [
        (8, (1, 2, 4), [(0, 4), (4, 4)]),
        (8, (1, 2), [(0, 2), (2, 2), (4, 2), (6, 2)]),
        (4, (1, 2), [(0, 2), (2, 2)]),
        (4, (1,), [(0, 1), (1, 1), (2, 1), (3, 1)]),
        (3, (1, 2), [(0, 2), (2, 1)]),
        (7, (1, 2, 4), [(0, 4), (4, 2), (6, 1)]),
    ],
)
@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_wider_access_is_split_from_the_low_address_up(kind, size, widths, pieces) -> None:
    bus, device = Bus("MMIO"), Bytes(8, widths)
    bus.attach(0, 8, device)
    bus.read(0, size) if kind == "read" else bus.write(0, size, 0)
    assert device.seen == [(kind, *piece) for piece in pieces]


def test_an_access_across_two_devices_reaches_each_with_its_part() -> None:
    bus, first, second = Bus("port"), Bytes(2, (1, 2)), Bytes(2, (1, 2))
    bus.attach(0x10, 2, first)
    bus.attach(0x12, 2, second)
    bus.write(0x11, 2, 0xBBAA)
    assert (bytes(first.data), bytes(second.data)) == (b"\0\xaa", b"\xbb\0")
    assert bus.read(0x10, 4) == 0x00BBAA00
    assert bus.unclaimed_reads == bus.unclaimed_writes == 0


def test_the_part_of_an_access_beyond_the_device_is_unclaimed() -> None:
    bus, device = Bus("port"), Bytes(1)
    bus.attach(0xF4, 1, device)
    assert bus.read(0xF4, 4) == 0xFFFFFF00
    bus.write(0xF3, 2, 0x1234)
    assert (bytes(device.data), bus.unclaimed_reads, bus.unclaimed_writes) == (b"\x12", 2, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_where_nobody_answers_reads_are_all_ones_and_writes_vanish_each_counted_once(size) -> None:
    bus = Bus("port")
    bus.attach(0x100, 1, Bytes(1))
    assert bus.read(0x80, size) == (1 << 8 * size) - 1
    bus.write(0x80, size, 0)
    assert (bus.unclaimed_reads, bus.unclaimed_writes) == (1, 1)


def test_with_overhang_the_device_takes_a_whole_access_that_begins_in_its_range() -> None:
    bus, device = Bus("port"), Bytes(1, (1, 2, 4))
    bus.attach(0xF4, 1, device, overhang=True)
    bus.write(0xF4, 4, 0x11223344)
    bus.read(0xF4, 2)
    assert device.seen == [("write", 0, 4), ("read", 0, 2)]
    device.seen.clear()
    bus.write(0xF3, 2, 0x5500)  # begins before it: only the part that is in its range
    bus.write(0xF5, 1, 0)
    assert device.seen == [("write", 0, 1)] and device.data == b"\x55"


@pytest.mark.parametrize(
    ("base", "size"), [(0x10, 4), (0x0F, 2), (0x13, 1), (0x08, 0x20), (0x11, 1), (0x13, 8)]
)
def test_devices_that_overlap_are_a_config_error_that_names_both(base, size) -> None:
    bus = Bus("port")
    bus.attach(0x10, 4, Bytes(4))
    with pytest.raises(ConfigError, match=rf"^port {base:#x}\.\..*Bytes.*0x10\.\.0x13.*; give"):
        bus.attach(base, size, Bytes(size))
    assert [(b, s) for b, s, _ in bus.devices()] == [(0x10, 4)]


class _Part(Bytes):
    pass


def test_of_a_part_of_a_device_the_device_is_named() -> None:
    bus = Bus("port")
    bus.attach(0x10, 4, _Part(4))
    with pytest.raises(
        ConfigError, match=r"\(Bytes\) overlaps 0x10\.\.0x13 \(a part of test_bus\)"
    ):
        bus.attach(0x10, 4, Bytes(4))


@pytest.mark.parametrize(("base", "size"), [(0x0E, 2), (0x14, 4)])
def test_devices_that_only_touch_are_no_overlap(base, size) -> None:
    bus = Bus("port")
    bus.attach(0x10, 4, Bytes(4))
    bus.attach(base, size, Bytes(size))
    assert [b for b, _, _ in bus.devices()] == sorted([0x10, base])


def test_a_detached_device_no_longer_answers_and_its_neighbours_do() -> None:
    bus, devices = Bus("port"), [Bytes(1) for _ in range(3)]
    for i, device in enumerate(devices):
        device.data[0] = i
        bus.attach(i, 1, device)
    bus.detach(1)
    assert [bus.read(i, 1) for i in range(3)] == [0, 0xFF, 2]
    with pytest.raises(ConfigError, match="nothing is attached to port 0x1"):
        bus.detach(1)
    bus.attach(1, 1, devices[1])
    assert bus.read(1, 1) == 1


def test_listeners_hear_of_every_change_and_of_no_failed_one() -> None:
    bus, heard = Bus("port"), []
    bus.on_change(lambda: heard.append(len(bus.devices())))
    bus.attach(0, 1, Bytes(1))
    bus.attach(1, 1, Bytes(1))
    with pytest.raises(ConfigError):
        bus.attach(0, 1, Bytes(1))
    bus.detach(0)
    assert heard == [1, 2, 1]


def test_look_ups_from_other_threads_are_right_while_an_access_attaches_and_detaches() -> None:
    """ "Devices are attached … from within an access; look-ups may come from any thread"."""
    bus, fixed = Bus("port"), Bytes(1)
    fixed.data[0] = 0x5A
    bus.attach(0x50, 1, fixed)
    wrong: list[object] = []
    end = threading.Event()

    def look_up() -> None:
        while not end.is_set():
            try:
                if (value := bus.read(0x50, 1)) != 0x5A:
                    wrong.append(value)
            except Exception as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=look_up) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10_000):
        bus.attach(0x10, 1, Bytes(1))
        bus.detach(0x10)
    end.set()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 2, 4])
@given(data=st.data())
def test_string_io_is_so_many_accesses_to_one_port(size, width, data) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << 8 * size) - 1), max_size=9))
    packed = struct.pack(f"<{len(values)}{'BHI'[size // 2]}", *values)

    class Queue(Bytes):
        """Gives the elements one after the other, and keeps what is written."""

        def __init__(self) -> None:
            super().__init__(4, tuple(w for w in (1, 2, 4) if w <= width))
            self.bytes_in, self.written = iter(packed), b""

        def read(self, offset: int, size: int) -> int:
            return int.from_bytes(bytes(next(self.bytes_in) for _ in range(size)), "little")

        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            self.written += value.to_bytes(size, "little")

    bus, queue = Bus("port"), Queue()
    bus.attach(0x40, 4, queue)
    assert bus.read_string(0x40, size, len(values)) == packed
    bus.write_string(0x40, size, packed)
    assert queue.written == packed


@pytest.mark.parametrize("size", [1, 2, 4])
def test_string_io_where_nobody_answers_is_counted_by_element(size) -> None:
    bus = Bus("port")
    assert bus.read_string(0x40, size, 3) == b"\xff" * 3 * size
    bus.write_string(0x40, size, bytes(2 * size))
    assert (bus.unclaimed_reads, bus.unclaimed_writes) == (3, 2)


@pytest.mark.parametrize("address", [0, 0x10, 0x11, 0x12, 0x13, 0x14])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_route_is_the_access_itself(address, size) -> None:
    bus, device = Bus("port"), Bytes(4, (1, 2))
    bus.attach(0x10, 4, device)
    write, offset = bus.route_write(address, size)
    write(offset, size, 0x44332211 & (1 << 8 * size) - 1)
    direct, other = Bus("port"), Bytes(4, (1, 2))
    direct.attach(0x10, 4, other)
    direct.write(address, size, 0x44332211 & (1 << 8 * size) - 1)
    assert (device.data, device.seen) == (other.data, other.seen)
    read, offset = bus.route_read(address, size)
    assert read(offset, size) == direct.read(address, size)


def test_a_device_has_the_name_that_it_was_attached_with_or_that_of_its_class() -> None:
    bus = Bus("port")
    bus.attach(0x3F8, 8, Bytes(8), name="UART")
    bus.attach(0x400, 2, Bytes(2))
    named = [bus.name_at(address) for address in (0x3F7, 0x3F8, 0x3FF, 0x400, 0x402, 0)]
    assert named == ["", "UART", "UART", "Bytes", "", ""]
