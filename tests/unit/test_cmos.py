"""The RTC shows the host's time and keeps its own, and interrupts as an MC146818 does."""

import calendar
import threading
import time

import pytest
from fakes import ManualClock, Pins
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError
from vmexit.devices.cmos import Cmos

SECOND, MILLISECOND = 1_000_000_000, 1_000_000
SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
A, B, C, D = 10, 11, 12, 13
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
PF, AF, UF, IRQF = 0x40, 0x20, 0x10, 0x80
NOW = calendar.timegm((2024, 2, 29, 23, 59, 30))
GSI = 8


class Pc:
    """An RTC at its ports. The wall clock goes with the manual clock."""

    def __init__(self, now: float = NOW, **memory: int) -> None:
        self.clock, self.pins = ManualClock(), Pins()
        self.start, self.epoch = self.clock.time, now
        self.cmos = Cmos(self.clock, self.pins.line(GSI), wall=self.wall, **memory)
        self.bus = Bus("port")
        self.bus.attach(0x70, 2, self.cmos)

    def wall(self) -> float:
        return self.epoch + (self.clock.time - self.start) / SECOND

    def get(self, index: int) -> int:
        self.bus.write(0x70, 1, index)
        return self.bus.read(0x71, 1)

    def put(self, index: int, value: int) -> None:
        self.bus.write(0x70, 1, index)
        self.bus.write(0x71, 1, value)

    @property
    def line(self) -> bool:
        return self.pins.levels.get(GSI, False)

    def time(self) -> str:
        """As a guest that uses BCD reads it."""
        c, y, mo, d, h, m, s = (
            self.get(i) for i in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)
        )
        return f"{c:02x}{y:02x}-{mo:02x}-{d:02x} {h:02x}:{m:02x}:{s:02x}"

    def set_time(self, text: str) -> None:
        """As Linux does it (mc146818_set_time), from the same digits."""
        digits = [int(text[i : i + 2], 16) for i in (0, 2, 5, 8, 11, 14, 17)]
        control, divider = self.get(B), self.get(A)
        self.put(B, control | SET)
        self.put(A, divider | 0x70)
        for index, value in zip(
            (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS), digits, strict=True
        ):
            self.put(index, value)
        self.put(B, control)
        self.put(A, divider)


def test_it_shows_the_time_of_the_host_in_utc_and_24_hours_bcd() -> None:
    pc = Pc()
    assert pc.time() == "2024-02-29 23:59:30" and pc.get(WEEKDAY) == 5  # Thursday
    pc.clock.advance(31 * SECOND)
    assert pc.time() == "2024-03-01 00:00:01" and pc.get(WEEKDAY) == 6


def test_registers_have_their_state_after_power_on() -> None:
    pc = Pc()
    assert [pc.get(i) for i in (A, B, C, D)] == [0x26, H24, 0, 0x80]
    assert pc.bus.read(0x70, 1) == 0xFF
    assert pc.clock.armed == []


def test_bit_7_of_the_index_is_not_a_part_of_it() -> None:
    pc = Pc()
    pc.put(0x80 | 0x40, 0x5A)
    assert pc.get(0x40) == 0x5A


@pytest.mark.parametrize(
    ("hour", "bcd", "binary"),
    [(0, 0x12, 12), (1, 0x01, 1), (9, 0x09, 9), (11, 0x11, 11),
     (12, 0x92, 0x8C), (13, 0x81, 0x81), (22, 0x90, 0x8A), (23, 0x91, 0x8B)],
)  # fmt: skip
def test_the_hour_has_the_format_that_register_b_says_both_ways(hour, bcd, binary) -> None:
    pc = Pc(calendar.timegm((2024, 1, 1, hour, 45, 0)))
    assert int(f"{pc.get(HOURS):x}") == hour
    pc.put(B, BINARY | H24)
    assert (pc.get(HOURS), pc.get(MINUTES), pc.get(CENTURY)) == (hour, 45, 20)
    for control, register in ((0, bcd), (BINARY, binary)):
        pc.put(B, control)
        assert pc.get(HOURS) == register
        pc.put(HOURS, 0x05)
        pc.put(HOURS, register)
    pc.put(B, H24 | BINARY)
    assert pc.get(HOURS) == hour


def test_a_time_that_the_guest_sets_goes_on_from_there_half_a_second_later() -> None:
    """The first update comes 500 ms after the divider's release: data sheet, "Divider stages"."""
    pc = Pc()
    pc.set_time("1999-12-31 23:59:58")
    pc.clock.advance(499 * MILLISECOND)
    assert pc.time() == "1999-12-31 23:59:58"
    pc.clock.advance(2 * MILLISECOND)
    assert pc.time() == "1999-12-31 23:59:59"
    pc.clock.advance(SECOND)
    assert pc.time() == "2000-01-01 00:00:00"
    pc.clock.advance(86400 * SECOND)
    assert pc.time() == "2000-01-02 00:00:00"


