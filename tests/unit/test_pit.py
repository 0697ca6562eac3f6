"""The 8254 counts, outputs and interrupts as its data sheet says, at 1193182 Hz of the clock."""

import threading
import time

import pytest
from fakes import ManualClock, Pins
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError
from vmexit.devices.pit import Pit

HZ = 1_193_182
COUNTER, CONTROL, PORT61 = 0x40, 0x43, 0x61
LATCH, LSB, MSB, BOTH = 0x00, 0x10, 0x20, 0x30
SECOND, MILLISECOND = 1_000_000_000, 1_000_000


class Pc:
    """A PIT at its ports. The clock advances by whole ticks, to a moment just behind each."""

    def __init__(self) -> None:
        self.clock, self.pins = ManualClock(SECOND), Pins()
        self.pit = Pit(self.clock, self.pins.line(0))
        self.bus = Bus("port")
        self.bus.attach(COUNTER, 4, self.pit)
        self.bus.attach(PORT61, 1, self.pit.port61)
        self.ticks = HZ
        self.step(0)

    def out(self, port: int, value: int) -> None:
        self.bus.write(port, 1, value)

    def get(self, port: int) -> int:
        return self.bus.read(port, 1)

    def step(self, ticks: int = 1) -> None:
        self.ticks += ticks
        self.clock.advance(-(-self.ticks * SECOND // HZ) - self.clock.time)

    def program(self, which: int, mode: int, count: int, *, bcd: bool = False) -> None:
        self.out(CONTROL, which << 6 | BOTH | mode << 1 | bcd)
        self.set(which, count)

    def set(self, which: int, count: int) -> None:
        self.out(COUNTER + which, count & 0xFF)
        self.out(COUNTER + which, count >> 8)

    def count(self, which: int) -> int:
        self.out(CONTROL, which << 6 | LATCH)
        return self.get(COUNTER + which) | self.get(COUNTER + which) << 8

    def status(self, which: int) -> int:
        self.out(CONTROL, 0xE0 | 2 << which)
        return self.get(COUNTER + which)

    def level(self, which: int) -> bool:
        return self.status(which) & 0x80 != 0

    def trace(self, which: int, ticks: int) -> str:
        """OUT at each of the ticks that come."""
        levels = ""
        for _ in range(ticks):
            self.step()
            levels += "-" if self.level(which) else "_"
        return levels

    def gate(self, level: int) -> None:
        """The gate of counter 2."""
        self.out(PORT61, level)


def gated() -> Pc:
    pc = Pc()
    pc.gate(1)
    return pc


# The waveforms of the data sheet, figures 15 to 20: one sign a tick, the first for the tick with
# which the count is loaded.


@pytest.mark.parametrize(
    ("mode", "count", "levels"),
    [
        (0, 4, "____" + "-" * 6),
        (2, 3, "--_--_--_-"),
        (2, 4, "---_---_--"),
        (3, 4, "--__--__--"),
        (3, 5, "---__---__"),
        (3, 2, "-_-_-_-_-_"),
        (4, 3, "---_------"),
        (6, 3, "--_--_--_-"),
        (7, 4, "--__--__--"),
    ],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_output_has_the_form_that_belongs_to_the_mode(which, mode, count, levels) -> None:
    pc = gated()
    pc.out(CONTROL, which << 6 | BOTH | mode << 1)
    assert pc.level(which) == (mode != 0)
    pc.set(which, count)
    assert pc.level(which) == (mode != 0)
    assert pc.trace(which, 10) == levels


@pytest.mark.parametrize(("mode", "levels"), [(1, "___-------"), (5, "---_------")])
def test_modes_1_and_5_wait_for_a_rising_gate_and_begin_again_with_each(mode, levels) -> None:
    pc = gated()
    pc.program(2, mode, 3)
    assert pc.trace(2, 8) == "-" * 8
    for _ in range(2):
        pc.gate(0)
        pc.gate(1)
        assert pc.trace(2, 10) == levels
    for _ in range(2):
        pc.gate(0)
        pc.gate(1)
        assert pc.trace(2, 2) == levels[:2]
    pc.set(2, 5)  # for the next trigger
    assert pc.trace(2, 8) == levels[2:]
    pc.gate(0)
    assert pc.trace(2, 2) == "--"
    pc.gate(1)
    assert pc.trace(2, 8) == levels[0] * 5 + levels[3:6]


@pytest.mark.parametrize("mode", [1, 2, 3, 5])
def test_a_trigger_without_a_count_starts_nothing(mode) -> None:
    pc = Pc()
    pc.out(CONTROL, 0xB0 | mode << 1)
    pc.gate(1)
    assert pc.trace(2, 3) == "---"
    assert pc.status(2) & 0x40


def test_the_gate_stops_mode_0_where_it_is() -> None:
    pc = gated()
    pc.program(2, 0, 6)
    pc.step(3)
    pc.gate(0)
    assert pc.trace(2, 9) == "_" * 9 and pc.count(2) == 4
    pc.gate(1)
    assert pc.trace(2, 6) == "___---"
    pc.gate(0)
    assert pc.trace(2, 2) == "--"
    pc.program(2, 0, 3)
    assert pc.trace(2, 5) == "_____" and pc.count(2) == 3
    pc.gate(1)
    assert pc.trace(2, 4) == "__--"
    pc.set(2, 3)
    pc.gate(0)  # before it is loaded
    pc.step(3)
    assert pc.count(2) == 3
    pc.gate(1)
    assert pc.trace(2, 4) == "__--"


@pytest.mark.parametrize(("mode", "levels"), [(2, "---_---_"), (3, "--__--__")])
def test_the_gate_of_modes_2_and_3_holds_the_output_high_and_begins_a_period(mode, levels) -> None:
    pc = gated()
    pc.program(2, mode, 4)
    assert pc.trace(2, 4) == levels[:4]
    pc.step(3)
    pc.gate(0)
    assert pc.trace(2, 5) == "-----"
    pc.gate(1)
    assert pc.trace(2, 8) == levels
    pc.gate(0)
    pc.set(2, 2)
    pc.step(3)
    pc.gate(1)
    assert pc.trace(2, 4) == "-_-_"


def test_in_mode_0_the_first_of_two_bytes_stops_it_and_lowers_the_output() -> None:
    pc = Pc()
    pc.program(0, 0, 2)
    assert pc.trace(0, 4) == "__--"
    pc.out(COUNTER, 2)
    assert not pc.level(0)
    assert pc.trace(0, 4) == "____"
    pc.out(COUNTER, 0)
    assert pc.trace(0, 4) == "__--"


def test_in_mode_4_a_new_count_is_loaded_at_once() -> None:
    pc = Pc()
    pc.program(0, 4, 5)
    pc.step(3)
    pc.set(0, 2)
    assert pc.trace(0, 5) == "--_--"


def test_in_mode_2_a_new_count_is_loaded_at_the_end_of_the_period() -> None:
    pc = Pc()
    pc.program(0, 2, 5)
    pc.step(7)
    pc.set(0, 7)
    pc.set(0, 3)  # the last one counts
    assert pc.status(0) & 0x40
    assert pc.trace(0, 10) == "--_" + "--_--_-"
    assert not pc.status(0) & 0x40


@pytest.mark.parametrize(("at", "levels"), [(2, "--" + "___---___"), (6, "__" + "---___---")])
def test_in_mode_3_a_new_count_is_loaded_at_the_end_of_the_half(at, levels) -> None:
    pc = Pc()
    pc.program(0, 3, 8)
    pc.step(8 + at)
    pc.set(0, 6)
    assert pc.trace(0, 11) == levels


@pytest.mark.parametrize(
    ("mode", "count", "counts"),
    [
        (0, 3, [3, 2, 1, 0, 0xFFFF, 0xFFFE]),
        (4, 2, [2, 1, 0, 0xFFFF]),
        (2, 3, [3, 2, 1, 3, 2, 1, 3]),
        (3, 4, [4, 2, 4, 2, 4, 2]),
        (3, 5, [4, 2, 0, 4, 2, 4, 2, 0, 4, 2]),
        (0, 0, [0, 0xFFFF, 0xFFFE]),
        (2, 0, [0, 0xFFFF, 0xFFFE]),
    ],
)
def test_the_count_goes_down_as_the_mode_says(mode, count, counts) -> None:
    pc = Pc()
    pc.program(0, mode, count)
    for expected in counts:
        pc.step()
        assert pc.count(0) == expected


@pytest.mark.parametrize(("mode", "after"), [(0, 0xFFFF), (2, 1)])
def test_0_is_65536(mode, after) -> None:
    pc = Pc()
    pc.program(0, mode, 0)
    pc.step(65536 + (mode == 0) + 1 - (mode == 2))
    assert pc.count(0) == after
    assert pc.level(0) == (mode == 0)


def test_in_bcd_it_counts_decimal_digits_and_0_is_10000() -> None:
    pc = Pc()
    pc.program(0, 0, 0x1000, bcd=True)
    pc.step(2)
    assert pc.count(0) == 0x0999
    pc.step(1000)
    assert pc.count(0) == 0x9999
    pc.program(0, 2, 0, bcd=True)
    pc.step(1)
    assert pc.count(0) == 0
    pc.step(10000)
    assert pc.count(0) == 0
    pc.step(1)
    assert pc.count(0) == 0x9999
    pc.program(0, 0, 0xFFFF, bcd=True)  # no digits; it must only stay bounded
    pc.step(1)
    assert pc.count(0) == 0


def test_the_access_mode_says_which_bytes_are_written_and_read() -> None:
    pc = Pc()
    pc.out(CONTROL, LSB | 2 << 1)
    pc.out(COUNTER, 0x80)
    pc.step()
    assert pc.get(COUNTER) == 0x80
    pc.step()
    assert [pc.get(COUNTER) for _ in range(2)] == [0x7F, 0x7F]
    pc.out(CONTROL, MSB | 2 << 1)
    pc.out(COUNTER, 0x12)
    pc.step(2)
    assert [pc.get(COUNTER) for _ in range(2)] == [0x11, 0x11]
    pc.program(0, 2, 0x1234)
    pc.step()
    assert [pc.get(COUNTER) for _ in range(3)] == [0x34, 0x12, 0x34]
    assert pc.get(CONTROL) == 0xFF


def test_a_latched_count_stays_until_it_is_read_or_the_counter_is_programmed() -> None:
    pc = Pc()
    pc.program(0, 2, 0x1234)
    pc.step()
    pc.out(CONTROL, LATCH)
    pc.step(0x35)
    pc.out(CONTROL, LATCH)  # ignored
    assert [pc.get(COUNTER) for _ in range(2)] == [0x34, 0x12]
    assert [pc.get(COUNTER) for _ in range(2)] == [0xFF, 0x11]
    pc.out(CONTROL, LATCH)
    pc.program(0, 2, 0x2222)
    pc.step()
    assert [pc.get(COUNTER) for _ in range(2)] == [0x22, 0x22]


def test_read_back_latches_count_and_status_of_the_counters_chosen() -> None:
    """Data sheet, figure 14."""
    pc = gated()
    for which, mode in enumerate((0, 2, 3)):
        pc.program(which, mode, 0x0203)
    pc.step()
    pc.out(CONTROL, 0xC0 | 2 << 0 | 2 << 1)
    pc.step(3)
    pc.out(CONTROL, 0xE0 | 2 << 1)  # ignored: the status is latched
    assert [pc.get(COUNTER) for _ in range(4)] == [0x30, 0x03, 0x02, 0x00]
    assert [pc.get(COUNTER + 1) for _ in range(3)] == [0xB4, 0x03, 0x02]
    assert pc.get(COUNTER + 1) == 0x00
    pc.out(CONTROL, 0xD0 | 2 << 2)  # count only
    assert [pc.get(COUNTER + 2) for _ in range(2)] == [0xFC, 0x01]


def test_the_status_shows_the_control_word_and_that_a_count_is_not_loaded_yet() -> None:
    pc = Pc()
    pc.out(CONTROL, LSB | 4 << 1 | 1)
    assert pc.status(0) == 0x80 | 0x40 | LSB | 4 << 1 | 1
    pc.out(COUNTER, 9)
    assert pc.status(0) & 0x40
    pc.step()
    assert pc.status(0) == 0x80 | LSB | 4 << 1 | 1


def test_a_latched_status_stays_until_it_is_read() -> None:
    pc = Pc()
    pc.program(0, 0, 2)
    pc.out(CONTROL, 0xE2)
    pc.step(10)
    pc.out(CONTROL, 0xE2)  # ignored
    assert [pc.get(COUNTER), pc.status(0)] == [0x70, 0xB0]


def test_port_61_has_the_gate_the_output_and_a_bit_that_toggles_at_each_refresh() -> None:
    pc = Pc()
    assert pc.get(PORT61) & ~0x10 == 0x00
    pc.out(PORT61, 0xFF)
    assert pc.get(PORT61) & ~0x10 == 0x0F
    pc.program(2, 3, 4)
    assert [pc.get(PORT61) >> 5 & 1 for _ in range(5) if pc.step() is None] == [1, 1, 0, 0, 1]
    pc.out(PORT61, 0x00)
    toggles = 0
    before = pc.get(PORT61) & 0x10
    for _ in range(1800):
        pc.step()
        toggles += pc.get(PORT61) & 0x10 != before
        before = pc.get(PORT61) & 0x10
    assert toggles == 100


# Interrupts.


def edges(pc: Pc, nanoseconds: int) -> int:
    before = pc.pins.edges
    pc.clock.advance(nanoseconds)
    return pc.pins.edges - before


@pytest.mark.parametrize("mode", [2, 3])
def test_a_periodic_counter_interrupts_once_a_period_and_keeps_its_phase(mode) -> None:
    pc = Pc()
    pc.program(0, mode, 1193)
    assert edges(pc, 10 * SECOND) == 10 * HZ // 1193
    assert pc.clock.armed[0] == -(-(HZ + 1 + (10 * HZ // 1193 + 1) * 1193) * SECOND // HZ)


def test_0_gives_the_18_2_interrupts_a_second_of_dos() -> None:
    pc = Pc()
    pc.program(0, 3, 0)
    assert edges(pc, 3600 * SECOND) == 65543


@pytest.mark.parametrize(("mode", "ticks"), [(0, 1001), (4, 1002)])
def test_a_one_shot_counter_interrupts_once(mode, ticks) -> None:
    pc = Pc()
    pc.out(CONTROL, BOTH | mode << 1)
    assert pc.clock.armed == []
    before = pc.pins.edges
    pc.set(0, 1000)
    pc.step(ticks - 1)
    assert pc.pins.edges == before
    pc.step()
    assert pc.pins.edges == before + 1
    assert edges(pc, SECOND) == 0 and pc.clock.armed == []
    pc.set(0, 1000)
    assert edges(pc, SECOND) == 1


@pytest.mark.parametrize("mode", [1, 5])
def test_modes_that_need_a_trigger_never_interrupt_as_the_gate_is_always_high(mode) -> None:
    pc = Pc()
    pc.program(0, mode, 100)
    assert edges(pc, SECOND) == 0 and pc.clock.armed == []


def test_a_control_word_that_raises_the_output_is_an_edge_and_one_that_lowers_it_ends_it() -> None:
    pc = Pc()
    assert pc.pins.levels[0] is False
    pc.out(CONTROL, BOTH | 2 << 1)
    assert pc.pins.levels[0] is True
    pc.out(CONTROL, BOTH)
    assert pc.pins.levels[0] is False and pc.pins.edges == 1


def test_a_late_host_gives_one_interrupt_for_all_that_were_due_and_the_next_is_in_phase() -> None:
    pc = Pc()
    pc.program(0, 2, 11932)
    edges(pc, SECOND)
    before = pc.pins.edges
    pc.clock.sleep(25 * SECOND)
    assert pc.pins.edges == before + 1
    (deadline,) = pc.clock.armed
    assert deadline > pc.clock.time
    assert (deadline * HZ // SECOND - (HZ + 1)) % 11932 == 0
    assert edges(pc, SECOND) in (99, 100)


@pytest.mark.parametrize("count", [1, 2, 3, 50, 119])
@pytest.mark.parametrize("mode", [2, 3])
def test_no_count_makes_the_host_call_more_often_than_each_100_microseconds(mode, count) -> None:
    pc = Pc()
    pc.program(0, mode, count)
    before = pc.clock.calls
    assert 900 <= edges(pc, 100 * MILLISECOND) <= 1000
    assert pc.clock.calls - before <= 1000


def test_what_was_due_before_a_new_count_comes_is_not_lost() -> None:
    pc = Pc()
    pc.program(0, 0, 100)
    before = pc.pins.edges
    pc.clock.time += MILLISECOND  # and the host did not call
    pc.set(0, 5000)
    assert pc.pins.edges == before + 1
    assert pc.pins.levels[0] is False
    assert edges(pc, SECOND) == 1


def test_a_new_count_in_mode_3_moves_the_edge_that_comes() -> None:
    pc = Pc()
    pc.program(0, 3, 1000)
    pc.step(100)
    pc.set(0, 600)
    before = pc.pins.edges
    pc.step(700)  # tick 799: after half of the old and, but for one, half of the new
    assert pc.pins.edges == before
    pc.step()
    assert pc.pins.edges == before + 1
    for _ in range(5):
        pc.step(599)
        before = pc.pins.edges
        pc.step()
        assert pc.pins.edges == before + 1


@pytest.mark.parametrize(("mode", "at"), [(2, 100), (2, 900), (3, 900)])
def test_a_new_count_that_waits_for_the_end_of_the_period_leaves_its_edge_where_it_is(
    mode, at
) -> None:
    pc = Pc()
    pc.program(0, mode, 1000)
    pc.step(at)
    pc.set(0, 600)
    before = pc.pins.edges
    pc.step(1000 - at)
    assert pc.pins.edges == before
    pc.step()
    assert pc.pins.edges == before + 1
    pc.step(599)
    assert pc.pins.edges == before + 1
    pc.step()
    assert pc.pins.edges == before + 2


def test_counters_1_and_2_need_no_host_timer() -> None:
    pc = gated()
    for which in (1, 2):
        pc.program(which, 2, 100)
    assert pc.clock.armed == []


def test_reset_stops_all() -> None:
    pc = gated()
    for which in range(3):
        pc.program(which, 2, 1000)
    pc.step(10)
    pc.pit.reset()
    assert pc.clock.armed == [] and pc.pins.levels[0] is False
    assert pc.get(PORT61) & ~0x10 == 0x00
    fresh = Pc()
    fresh.step(10)
    assert pc.pit.state() == fresh.pit.state()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("out"), st.integers(0, 4), st.integers(0, 255)),
        st.tuples(st.just("out"), st.just(3), st.builds(
            lambda c, a, m: c << 6 | a << 4 | m, st.integers(0, 3), st.integers(0, 3),
            st.integers(0, 15))),
        st.tuples(st.just("out"), st.just(4), st.integers(0, 1)),
        st.tuples(st.just("in"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("step"), st.integers(0, 600), st.just(0)),
    ),
    max_size=60,
)  # fmt: skip


def drive(pc: Pc, sequence) -> list[object]:
    seen: list[object] = []
    for what, where, value in sequence:
        if what == "out":
            pc.pit.write(where, 1, value)
        elif what == "in":
            seen.append(pc.pit.read(where, 1))
            assert 0 <= pc.pit.read(where, 1) <= 0xFF
        else:
            pc.step(where)
        seen.append((pc.pins.levels[0], pc.clock.armed))
        assert len(pc.clock.armed) <= 1
    return seen


@settings(deadline=None)
@given(steps, steps)
def test_a_restored_copy_goes_on_identically(before, after) -> None:
    pc, copy = Pc(), Pc()
    drive(pc, before)
    copy.step(pc.ticks - copy.ticks)
    drive(copy, [s for s in before[:5] if s[0] == "out"])
    copy.pit.restore(pc.pit.state())
    assert copy.pit.state() == pc.pit.state()
    assert copy.clock.armed == pc.clock.armed
    one, other = drive(pc, after), drive(copy, after)
    assert [s for s in one if isinstance(s, int)] == [s for s in other if isinstance(s, int)]
    assert pc.pit.state() == copy.pit.state()


def test_a_restored_timer_goes_on_at_another_time_of_the_clock() -> None:
    pc, copy = Pc(), Pc()
    pc.program(0, 2, 11932)
    pc.step(5000)
    copy.step(777_777_777)
    copy.pit.restore(pc.pit.state())
    (deadline,) = copy.clock.armed
    ticks = (deadline - copy.clock.time) * HZ / SECOND
    assert 11932 - 5000 - 1 <= ticks <= 11932 - 5000 + 2
    assert edges(copy, SECOND) == 100


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"port61": 0x10}, {"counter1": None}]
    + [{"counter0": {name: value}} for name, value in (
        ("count", 0), ("count", 65537), ("held", 3), ("control", 0), ("next", 0), ("switch", 5),
        ("rise", 1 << 40), ("elapsed", 1 << 60), ("elapsed", None), ("latch", "x"), ("gate", 2))],
    ids=str,
)  # fmt: skip
def test_what_is_no_state_of_it_is_refused_and_changes_nothing(change) -> None:
    pc = Pc()
    pc.program(0, 2, 1000)
    pc.step(5)
    before = pc.pit.state()
    broken = dict(before)
    for key, value in change.items():
        broken[key] = before[key] | value if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match="; "):
        pc.pit.restore(broken)
    assert pc.pit.state() == before


def test_random_accesses_from_threads_never_raise() -> None:
    pc = Pc()
    errors: list[BaseException] = []

    def vcpu(seed: int) -> None:
        try:
            for i in range(3000):
                where = (i * 7 + seed) % 5
                if i % 3:
                    pc.pit.write(where, 1, i * 31 + seed & 0xFF)
                else:
                    pc.pit.read(where, 1)
                if i % 500 == 0:
                    pc.pit.restore(pc.pit.state())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=vcpu, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        pc.clock.advance(MILLISECOND)
        time.sleep(0)  # the others' turn: else each of theirs waits for the switch interval
    assert errors == []
