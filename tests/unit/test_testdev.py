"""The test device of kvm-unit-tests, at the addresses that their guests use."""

import pytest
from fakes import Pins
from hypothesis import given
from hypothesis import strategies as st

from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError
from vmexit.core.loop import EventLoop
from vmexit.devices.testdev import TestDev
from vmexit.machine.board import Board
from vmexit.machine.config import MachineConfig
from vmexit.machine.runner import StopRequest


class Pc:
    """The device as a board has it, with an interrupt controller or without."""

    def __init__(self, chip: Pins | None) -> None:
        self.pio, self.mmio = Bus("port"), Bus("MMIO")
        request = StopRequest()
        loop = EventLoop(request.fail)
        nothing = lambda *_: None  # noqa: E731
        board = Board(MachineConfig(), self.pio, self.mmio, request, loop, nothing, nothing)
        board.attach_testdev(chip)
        loop.close()
        self.device = board.devices["testdev"]


@pytest.fixture
def pins():
    return Pins()


@pytest.fixture
def pc(pins):
    return Pc(pins)


@pytest.mark.parametrize("read_at", [0xE0, 0xE8])
@pytest.mark.parametrize("write_at", [0xE0, 0xE8])
def test_what_was_written_is_read_in_any_width(pc, write_at, read_at):
    pc.pio.write(write_at, 4, 0x1234_5678)
    assert pc.pio.read(read_at, 4) == 0x1234_5678
    assert [pc.pio.read(read_at + i, 1) for i in range(4)] == [0x78, 0x56, 0x34, 0x12]
    pc.pio.write(write_at + 2, 2, 0xABCD)
    pc.pio.write(write_at + 1, 1, 0xEF)
    assert pc.pio.read(read_at, 4) == 0xABCD_EF78
    assert pc.pio.read(read_at + 2, 2) == 0xABCD


def test_strings_go_through_it(pc):
    pc.pio.write_string(0xE0, 2, b"ABCDEF")
    assert pc.pio.read_string(0xE0, 2, 2) == b"EFEF"


def test_a_write_raises_or_lowers_an_input(pc, pins):
    pc.pio.write(0x200E, 1, 1)
    pc.pio.write(0x2017, 1, 0x80)
    assert pins.levels == {0x0E: True, 0x17: True}
    pc.pio.write(0x200E, 1, 0)
    assert pins.levels == {0x0E: False, 0x17: True}
    assert pc.pio.read(0x2017, 1) == 0
    pc.pio.write(0x2018, 1, 1)  # behind the last one nobody answers
    assert len(pins.log) == 3 and pc.pio.unclaimed_writes == 1


def test_without_interrupt_controller_the_lines_do_nothing():
    pc = Pc(None)
    pc.pio.write(0x2005, 1, 1)
    pc.device.reset()


def test_the_memory_is_memory_in_each_width(pc):
    pc.mmio.write(0xFF00_0000, 8, 0x8877_6655_4433_2211)
    assert pc.mmio.read(0xFF00_0002, 4) == 0x6655_4433
    pc.mmio.write(0xFF00_FFFF, 1, 0xAA)
    assert pc.mmio.read(0xFF00_FFFE, 2) == 0xAA00
    assert pc.mmio.read(0xFF01_0000, 1) == 0xFF and pc.mmio.unclaimed_reads == 1


def test_a_flush_is_taken(pc):
    pc.pio.write(0xE4, 4, 0x1234_5000)
    assert pc.pio.read(0xE4, 4) == 0
    assert pc.pio.unclaimed_writes == pc.pio.unclaimed_reads == 0
    assert pc.pio.read(0xE0, 4) == 0


def test_reset_lowers_what_it_raised_and_clears_the_rest(pc, pins):
    pc.pio.write(0x2005, 1, 1)
    pc.pio.write(0xE0, 1, 7)
    pc.mmio.write(0xFF00_0000, 1, 7)
    pc.device.reset()
    assert pins.levels == {5: False}
    assert pc.pio.read(0xE0, 4) == pc.mmio.read(0xFF00_0000, 8) == 0


def test_a_saved_device_has_the_same_lines_and_bytes(pc):
    pc.pio.write(0x2005, 1, 1)
    pc.pio.write(0xE0, 4, 0x1234_5678)
    pc.mmio.write(0xFF00_1000, 4, 0x9ABC_DEF0)
    pins = Pins()
    other = Pc(pins)
    other.pio.write(0x2006, 1, 1)
    other.device.restore(pc.device.state())
    assert pins.levels == {5: True, 6: False}
    assert other.device.state() == pc.device.state()
    assert other.pio.read(0xE8, 4) == 0x1234_5678
    assert other.mmio.read(0xFF00_1000, 4) == 0x9ABC_DEF0


@pytest.mark.parametrize(
    "wrong", [{"version": 0}, {"levels": [0] * 23}, {"levels": [2] * 24}, {"echo": b""},
              {"memory": bytes(0x1_0001)}, {"memory": None}],
)  # fmt: skip
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(pc, pins, wrong):
    before = pc.device.state()
    with pytest.raises(ConfigError, match="not the state of a test device"):
        pc.device.restore({**before, **wrong})
    assert pc.device.state() == before and pins.log == []


accesses = st.tuples(
    st.sampled_from(["pio", "mmio"]),
    st.one_of(
        st.integers(0xDC, 0xEC), st.integers(0x1FFC, 0x2018),
        st.integers(0xFEFF_FFF8, 0xFF00_0008), st.integers(0xFF00_FFF0, 0xFF01_0008),
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, (1 << 64) - 1),
    st.booleans(),
)  # fmt: skip


@given(st.lists(accesses, max_size=30))
def test_no_access_raises_or_changes_the_sizes(steps):
    pc = Pc(Pins())
    for name, address, size, value, is_write in steps:
        bus = pc.pio if name == "pio" else pc.mmio
        if is_write:
            bus.write(address, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= bus.read(address, size) < 1 << 8 * size
    pc.device.restore(pc.device.state())
    assert isinstance(pc.device, TestDev)