def test_while_set_is_on_the_time_stands_still_and_the_fraction_goes_on() -> None:
    pc = Pc(NOW + 0.3)
    pc.put(B, SET | H24 | UIE)
    assert pc.get(B) == SET | H24  # SET clears UIE
    pc.clock.advance(10 * SECOND)
    assert pc.time() == "2024-02-29 23:59:30"
    assert pc.get(C) & UF == 0
    pc.put(SECONDS, 0x10)
    assert pc.get(SECONDS) == 0x10
    pc.put(B, H24)
    pc.clock.advance(699 * MILLISECOND)
    assert pc.get(SECONDS) == 0x10
    pc.clock.advance(2 * MILLISECOND)
    assert pc.get(SECONDS) == 0x11


def test_one_field_set_while_it_runs_changes_that_field() -> None:
    pc = Pc()
    pc.put(MINUTES, 0x07)
    assert pc.time() == "2024-02-29 23:07:30"
    pc.put(YEAR, 0x23)  # which has no such day
    assert pc.time() == "2023-02-28 23:07:30"


def test_such_a_change_keeps_the_fraction_of_the_second() -> None:
    pc = Pc(NOW + 0.3)
    pc.put(SECONDS, 0x10)
    pc.clock.advance(699 * MILLISECOND)
    assert pc.get(SECONDS) == 0x10
    pc.clock.advance(2 * MILLISECOND)
    assert pc.get(SECONDS) == 0x11


def test_what_cannot_be_a_time_becomes_the_nearest_one() -> None:
    pc = Pc()
    pc.set_time("20ff-ff-ff ff:ff:ff")
    assert pc.time() == "2099-12-31 23:59:59"
    pc.set_time("2000-00-00 00:00:00")
    assert pc.time() == "2000-01-01 00:00:00"


def test_registers_c_and_d_cannot_be_written() -> None:
    pc = Pc()
    pc.put(A, 0x20)
    pc.get(C)
    for index in (C, D):
        pc.put(index, 0x7F)
    assert [pc.get(C), pc.get(D)] == [0, 0x80]


def test_the_weekday_is_the_guests_to_choose() -> None:
    pc = Pc()
    pc.put(WEEKDAY, 1)
    assert pc.time() == "2024-02-29 23:59:30" and pc.get(WEEKDAY) == 1
    pc.clock.advance(30 * SECOND)
    assert pc.get(WEEKDAY) == 2


@pytest.mark.parametrize("control", [0, BINARY, H24, BINARY | H24])
@given(values=st.lists(st.integers(0, 255), min_size=8, max_size=8), days=st.integers(0, 5000000))
@settings(deadline=None, max_examples=60)
def test_whatever_is_set_it_goes_on_with_some_valid_time(control, values, days) -> None:
    pc = Pc()
    pc.put(B, SET | control)
    for index, value in zip(
        (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY), values, strict=True
    ):
        pc.put(index, value)
        assert pc.get(index) == value
    pc.put(B, H24 | AIE | UIE)
    pc.clock.time += days * 86400 * SECOND
    pc.clock.fire()
    text = pc.time()
    year, month, day = (int(part) for part in text[:10].split("-"))
    assert year >= 1 and 1 <= month <= 12 and 1 <= day <= 31
    assert int(text[11:13]) < 24 and int(text[14:16]) < 60 and int(text[17:]) < 60
    assert 1 <= pc.get(WEEKDAY) <= 7


def test_after_the_last_day_comes_the_first() -> None:
    pc = Pc()
    pc.set_time("9999-12-31 23:59:59")
    pc.put(B, H24 | UIE | AIE)
    pc.clock.advance(SECOND)
    assert pc.time() == "0001-01-01 00:00:00"


def test_uip_is_set_for_244_microseconds_before_an_update_and_the_time_stays_until_then() -> None:
    pc = Pc()
    pc.clock.advance(SECOND - 250_000)
    assert pc.get(A) == 0x26
    pc.clock.advance(10_000)
    assert pc.get(A) == 0xA6 and pc.get(SECONDS) == 0x30
    pc.put(B, SET | H24)
    assert pc.get(A) == 0x26
    pc.put(B, H24)
    pc.clock.advance(241_000)
    assert pc.get(A) == 0x26 and pc.get(SECONDS) == 0x31
    pc.put(A, 0xA6)
    assert pc.get(A) == 0x26  # it is read-only


# Interrupts.


