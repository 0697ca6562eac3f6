"""The reset ports and the ACPI power management block."""

import threading

import pytest
from fakes import ManualClock, Pins
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.arch.x86 import layout
from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError
from vmexit.devices.system_ports import AcpiPm, Port92, ResetControl

SECOND = 1_000_000_000
GSI = 9
STS, EN, CNT, TMR = 0x600, 0x602, 0x604, 0x608
TMR_BIT, GBL, PWRBTN, RTC = 1, 0x20, 0x100, 0x400


class Calls:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def test_port_92_has_a20_on_and_resets_by_bit_0() -> None:
    reset, bus = Calls(), Bus("port")
    bus.attach(0x92, 1, Port92(reset))
    for value in (0x00, 0x02, 0xFE):
        bus.write(0x92, 1, value)
        assert bus.read(0x92, 1) == 0x02
    assert reset.count == 0
    bus.write(0x92, 1, 0x01)
    assert reset.count == 1


def reset_control() -> tuple[Bus, Calls, ResetControl]:
    reset, bus = Calls(), Bus("port")
    device = ResetControl(reset)
    bus.attach(layout.RESET_CONTROL_PORTS, 4, device)
    assert layout.RESET_PORT == 0xCF9
    return bus, reset, device


@pytest.mark.parametrize("writes", [(0x02, 0x06), (0x06,), (0x0E,), (0x04,), (0x0A, 0x0E)])
def test_a_rising_bit_2_of_the_reset_control_register_resets(writes) -> None:
    bus, reset, _ = reset_control()
    for value in writes[:-1]:
        bus.write(0xCF9, 1, value)
        assert reset.count == 0 and bus.read(0xCF9, 1) == value
    bus.write(0xCF9, 1, writes[-1])
    assert reset.count == 1
    bus.write(0xCF9, 1, writes[-1])  # it does not rise
    assert reset.count == 1


def test_looking_for_pci_at_the_same_ports_resets_nothing_and_finds_nothing() -> None:
    bus, reset, _ = reset_control()
    for value in (0x8000_0000, 0x8000_0600, 0xFFFF_FFFF):
        bus.write(0xCF8, 4, value)
        assert bus.read(0xCF8, 4) == 0xFFFF_FFFF
    bus.write(0xCF8, 2, 0x0600)
    bus.write(0xCF9, 2, 0x0606)
    bus.write(0xCFB, 1, 0x06)
    assert bus.read(0xCF9, 1) == 0 and bus.read(0xCFB, 1) == 0xFF
    assert reset.count == 0


def test_the_state_of_the_reset_control_register() -> None:
    bus, _, device = reset_control()
    bus.write(0xCF9, 1, 0x0A)
    other_bus, _, other = reset_control()
    other.restore(device.state())
    assert other_bus.read(0xCF9, 1) == 0x0A
    device.reset()
    assert bus.read(0xCF9, 1) == 0
    for state in ({"version": 2, "value": 0}, {"version": 1}, {"version": 1, "value": 256}):
        with pytest.raises(ConfigError, match="; "):
            other.restore(state)
    assert other_bus.read(0xCF9, 1) == 0x0A


class Pc:
    def __init__(self) -> None:
        self.clock, self.pins, self.off = ManualClock(), Pins(), Calls()
        self.pm = AcpiPm(self.clock, self.pins.line(GSI), self.off)
        self.bus = Bus("port")
        self.bus.attach(layout.ACPI_PM_PORT, layout.ACPI_PM_SIZE, self.pm)

    def get(self, port: int, size: int = 2) -> int:
        return self.bus.read(port, size)

    def put(self, port: int, value: int, size: int = 2) -> None:
        self.bus.write(port, size, value)

    @property
    def sci(self) -> bool:
        return self.pins.levels.get(GSI, False)


def test_the_power_button_sets_its_status_and_the_sci_is_status_and_enable() -> None:
    pc = Pc()
    pc.pm.press_power_button()
    assert pc.get(STS) == PWRBTN and not pc.sci
    pc.put(EN, PWRBTN)
    assert pc.sci
    pc.put(STS, 0xFFFF & ~PWRBTN)  # only a 1 clears
    assert pc.sci
    pc.put(STS, PWRBTN)
    assert pc.get(STS) == 0 and not pc.sci
    pc.pm.press_power_button()
    assert pc.sci
    pc.put(EN, 0)
    assert not pc.sci
    assert [level for _, level in pc.pins.log] == [True, False, True, False]


def test_enable_and_control_keep_the_bits_that_they_have_in_any_width() -> None:
    pc = Pc()
    pc.put(EN, 0xFFFF)
    assert pc.get(EN) == TMR_BIT | GBL | PWRBTN | RTC
    pc.put(EN + 1, 0x00, 1)
    assert pc.get(EN) == TMR_BIT | GBL
    pc.put(STS, 0x0100_0000, 4)
    assert pc.get(STS, 4) == PWRBTN << 16
    assert pc.get(CNT) == 0x0001  # SCI_EN
    pc.put(CNT, 0xDFFE)
    assert pc.get(CNT) == 0x1C03
    pc.put(CNT, 0x00, 1)
    assert pc.get(CNT) == 0x1C01
    pc.put(CNT, 0)
    assert pc.get(CNT) == 0x0001
    assert pc.get(CNT + 2) == 0 and pc.off.count == 0


