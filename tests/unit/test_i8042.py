"""The keyboard controller does what its commands say, and is quick to tell that nobody is there."""

import pytest
from fakes import Pins
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError
from vmexit.devices.i8042 import I8042

DATA, COMMAND = 0x60, 0x64
FULL, SYSTEM, WAS_COMMAND, UNLOCKED, AUX, TIMEOUT = 1, 4, 8, 16, 32, 64
KEYBOARD_GSI, AUX_GSI = 1, 12


class Pc:
    def __init__(self) -> None:
        self.pins = Pins()
        self.resets = 0
        self.i8042 = I8042(self.pins.line(KEYBOARD_GSI), self.pins.line(AUX_GSI), self.reset)
        self.bus = Bus("port")
        self.bus.attach(DATA, 1, self.i8042.data)
        self.bus.attach(COMMAND, 1, self.i8042.command)

    def reset(self) -> None:
        self.status()  # it may be called from there: no lock is held
        self.resets += 1

    def command(self, command: int, *data: int) -> None:
        self.bus.write(COMMAND, 1, command)
        for byte in data:
            self.bus.write(DATA, 1, byte)

    def status(self) -> int:
        return self.bus.read(COMMAND, 1)

    def data(self) -> int:
        return self.bus.read(DATA, 1)

    def ask(self, command: int, *data: int) -> int:
        self.command(command, *data)
        assert self.status() & FULL
        answer = self.data()
        assert not self.status() & FULL
        return answer

    def levels(self) -> list[bool]:
        return [self.pins.levels.get(gsi, False) for gsi in (KEYBOARD_GSI, AUX_GSI)]


def test_after_reset_there_is_nothing_to_read_and_all_is_as_a_bios_leaves_it() -> None:
    pc = Pc()
    assert pc.status() == UNLOCKED | SYSTEM
    assert pc.ask(0x20) == 0x65


def test_the_status_tells_whether_a_command_or_data_came_last() -> None:
    pc = Pc()
    pc.command(0xAE)
    assert pc.status() & WAS_COMMAND
    pc.command(0x60, 0x44)
    assert not pc.status() & WAS_COMMAND


def test_the_controller_passes_its_test_and_neither_port_does() -> None:
    pc = Pc()
    pc.command(0x60, 0x00)
    assert not pc.status() & SYSTEM
    assert pc.ask(0xAA) == 0x55
    assert pc.status() & SYSTEM
    for test in (0xAB, 0xA9):
        assert pc.ask(test) not in (0x00, 0xFA, 0xFF)  # what Linux takes for "no error"


def test_its_ram_is_read_and_written_and_byte_0_is_the_command_byte() -> None:
    pc = Pc()
    for i in range(1, 32):
        pc.command(0x60 + i, 0xA0 ^ i)
    for i in range(1, 32):
        assert pc.ask(0x20 + i) == 0xA0 ^ i
    pc.command(0x60, 0x41)
    assert pc.ask(0x20) == 0x61
    pc.command(0xAD)
    assert pc.ask(0x20) == 0x71
    pc.command(0xAE)
    assert pc.ask(0x20) == 0x61


def test_a_byte_for_the_keyboard_is_answered_with_a_timeout_at_once() -> None:
    pc = Pc()
    for byte in (0xFF, 0xF2, 0xED):
        pc.bus.write(DATA, 1, byte)
        assert pc.status() & (FULL | AUX | TIMEOUT) == FULL | TIMEOUT
        assert pc.levels() == [True, False]
        assert pc.data() == 0xFE
        assert pc.status() & (FULL | TIMEOUT) == 0 and pc.levels() == [False, False]


def test_a_byte_for_the_auxiliary_port_times_out_there() -> None:
    pc = Pc()
    pc.command(0x60, 0x02)
    pc.command(0xD4, 0xF2)
    assert pc.status() & (FULL | AUX | TIMEOUT) == FULL | AUX | TIMEOUT
    assert pc.levels() == [False, True]
    assert pc.data() == 0xFE and pc.levels() == [False, False]
    pc.command(0x60, 0x01)
    pc.command(0xD4, 0xF2)
    assert pc.levels() == [False, False]