def test_an_update_interrupt_comes_with_each_second_and_reading_c_ends_it() -> None:
    pc = Pc(NOW + 0.25)
    pc.put(B, H24 | UIE)
    for _ in range(3):
        pc.clock.advance(749 * MILLISECOND)
        assert not pc.line
        pc.clock.advance(2 * MILLISECOND)
        assert pc.line and pc.clock.armed == []
        assert pc.get(C) == IRQF | UF | PF and not pc.line
        pc.clock.advance(249 * MILLISECOND)
    assert pc.get(C) & IRQF == 0
    pc.put(B, H24)
    assert pc.clock.armed == []


def test_the_flags_are_set_without_their_interrupts_too() -> None:
    pc = Pc()
    pc.put(A, 0x20)
    for index, value in ((1, 0x31), (3, 0x59), (5, 0x23)):
        pc.put(index, value)
    pc.get(C)
    assert pc.get(C) == 0
    pc.clock.advance(SECOND)
    assert pc.get(C) == UF | AF
    pc.clock.advance(SECOND)
    assert pc.get(C) == UF
    assert not pc.line and pc.pins.edges == 0


def test_an_interrupt_that_is_enabled_after_its_flag_comes_at_once() -> None:
    pc = Pc()
    pc.clock.advance(SECOND)
    pc.put(B, H24 | UIE)
    assert pc.line
    pc.put(B, H24)
    assert not pc.line and pc.get(C) & UF


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x35, 0x59, 0x23), 5),
        ((0x30, 0x59, 0x23), 86400),
        ((0xFF, 0x00, 0x00), 30),
        ((0x10, 0xC0, 0xFF), 40),
        ((0xFF, 0xFF, 0xFF), 1),
        ((0x29, 0x59, 0xFF), 3599),
        ((0x00, 0xFF, 0x07), 30 + 7 * 3600),
        ((0x15, 0x30, 0x12), 30 + 12 * 3600 + 30 * 60 + 15),
    ],
)
def test_the_alarm_comes_when_all_fields_that_count_are_equal(alarm, seconds) -> None:
    pc = Pc(NOW + 0.5)
    for index, value in zip((1, 3, 5), alarm, strict=True):
        pc.put(index, value)
    pc.put(B, H24 | AIE)
    pc.clock.advance(seconds * SECOND - SECOND // 2 - MILLISECOND)
    assert not pc.line
    pc.clock.advance(2 * MILLISECOND)
    assert pc.line and pc.get(C) & (IRQF | AF) == IRQF | AF
    assert not pc.line


@pytest.mark.parametrize("alarm", [(0x61, 0xFF, 0xFF), (0xFF, 0x7A, 0xFF), (0xFF, 0xFF, 0x24)])
def test_an_alarm_that_cannot_be_never_comes_and_costs_nothing(alarm) -> None:
    pc = Pc()
    for index, value in zip((1, 3, 5), alarm, strict=True):
        pc.put(index, value)
    pc.put(B, H24 | AIE)
    assert pc.clock.armed == []
    pc.clock.advance(3 * 86400 * SECOND)
    assert not pc.line


def test_an_alarm_in_12_hours() -> None:
    pc = Pc(calendar.timegm((2024, 1, 1, 12, 59, 59)))
    pc.put(B, AIE)
    for index, value in ((1, 0), (3, 0), (5, 0x81)):
        pc.put(index, value)
    pc.clock.advance(SECOND)
    assert pc.line
    pc.get(C)
    for hour in (0x13, 0x00, 0x93):  # none of the twelve
        pc.put(5, hour)
        pc.clock.advance(86400 * SECOND)
        assert not pc.line


def test_waiting_for_an_alarm_wakes_the_host_once_a_minute_at_most() -> None:
    pc = Pc()
    for index, value in ((1, 0), (3, 0), (5, 0x12)):
        pc.put(index, value)
    pc.put(B, H24 | AIE)
    calls = pc.clock.calls
    pc.clock.advance(3600 * SECOND)
    assert pc.clock.calls - calls <= 60 and not pc.line


def test_an_alarm_follows_a_host_whose_clock_is_set() -> None:
    pc = Pc()
    for index, value in ((1, 0), (3, 0), (5, 0x12)):
        pc.put(index, value)
    pc.put(B, H24 | AIE)
    pc.epoch += 12 * 3600 + 60
    pc.clock.advance(61 * SECOND)
    assert pc.line


@pytest.mark.parametrize(
    ("rate", "hz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (8, 256), (13, 8), (15, 2)]
)
def test_the_periodic_interrupt_has_the_rate_that_register_a_says(rate, hz) -> None:
    pc = Pc()
    pc.put(A, 0x20 | rate)
    pc.get(C)
    pc.put(B, H24 | PIE)
    count = 0
    for _ in range(4096):
        pc.clock.advance(SECOND // 4096 * 4)
        if hz <= 1024:
            assert pc.pins.edges <= count + 1
        if pc.line:
            assert pc.get(C) & (IRQF | PF) == IRQF | PF
            count += 1
    assert count == pytest.approx(4 * min(hz, 1024), abs=1)


def test_a_periodic_interrupt_that_nobody_answers_comes_once_and_needs_no_timer() -> None:
    pc = Pc()
    pc.put(A, 0x23)
    pc.put(B, H24 | PIE)
    calls = pc.clock.calls
    pc.clock.advance(100 * SECOND)
    assert pc.line and pc.pins.edges == 1 and pc.clock.calls <= calls + 1
    pc.put(A, 0x20)
    pc.get(C)
    assert not pc.line and pc.clock.armed == []


def test_reset_ends_interrupts_and_keeps_time_and_memory() -> None:
    pc = Pc()
    pc.set_time("2001-02-03 04:05:06")
    pc.put(0x40, 0x77)
    pc.put(B, H24 | UIE | PIE | AIE)
    pc.clock.advance(2 * SECOND)
    assert pc.line
    pc.cmos.reset()
    assert not pc.line and pc.clock.armed == []
    assert pc.get(B) == H24 and pc.get(C) == 0 and pc.get(0x40) == 0x77
    assert pc.time() == "2001-02-03 04:05:08"


MB, GB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("low", "high", "base", "extended", "above_16m", "above_4g"),
    [
        (0, 0, 0, 0, 0, 0),
        (512 << 10, 0, 512, 0, 0, 0),
        (2 * MB, 0, 640, 1024, 0, 0),
        (128 * MB, 0, 640, 0xFFFF, 112 * 16, 0),
        (3 * GB, 5 * GB, 640, 0xFFFF, (3072 - 16) * 16, 5 * 1024 * 16),
        (1 << 40, 1 << 60, 640, 0xFFFF, 0xFFFF, 0xFFFFFF),
    ],
)
def test_the_memory_sizes_stand_where_firmware_looks(
    low, high, base, extended, above_16m, above_4g
) -> None:
    pc = Pc(low_memory=low, high_memory=high)

    def number(*indexes: int) -> int:
        return sum(pc.get(index) << 8 * i for i, index in enumerate(indexes))

    assert number(0x15, 0x16) == base
    assert number(0x17, 0x18) == number(0x30, 0x31) == extended
    assert number(0x34, 0x35) == above_16m
    assert number(0x5B, 0x5C, 0x5D) == above_4g


# State.

steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 127), st.integers(0, 255)),
        st.tuples(st.just("put"), st.sampled_from([A, B, 1, 3, 5]), st.integers(0, 255)),
        st.tuples(st.just("put"), st.just(A), st.integers(0x20, 0x2F)),
        st.tuples(st.just("get"), st.sampled_from([*range(14), CENTURY]), st.just(0)),
        st.tuples(st.just("wait"), st.integers(0, 3 * SECOND), st.just(0)),
    ),
    max_size=30,
)


