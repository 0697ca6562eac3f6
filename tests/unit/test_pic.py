"""The pair of 8259A answers as the data sheet says, driven as the code of a guest drives it."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError
from vmexit.devices.pic import PicPair

MASTER, SLAVE, ELCR = 0x20, 0xA0, 0x4D0
EOI, ROTATE_EOI, SPECIFIC, ROTATE_SPECIFIC, SET_PRIORITY = 0x20, 0xA0, 0x60, 0xE0, 0xC0
READ_IRR, READ_ISR, POLL, SMM_ON, SMM_OFF = 0x0A, 0x0B, 0x0C, 0x68, 0x48
BASE = {MASTER: 0x30, SLAVE: 0x38}


class Pc:
    """Two chips at their ports, and a processor that notes each change of INTR."""

    def __init__(self, *, icw4: int = 1, slave_icw4: int = 1, initialize: bool = True) -> None:
        self.intr: list[bool] = []
        self.pic = PicPair(threading.RLock(), self.changed)
        self.bus = Bus("port")
        self.bus.attach(MASTER, 2, self.pic.master)
        self.bus.attach(SLAVE, 2, self.pic.slave)
        self.bus.attach(ELCR, 2, self.pic.elcr)
        if initialize:
            self.initialize(MASTER, 4, icw4)
            self.initialize(SLAVE, 2, slave_icw4)

    def changed(self) -> None:
        self.intr.append(self.pic.pending())

    def initialize(self, chip: int, icw3: int, icw4: int) -> None:
        self.out(chip, 0x11)
        for icw in (BASE[chip], icw3, icw4):
            self.out(chip + 1, icw)

    def out(self, port: int, value: int) -> None:
        self.bus.write(port, 1, value)

    def get(self, port: int) -> int:
        return self.bus.read(port, 1)

    def irr(self, chip: int = MASTER) -> int:
        self.out(chip, READ_IRR)
        return self.get(chip)

    def isr(self, chip: int = MASTER) -> int:
        self.out(chip, READ_ISR)
        return self.get(chip)

    def pulse(self, *pins: int) -> None:
        for pin in pins:
            self.pic.set_level(pin, True)
            self.pic.set_level(pin, False)

    def take(self) -> int | None:
        """The number of the interrupt that the processor takes, if any."""
        return self.pic.acknowledge() - 0x30 if self.pic.pending() else None

    def eoi(self, pin: int) -> None:
        if pin >= 8:
            self.out(SLAVE, EOI)
        self.out(MASTER, EOI)

    def served(self) -> Iterator[int]:
        """Serves all that come, one after the other."""
        while (pin := self.take()) is not None:
            yield pin
            self.eoi(pin)


PINS = [pin for pin in range(16) if pin != 2]


@pytest.mark.parametrize("pin", PINS)
def test_an_edge_at_each_input_gives_one_interrupt_with_the_vector_of_that_input(pin) -> None:
    pc = Pc()
    pc.pic.set_level(pin, True)
    assert pc.intr == [True]
    assert pc.pic.acknowledge() == 0x30 + pin
    assert pc.intr == [True, False]
    pc.eoi(pin)
    pc.pic.set_level(pin, True)  # no edge
    assert pc.take() is None
    pc.pic.set_level(pin, False)
    pc.pic.set_level(pin, True)
    assert pc.take() == pin


def test_the_cascade_input_is_nobodys() -> None:
    pc = Pc()
    pc.pulse(2)
    assert pc.irr() == 0 and pc.intr == []


def test_the_lowest_number_comes_first_and_those_of_the_slave_between_1_and_3() -> None:
    pc = Pc()
    pc.pulse(*reversed(PINS))
    assert list(pc.served()) == [0, 1, *range(8, 16), *range(3, 8)]
    assert pc.isr() == pc.isr(SLAVE) == pc.irr() == pc.irr(SLAVE) == 0


def test_an_interrupt_in_service_holds_off_its_own_and_lower_ones_until_its_eoi() -> None:
    pc = Pc()
    pc.pulse(4)
    assert pc.take() == 4
    pc.pulse(4, 5)
    assert pc.take() is None
    pc.pulse(1)
    assert pc.take() == 1
    assert pc.isr() == 0b1_0010
    pc.out(MASTER, EOI)  # ends 1, the highest
    assert pc.isr() == 0b1_0000 and pc.take() is None
    pc.out(MASTER, EOI)
    assert list(pc.served()) == [4, 5]


def test_a_specific_eoi_ends_the_one_that_it_names() -> None:
    pc = Pc()
    pc.pulse(5)
    pc.take()
    pc.pulse(3)
    pc.take()
    pc.out(MASTER, SPECIFIC | 5)
    assert pc.isr() == 0b1000
    pc.out(MASTER, SPECIFIC | 6)  # not in service
    assert pc.isr() == 0b1000


def test_an_eoi_with_nothing_in_service_does_nothing() -> None:
    pc = Pc()
    for command in (EOI, ROTATE_EOI):
        pc.out(MASTER, command)
    pc.pulse(7, 0)
    assert list(pc.served()) == [0, 7]


def test_the_mask_holds_off_and_keeps_the_request() -> None:
    pc = Pc()
    pc.out(MASTER + 1, 0x10)
    assert pc.get(MASTER + 1) == 0x10
    pc.pulse(4)
    assert pc.intr == [] and pc.irr() == 0x10
    pc.out(MASTER + 1, 0)
    assert pc.intr == [True]
    pc.out(MASTER + 1, 0x10)
    assert pc.intr == [True, False]


def test_the_registers_read_are_irr_or_isr_as_was_asked_last() -> None:
    pc = Pc()
    pc.pulse(4)
    pc.take()
    pc.pulse(6)
    assert pc.get(MASTER) == 0x40  # after ICW1 it is IRR
    pc.out(MASTER, READ_ISR)
    assert [pc.get(MASTER) for _ in range(2)] == [0x10, 0x10]
    pc.out(MASTER, 0x08)  # OCW3 that asks for no change
    assert pc.get(MASTER) == 0x10
    pc.out(MASTER, READ_IRR)
    assert pc.get(MASTER) == 0x40


def test_rotation_on_eoi_gives_the_served_input_the_lowest_priority() -> None:
    pc = Pc()
    pc.pulse(3)
    pc.take()
    pc.out(MASTER, ROTATE_EOI)
    pc.pulse(0, 1, 3, 4, 7)
    assert list(pc.served()) == [4, 7, 0, 1, 3]
    pc.pulse(6)
    pc.take()
    pc.out(MASTER, ROTATE_SPECIFIC | 6)
    pc.pulse(6, 7, 5)
    assert list(pc.served()) == [7, 5, 6]


def test_a_nonspecific_eoi_ends_the_highest_in_the_rotated_order() -> None:
    pc = Pc()
    pc.out(MASTER, SET_PRIORITY | 4)  # 5 is the highest
    pc.pulse(0)
    pc.take()
    pc.pulse(6)
    assert pc.take() == 6
    pc.out(MASTER, EOI)
    assert pc.isr() == 1


def test_set_priority_makes_the_input_named_the_lowest() -> None:
    pc = Pc()
    pc.out(MASTER, SET_PRIORITY | 2)
    pc.pulse(0, 3, 7)
    assert list(pc.served()) == [3, 7, 0]
    pc.out(MASTER, SET_PRIORITY | 7)
    pc.pulse(7, 0)
    assert list(pc.served()) == [0, 7]


def test_ocw2_without_a_meaning_does_nothing() -> None:
    pc = Pc()
    pc.pulse(4)
    pc.take()
    pc.out(MASTER, 0x40 | 4)
    assert pc.isr() == 0x10
    pc.out(MASTER, EOI)
    pc.pulse(7, 0)
    assert list(pc.served()) == [0, 7]


def test_with_automatic_eoi_nothing_stays_in_service() -> None:
    pc = Pc(icw4=3, slave_icw4=3)
    pc.pulse(5, 4, 10)
    assert [pc.take() for _ in range(4)] == [10, 4, 5, None]
    assert pc.isr() == pc.isr(SLAVE) == 0


def test_with_automatic_eoi_priorities_rotate_when_that_is_set() -> None:
    pc = Pc(icw4=3)
    pc.out(MASTER, 0x80)
    pc.pulse(4)
    pc.take()
    pc.pulse(0, 4, 5)
    assert [pc.take() for _ in range(3)] == [5, 0, 4]
    pc.out(MASTER, 0x00)
    pc.pulse(6)
    pc.take()
    pc.pulse(4, 5)
    assert [pc.take() for _ in range(2)] == [5, 4]  # as it was: 4 the lowest


def test_special_mask_mode_lets_lower_ones_interrupt_one_that_is_masked_meanwhile() -> None:
    pc = Pc()
    pc.pulse(3)
    pc.take()
    pc.out(MASTER + 1, 0x08)
    pc.pulse(6)
    assert pc.take() is None
    pc.out(MASTER, SMM_ON)
    assert pc.take() == 6
    pc.out(MASTER, EOI)  # ends 6: not what is masked
    pc.out(MASTER, EOI)
    assert pc.isr() == 0x08
    pc.out(MASTER, READ_ISR)  # ESMM is 0: no change
    pc.pulse(6)
    assert pc.take() == 6
    pc.out(MASTER, EOI)
    pc.out(MASTER, SMM_OFF)
    pc.pulse(6)
    assert pc.take() is None


@pytest.mark.parametrize("icw4", [0x01, 0x11])
def test_a_slave_may_interrupt_itself_only_if_the_master_nests_specially(icw4) -> None:
    pc = Pc(icw4=icw4)
    pc.pulse(12)
    assert pc.take() == 12
    pc.pulse(3)
    assert pc.take() is None
    pc.pulse(10)
    assert pc.take() == (10 if icw4 == 0x11 else None)
    pc.pulse(12, 1)
    assert pc.take() == 1


def test_a_poll_takes_an_interrupt_as_an_acknowledge_does() -> None:
    pc = Pc()
    pc.pulse(5)
    for port in (MASTER, MASTER + 1):
        pc.out(MASTER, POLL)
        assert pc.get(port) == 0x85
        assert pc.isr() == 0x20 and not pc.pic.pending()
        pc.out(MASTER, POLL)
        assert pc.get(port) == 0
        pc.out(MASTER, EOI)
        pc.pulse(5)
    assert pc.get(MASTER + 1) == 0


def test_a_poll_of_the_slave_takes_its_request_from_the_master() -> None:
    pc = Pc()
    pc.pulse(9)
    assert pc.pic.pending()
    pc.out(SLAVE, POLL)
    assert pc.get(SLAVE) == 0x81
    assert not pc.pic.pending() and pc.irr() == 0


def test_an_interrupt_that_goes_away_before_it_is_acknowledged_is_spurious() -> None:
    pc = Pc()
    pc.out(ELCR, 0x20)
    pc.pic.set_level(5, True)
    pc.pic.set_level(5, False)
    assert pc.intr == [True, False]
    assert pc.pic.acknowledge() == 0x37
    assert pc.isr() == 0


def test_if_it_was_the_slaves_that_gives_its_own_spurious_vector_and_the_master_needs_an_eoi() -> (
    None
):
    pc = Pc()
    pc.pulse(10)
    pc.out(SLAVE + 1, 0xFF)
    assert pc.pic.acknowledge() == 0x3F
    assert (pc.isr(), pc.isr(SLAVE)) == (4, 0)


def test_a_level_input_asks_until_it_is_lowered() -> None:
    pc = Pc()
    pc.out(ELCR + 1, 0x02)
    pc.pic.set_level(9, True)
    for _ in range(3):
        assert pc.take() == 9
        assert pc.irr(SLAVE) == 0x02
        pc.eoi(9)
    pc.pic.set_level(9, False)
    assert pc.irr(SLAVE) == 0
    assert pc.take() in (None, 15)  # the master may have latched the slave's request
    pc.eoi(15)
    assert pc.take() is None


def test_the_edge_level_control_has_the_bits_that_a_pc_has() -> None:
    pc = Pc()
    pc.bus.write(ELCR, 2, 0xFFFF)
    assert pc.bus.read(ELCR, 2) == 0xDEF8
    pc.bus.write(ELCR, 2, 0)
    assert pc.bus.read(ELCR, 2) == 0


def test_an_input_that_becomes_level_triggered_asks_if_it_is_high_and_only_then() -> None:
    pc = Pc()
    pc.pic.set_level(5, True)
    assert list(pc.served()) == [5]
    pc.pulse(4)
    pc.out(ELCR, 0x30)
    assert pc.irr() == 0x20


def test_initializing_forgets_edges_masks_service_and_modes_but_not_levels() -> None:
    pc = Pc(icw4=0x13)
    pc.out(ELCR, 0x40)
    pc.out(MASTER + 1, 0x0F)
    pc.pulse(4)
    pc.pic.set_level(5, True)
    pc.pic.set_level(6, True)
    for command in (SET_PRIORITY | 4, SMM_ON, READ_ISR, POLL):
        pc.out(MASTER, command)
    pc.out(MASTER, 0x10)  # no ICW4: no AEOI either
    assert pc.get(MASTER) == 0x40  # IRR
    pc.out(MASTER + 1, 0x57)  # the low bits come from the input
    pc.out(MASTER + 1, 4)
    assert pc.get(MASTER + 1) == 0
    assert pc.pic.acknowledge() == 0x56
    assert pc.isr() == 0x40
    pc.pic.set_level(5, True)  # it has been high all the time
    pc.pulse(1)
    assert pc.take() == 0x21


def test_a_single_chip_expects_no_icw3() -> None:
    pc = Pc()
    pc.out(MASTER, 0x13)
    pc.out(MASTER + 1, 0x40)
    pc.out(MASTER + 1, 0x03)  # ICW4: AEOI
    pc.out(MASTER + 1, 0xFE)  # OCW1
    assert pc.get(MASTER + 1) == 0xFE
    pc.pulse(0)
    assert pc.pic.acknowledge() == 0x40 and pc.isr() == 0


def test_linux_finds_it_by_its_mask_register_before_it_initializes_it() -> None:
    pc = Pc(initialize=False)
    pc.out(SLAVE + 1, 0xFF)
    pc.out(MASTER + 1, 0xFB)
    assert pc.get(MASTER + 1) == 0xFB


def test_reset_leaves_nothing_but_the_levels_of_the_inputs() -> None:
    pc = Pc()
    pc.pic.set_level(4, True)
    pc.pulse(12)
    assert pc.pic.pending()
    pc.pic.reset()
    assert pc.intr == [True, False]
    fresh = Pc(initialize=False)
    fresh.pic.set_level(4, True)
    fresh.pic.set_level(4, False)
    fresh.pic.reset()
    pc.pic.set_level(4, False)
    assert pc.pic.state() == fresh.pic.state()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 15), st.booleans()),
        st.tuples(st.just("out"), st.integers(0, 5), st.integers(0, 255)),
        st.tuples(st.just("in"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("ack"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def drive(pc: Pc, sequence) -> list[object]:
    seen: list[object] = []
    for what, where, value in sequence:
        if what == "set":
            pc.pic.set_level(where, value)
        elif what == "out":
            pc.pic.write(where, 1, value)
        elif what == "in":
            seen.append(pc.pic.read(where, 1))
            assert 0 <= pc.pic.read(where, 1) <= 0xFF
        else:
            vector = pc.pic.acknowledge()
            assert 0 <= vector <= 0xFF
            seen.append(vector)
        seen.append(pc.pic.pending())
    return seen


@settings(deadline=None)
@given(steps, steps)
def test_a_restored_copy_goes_on_identically_and_each_change_of_intr_is_told(before, after) -> None:
    pc, copy = Pc(), Pc()
    drive(pc, before)
    copy.pic.restore(pc.pic.state())
    assert copy.pic.state() == pc.pic.state()
    assert copy.pic.pending() == pc.pic.pending()
    assert drive(pc, after) == drive(copy, after)
    for each in (pc, copy):  # the changes alternate, and the last is how it is
        assert each.intr == [i % 2 == 0 for i in range(len(each.intr))]
        assert each.pic.pending() == (len(each.intr) % 2 == 1)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"master": None}, {"slave": {}}, {"master": {"imr": 256}}]
    + [{"master": {name: value}} for name, value in (("step", 1), ("base", 3), ("highest", 8),
        ("isr", -1), ("irr", "1"), ("poll", 2), ("icw4_follows", 4))],
    ids=str,
)  # fmt: skip
def test_what_is_no_state_of_it_is_refused_and_changes_nothing(change) -> None:
    pc = Pc()
    pc.pulse(3)
    before = pc.pic.state()
    broken = dict(before)
    for key, value in change.items():
        broken[key] = before[key] | value if value and key != "version" else value
    with pytest.raises(ConfigError, match="; "):
        pc.pic.restore(broken)
    assert pc.pic.state() == before


def test_threads_that_raise_and_serve_at_once_lose_no_edge() -> None:
    pc = Pc(icw4=3, slave_icw4=3)
    served = [0] * 16

    def device(pin: int) -> None:
        for count in range(1, 51):
            pc.pulse(pin)
            while served[pin] < count:
                time.sleep(0)

    threads = [threading.Thread(target=device, args=(pin,), daemon=True) for pin in (1, 4, 9, 12)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        pin = pc.take()
        if pin is None:
            time.sleep(0)
        else:
            served[pin] += 1
    assert [served[pin] for pin in (1, 4, 9, 12)] == [50] * 4