def test_linux_finds_no_auxiliary_port_with_two_commands() -> None:
    """i8042_check_aux: the loop-back must fail, and then the test."""
    pc = Pc()
    pc.command(0xD3, 0x5A)
    assert pc.status() & (FULL | AUX) == FULL
    pc.data()
    assert pc.ask(0xA9) not in (0x00, 0xFA, 0xFF)
    pc.command(0xA8)
    assert pc.ask(0x20) & 0x20
    pc.command(0xA7)
    assert pc.ask(0x20) & 0x20


def test_looping_back_a_byte_gives_it_as_if_from_the_keyboard() -> None:
    pc = Pc()
    assert pc.ask(0xD2, 0x1C) == 0x1C
    assert pc.pins.log == [(KEYBOARD_GSI, True), (KEYBOARD_GSI, False)]


@pytest.mark.parametrize("command_byte", [0x00, 0x02])
def test_no_interrupt_comes_that_the_command_byte_does_not_enable(command_byte) -> None:
    pc = Pc()
    pc.command(0x60, command_byte)
    pc.command(0xD2, 1)
    assert pc.levels() == [False, False]
    pc.command(0x60, 0x01)
    assert pc.levels() == [True, False]


def test_the_output_port_shows_an_open_a20_gate_and_what_is_waiting() -> None:
    pc = Pc()
    assert pc.ask(0xD0) == 0xC3
    pc.command(0xD1, 0xDD)  # A20 off
    assert pc.ask(0xD0) == 0xC3
    pc.command(0xD2, 7)
    assert pc.ask(0xD0) == 0xD3
    pc.command(0xD4, 7)
    assert pc.ask(0xD0) == 0xE3
    assert pc.ask(0xC0) == 0x80
    assert pc.resets == 0


def test_a_pulse_of_bit_0_of_the_output_port_resets_the_machine() -> None:
    for command in range(0xF0, 0x100):
        pc = Pc()
        pc.command(command)
        assert pc.resets == (command % 2 == 0)


def test_so_does_writing_it_low() -> None:
    pc = Pc()
    pc.command(0xD1, 0xFE)
    assert pc.resets == 1
    pc.command(0xD1, 0x01)
    assert pc.resets == 1


def test_a_new_command_takes_the_place_of_one_that_waits_for_data() -> None:
    pc = Pc()
    pc.command(0xD1)
    pc.command(0xD2, 0x00)
    assert pc.resets == 0 and pc.data() == 0x00


def test_a_command_that_is_not_known_does_nothing() -> None:
    pc = Pc()
    before = pc.i8042.state()
    for command in (0x00, 0x1F, 0x80, 0xA4, 0xB0, 0xE0, 0xEF):
        pc.command(command)
        assert not pc.status() & FULL
    assert pc.i8042.state() == before | {"flags": WAS_COMMAND}


steps = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 1), st.none()),
        st.tuples(st.integers(0, 1), st.integers(0, 255)),
    ),
    max_size=40,
)


def drive(pc: Pc, sequence) -> list[object]:
    seen: list[object] = []
    for register, value in sequence:
        if value is None:
            seen.append(pc.i8042.read(register, 1))
        else:
            pc.i8042.write(register, 1, value)
        seen += [pc.levels(), pc.status()]
    return seen


@settings(deadline=None)
@given(steps, steps)
def test_a_restored_copy_goes_on_identically(before, after) -> None:
    pc, copy = Pc(), Pc()
    drive(pc, before)
    drive(copy, before[:3])
    copy.i8042.restore(pc.i8042.state())
    assert (copy.i8042.state(), copy.levels()) == (pc.i8042.state(), pc.levels())
    pc.resets = copy.resets = 0
    assert (drive(pc, after), pc.resets) == (drive(copy, after), copy.resets)


def test_reset_lowers_the_lines() -> None:
    pc = Pc()
    pc.command(0xD2, 1)
    pc.i8042.reset()
    assert pc.levels() == [False, False]
    assert pc.i8042.state() == Pc().i8042.state()


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"ram": bytes(31)}, {"command": 256}, {"out": -1}, {"flags": "1"}],
    ids=str,
)
def test_what_is_no_state_of_it_is_refused_and_changes_nothing(change) -> None:
    pc = Pc()
    before = pc.i8042.state()
    with pytest.raises(ConfigError, match="; "):
        pc.i8042.restore(before | {"out": 9} | change)
    assert pc.i8042.state() == before