def drive(pc: Pc, sequence) -> list[object]:
    seen: list[object] = []
    for what, where, value in sequence:
        if what == "put":
            pc.put(where, value)
        elif what == "get":
            seen.append(pc.get(where))
        else:
            pc.clock.sleep(where)
        seen.append(pc.line)
        assert all(deadline > pc.clock.time for deadline in pc.clock.armed)
    return seen


@settings(deadline=None)
@given(steps, steps)
def test_a_restored_copy_goes_on_identically(before, after) -> None:
    pc, copy = Pc(), Pc(low_memory=MB)
    drive(pc, before)
    copy.clock.advance(pc.clock.time - copy.clock.time)
    copy.cmos.restore(pc.cmos.state())
    assert (copy.cmos.state(), copy.clock.armed) == (pc.cmos.state(), pc.clock.armed)
    assert drive(pc, after) == drive(copy, after)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"index": 128}, {"ram": bytes(127)}, {"ram": "x"}, {"offset": -1},
     {"offset": 1 << 70}, {"weekday_shift": 7}, {"weekday_shift": None}],
    ids=str,
)  # fmt: skip
def test_what_is_no_state_of_it_is_refused_and_changes_nothing(change) -> None:
    pc = Pc()
    before = pc.cmos.state()
    with pytest.raises(ConfigError, match="; "):
        pc.cmos.restore(before | {"index": 5} | change)
    assert pc.cmos.state() == before


def test_accesses_from_threads_never_raise() -> None:
    pc = Pc()
    errors: list[BaseException] = []

    def vcpu(seed: int) -> None:
        try:
            for i in range(2000):
                pc.put((i * 7 + seed) % 14, i * 31 & 0xFF)
                pc.get((i + seed) % 14)
                if i % 300 == 0:
                    pc.cmos.restore(pc.cmos.state())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=vcpu, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        pc.clock.advance(10 * MILLISECOND)
        time.sleep(0)  # the others' turn: else each of theirs waits for the switch interval
    assert errors == []