@pytest.mark.parametrize("kind", range(8))
def test_slp_en_switches_off_if_the_sleep_type_is_s5(kind) -> None:
    pc = Pc()
    pc.put(CNT, kind << 10)
    assert pc.off.count == 0
    pc.put(CNT, kind << 10 | 1 << 13)
    assert pc.off.count == (kind == layout.SLEEP_TYPE_S5)
    assert pc.get(CNT) & 1 << 13 == 0
    pc.put(CNT + 1, 5 << 2 | 1 << 5, 1)
    assert pc.off.count == 1 + (kind == layout.SLEEP_TYPE_S5)


def test_the_timer_counts_at_3579545_hz_in_32_bits() -> None:
    pc = Pc()
    assert pc.get(TMR, 4) == 0
    pc.clock.advance(SECOND)
    assert pc.get(TMR, 4) == 3_579_545
    pc.put(TMR, 0, 4)
    assert pc.get(TMR, 4) == 3_579_545
    assert pc.get(TMR + 2, 2) == 3_579_545 >> 16
    pc.clock.advance(1200 * SECOND)
    assert pc.get(TMR, 4) == 1201 * 3_579_545 % (1 << 32)


def test_a_change_of_the_timers_highest_bit_sets_its_status_and_may_interrupt() -> None:
    pc = Pc()
    half = -(-(1 << 31) * SECOND // 3_579_545)
    pc.clock.advance(half - 1000)
    assert pc.get(STS) == 0
    pc.clock.advance(2000)
    assert pc.get(STS) == TMR_BIT and not pc.sci and pc.clock.armed == []
    pc.put(STS, TMR_BIT)
    pc.put(EN, TMR_BIT)
    pc.clock.advance(half - 2000)
    assert not pc.sci
    pc.clock.advance(2000)
    assert pc.sci and pc.clock.armed == []
    pc.put(STS, TMR_BIT)
    assert not pc.sci and len(pc.clock.armed) == 1
    pc.put(EN, 0)
    assert pc.clock.armed == []


def test_reset_begins_anew() -> None:
    pc = Pc()
    pc.put(EN, PWRBTN | TMR_BIT)
    pc.pm.press_power_button()
    pc.put(CNT, 5 << 10)
    pc.clock.advance(SECOND)
    pc.pm.reset()
    assert not pc.sci and pc.clock.armed == []
    assert [pc.get(STS, 4), pc.get(CNT), pc.get(TMR, 4)] == [0, 1, 0]


steps = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 11), st.sampled_from([1, 2, 4]), st.none()),
        st.tuples(st.integers(0, 11), st.sampled_from([1, 2, 4]), st.integers(0, (1 << 32) - 1)),
        st.tuples(st.just(-1), st.integers(0, 700 * SECOND), st.none()),
        st.tuples(st.just(-2), st.just(0), st.none()),
    ),
    max_size=30,
)


def drive(pc: Pc, sequence) -> list[object]:
    seen: list[object] = []
    for offset, size, value in sequence:
        if offset == -1:
            pc.clock.sleep(size)
        elif offset == -2:
            pc.pm.press_power_button()
        elif value is None:
            seen.append(pc.pm.read(offset, size))
            assert 0 <= pc.pm.read(offset, size) < 1 << 8 * size
        else:
            pc.pm.write(offset, size, value & (1 << 8 * size) - 1)
        seen += [pc.sci, pc.off.count]
    return seen


@settings(deadline=None)
@given(steps, steps)
def test_a_restored_copy_goes_on_identically(before, after) -> None:
    pc, copy = Pc(), Pc()
    drive(pc, before)
    copy.clock.advance(pc.clock.time - copy.clock.time)
    copy.pm.restore(pc.pm.state())
    assert (copy.pm.state(), copy.sci) == (pc.pm.state(), pc.sci)
    assert copy.clock.armed == pc.clock.armed
    pc.off.count = copy.off.count = 0
    assert drive(pc, after) == drive(copy, after)


def test_a_restored_timer_and_line_go_on_at_another_time_of_the_clock() -> None:
    pc, copy = Pc(), Pc()
    pc.put(EN, PWRBTN)
    pc.pm.press_power_button()
    pc.clock.advance(700 * SECOND)
    copy.clock.advance(12345 * SECOND)
    copy.pm.restore(pc.pm.state())
    assert copy.sci
    assert copy.get(TMR, 4) == pc.get(TMR, 4) == 700 * 3_579_545 % (1 << 32)
    assert copy.get(STS) == pc.get(STS) == PWRBTN | TMR_BIT
    copy.put(STS, TMR_BIT)
    assert copy.get(STS) == PWRBTN
    again = Pc()
    again.pm.restore(copy.pm.state())
    assert again.get(STS) == PWRBTN


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"status": 1 << 16}, {"enable": None}, {"control": -1}, {"elapsed": 1 << 61}],
    ids=str,
)
def test_what_is_no_state_of_it_is_refused_and_changes_nothing(change) -> None:
    pc = Pc()
    before = pc.pm.state()
    with pytest.raises(ConfigError, match="; "):
        pc.pm.restore(before | {"enable": 1} | change)
    assert pc.pm.state() == before


def test_the_button_and_the_guest_from_threads_at_once_leave_the_line_right() -> None:
    pc = Pc()
    pc.put(EN, PWRBTN)

    def press() -> None:
        for _ in range(2000):
            pc.pm.press_power_button()

    threads = [threading.Thread(target=press) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        pc.put(STS, PWRBTN)
    for thread in threads:
        thread.join()
    assert pc.sci == (pc.get(STS) == PWRBTN)
    pc.put(STS, PWRBTN)
    assert not pc.sci
    levels = [level for _, level in pc.pins.log]
    assert levels == [i % 2 == 0 for i in range(len(levels))]
