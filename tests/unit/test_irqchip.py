"""LAPICs, I/O APIC and PICs together, driven through their pages as a guest drives them."""

import threading
from itertools import pairwise

import pytest
from fakes import ManualClock

from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError
from vmexit.devices import lapic as l
from vmexit.devices.irqchip import PcIrqChip

LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
HZ = 1_000_000_000  # a tick of the timer, undivided, is a nanosecond
ENABLE, MASKED, PERIODIC = 0x1FF, 1 << 16, 1 << 17
LEVEL, LOGICAL, REMOTE_IRR = 1 << 15, 1 << 11, 1 << 14
BY_1 = 0b1011


class Pc:
    """The interrupt controllers of a machine, with their LAPICs switched on."""

    def __init__(self, cpus: int = 1, *, enable: bool = True) -> None:
        self.clock = ManualClock()
        self.notified = 0
        self.current = 0
        self.chip = PcIrqChip(cpus, self.clock, HZ, self._notify)
        self.vcpus = self.chip.vcpus
        self.bus = Bus("MMIO")
        self.bus.attach(LAPIC, 0x1000, self.chip.lapic_page(lambda: self.current))
        self.bus.attach(IOAPIC, 0x20, self.chip.ioapic_page())
        if enable:
            for cpu in range(cpus):
                self.write(l.SVR, ENABLE, cpu)
                self.write(l.LVT_LINT0, MASKED, cpu)
        self.notified = 0

    def _notify(self) -> None:
        self.notified += 1

    def read(self, offset: int, cpu: int = 0) -> int:
        self.current = cpu
        return self.bus.read(LAPIC + offset, 4)

    def write(self, offset: int, value: int, cpu: int = 0) -> None:
        self.current = cpu
        self.bus.write(LAPIC + offset, 4, value)

    def send(self, low: int, to: int = 0, cpu: int = 0) -> None:
        """An interrupt command of `cpu`."""
        self.write(l.ICR_HIGH, to << 24, cpu)
        self.write(l.ICR_LOW, low, cpu)

    def ioapic(self, register: int) -> int:
        self.bus.write(IOAPIC, 4, register)
        return self.bus.read(IOAPIC + 0x10, 4)

    def set_ioapic(self, register: int, value: int) -> None:
        self.bus.write(IOAPIC, 4, register)
        self.bus.write(IOAPIC + 0x10, 4, value)

    def route(self, pin: int, low: int, to: int = 0) -> None:
        self.set_ioapic(0x10 + 2 * pin + 1, to << 24)
        self.set_ioapic(0x10 + 2 * pin, low)

    def entry(self, pin: int) -> int:
        return self.ioapic(0x10 + 2 * pin) | self.ioapic(0x11 + 2 * pin) << 32

    def take(self, cpu: int = 0) -> int | None:
        """The vector that a vCPU takes, None if nothing is pending."""
        return self.vcpus[cpu].acknowledge() if self.vcpus[cpu].pending() else None

    def pending(self) -> list[int]:
        """The vCPUs that have an interrupt."""
        return [i for i, vcpu in enumerate(self.vcpus) if vcpu.pending()]

    def all_vectors(self, cpu: int = 0) -> list[int]:
        """What a vCPU gets that ends each interrupt at once."""
        found = []
        while (vector := self.take(cpu)) is not None:
            found.append(vector)
            self.write(l.EOI, 0, cpu)
        return found


# Registers.


def test_gsi_2_leads_nowhere_and_gsi_0_to_pin_2():
    pc = Pc()
    fresh = pc.chip.state()
    pc.chip.set_level(2, True)
    assert pc.chip.state() == fresh
    pc.chip.set_level(0, True)
    pc.chip.set_level(2, False)
    assert pc.chip.state()["ioapic"]["lines"] == 1 << 2


@pytest.mark.parametrize("gsi", [-1, 24])
def test_what_is_no_gsi_is_refused(gsi):
    with pytest.raises(ConfigError, match=f"no GSI {gsi}; use 0 to 23"):
        Pc().chip.set_level(gsi, True)


def test_after_reset_the_lapic_is_off_and_all_is_masked_but_the_wire_of_the_pic():
    pc = Pc(2, enable=False)
    for cpu in (0, 1):
        assert pc.read(l.ID, cpu) == cpu << 24
        assert pc.read(l.VERSION, cpu) == 0x5_0014
        assert pc.read(l.SVR, cpu) == 0xFF
        assert pc.read(l.DFR, cpu) == 0xFFFF_FFFF
        for offset in (l.TPR, l.PPR, l.LDR, l.ESR, l.ICR_LOW, l.ICR_HIGH, l.TIMER_CURRENT):
            assert pc.read(offset, cpu) == 0
        for offset in (l.LVT_TIMER, l.LVT_THERMAL, l.LVT_PERF, l.LVT_LINT1, l.LVT_ERROR):
            assert pc.read(offset, cpu) == MASKED
    assert pc.read(l.LVT_LINT0, 0) == 0x700  # ExtINT
    assert pc.read(l.LVT_LINT0, 1) == MASKED


@pytest.mark.parametrize(
    ("offset", "kept"),
    [
        (l.ID, 0xFF00_0000),
        (l.TPR, 0xFF),
        (l.LDR, 0xFF00_0000),
        (l.SVR, 0x1FF),
        (l.ICR_HIGH, 0xFF00_0000),
        (l.LVT_TIMER, 0x3_00FF),
        (l.LVT_LINT0, 0x1_A7FF),
        (l.LVT_LINT1, 0x1_A7FF),
        (l.LVT_THERMAL, 0x1_07FF),
        (l.LVT_PERF, 0x1_07FF),
        (l.LVT_ERROR, 0x1_00FF),
        (l.TIMER_INITIAL, 0xFFFF_FFFF),
        (l.TIMER_DIVIDE, 0b1011),
        (l.VERSION, 0),
        (l.PPR, 0),
        (l.IRR, 0),
        (l.ISR, 0),
        (l.TMR, 0),
        (0x50, 0),  # no register
    ],
)
def test_each_register_keeps_the_bits_it_has(offset, kept):
    pc = Pc()
    fixed = 0x5_0014 if offset == l.VERSION else 0
    pc.write(offset, 0xFFFF_FFFF)
    assert pc.read(offset) == kept | fixed
    if offset != l.SVR:
        pc.write(offset, 0)
        assert pc.read(offset) == fixed


def test_dfr_keeps_its_model_and_reads_ones_below():
    pc = Pc()
    pc.write(l.DFR, 0)
    assert pc.read(l.DFR) == 0x0FFF_FFFF


def test_registers_are_16_bytes_apart_and_nothing_is_between():
    pc = Pc()
    pc.write(l.TPR, 0x20)
    pc.write(l.TPR + 4, 0x30)
    assert pc.read(l.TPR) == 0x20
    assert pc.read(l.TPR + 4) == 0
    pc.send(0x4A)
    assert pc.read(l.IRR + 0x20) == 1 << 10
    assert pc.read(l.IRR + 0x24) == 0


def test_lvt_entries_are_masked_while_the_lapic_is_off():
    pc = Pc()
    pc.write(l.LVT_TIMER, 0x30)
    pc.write(l.SVR, 0xFF)
    assert pc.read(l.LVT_TIMER) == MASKED | 0x30
    pc.write(l.LVT_TIMER, 0x31)
    assert pc.read(l.LVT_TIMER) == MASKED | 0x31
    pc.write(l.SVR, ENABLE)
    assert pc.read(l.LVT_TIMER) == MASKED | 0x31


def test_a_lapic_that_is_off_accepts_no_interrupt_but_an_nmi():
    pc = Pc(2)
    pc.write(l.SVR, 0xFF, 1)
    pc.send(0x40, to=1)
    pc.write(l.SVR, ENABLE, 1)
    assert pc.take(1) is None
    pc.write(l.SVR, 0xFF, 1)
    pc.send(l.NMI << 8, to=1)
    assert pc.vcpus[1].take_nmi()


def test_each_vcpu_sees_its_own_lapic():
    pc = Pc(3)
    for cpu in range(3):
        pc.write(l.TPR, 0x10 + cpu, cpu)
    assert [pc.read(l.TPR, cpu) for cpu in range(3)] == [0x10, 0x11, 0x12]


# Priorities.


def test_the_highest_vector_comes_first_and_the_next_after_its_end():
    pc = Pc()
    for vector in (0x31, 0x45, 0x42, 0xF0):
        pc.send(vector)
    assert pc.take() == 0xF0
    assert pc.take() is None  # until the end of the interrupt
    assert pc.read(l.PPR) == 0xF0
    pc.write(l.EOI, 0)
    assert pc.all_vectors() == [0x45, 0x42, 0x31]


def test_a_higher_class_interrupts_a_lower_one_but_not_its_own():
    pc = Pc()
    pc.send(0x41)
    assert pc.take() == 0x41
    pc.send(0x4F)
    assert pc.take() is None
    pc.send(0x51)
    assert pc.take() == 0x51
    pc.write(l.EOI, 0)
    assert pc.take() is None  # 0x41 is in service yet
    assert pc.read(l.PPR) == 0x40
    pc.write(l.TPR, 0x43)
    assert pc.read(l.PPR) == 0x43
    pc.write(l.TPR, 0)
    assert pc.read(l.ISR + 0x20) == 1 << 1  # vectors 0x40 to 0x5f
    pc.write(l.EOI, 0)
    assert pc.all_vectors() == [0x4F]


def test_the_task_priority_holds_back_its_class_and_lower_ones():
    pc = Pc()
    pc.write(l.TPR, 0x4A)
    assert pc.read(l.PPR) == 0x4A
    pc.send(0x4F)
    pc.send(0x50)
    assert pc.take() == 0x50
    assert pc.read(l.PPR) == 0x50
    pc.write(l.EOI, 0)
    assert pc.take() is None
    pc.write(l.TPR, 0x3F)
    assert pc.all_vectors() == [0x4F]


def test_irr_and_isr_show_each_vector_in_its_place():
    pc = Pc()
    for vector in (0x10, 0x3F, 0xFF):
        pc.send(vector)
    assert [pc.read(l.IRR + 0x10 * i) for i in range(8)] == [
        1 << 16,
        1 << 31,
        0,
        0,
        0,
        0,
        0,
        1 << 31,
    ]
    assert pc.take() == 0xFF
    assert pc.read(l.IRR + 0x70) == 0
    assert pc.read(l.ISR + 0x70) == 1 << 31


def test_the_same_vector_twice_is_one_interrupt_and_once_more_while_it_is_in_service():
    pc = Pc()
    pc.send(0x40)
    pc.send(0x40)
    assert pc.take() == 0x40
    pc.send(0x40)
    assert pc.take() is None
    pc.write(l.EOI, 0)
    assert pc.all_vectors() == [0x40]


def test_an_eoi_with_nothing_in_service_does_nothing():
    pc = Pc()
    pc.write(l.EOI, 0)
    pc.send(0x40)
    assert pc.all_vectors() == [0x40]


def test_an_interrupt_that_is_there_no_more_is_the_spurious_one_and_not_in_service():
    pc = Pc()
    pc.write(l.SVR, 0x1AB)
    pc.send(0x40)
    assert pc.vcpus[0].pending()
    pc.write(l.TPR, 0xFF)
    assert not pc.vcpus[0].pending()
    assert pc.vcpus[0].acknowledge() == 0xAB
    assert [pc.read(l.ISR + 0x10 * i) for i in range(8)] == [0] * 8


# Interrupt commands.


@pytest.mark.parametrize(
    ("shorthand", "reached"), [(l.TO_SELF, [1]), (l.TO_ALL, [0, 1, 2]), (l.TO_OTHERS, [0, 2])]
)
def test_shorthands(shorthand, reached):
    pc = Pc(3)
    pc.send(shorthand << 18 | 0x40, to=2, cpu=1)
    assert pc.pending() == reached


@pytest.mark.parametrize(("to", "reached"), [(0, [0]), (2, [2]), (0xFF, [0, 1, 2]), (9, [])])
def test_physical_destinations(to, reached):
    pc = Pc(3)
    pc.send(0x40, to=to, cpu=1)
    assert pc.pending() == reached


def test_a_physical_destination_is_what_the_id_register_says():
    pc = Pc(2)
    pc.write(l.ID, 0x55 << 24, 1)
    pc.send(0x40, to=0x55)
    pc.send(0x50, to=1)
    assert pc.all_vectors(1) == [0x40]


@pytest.mark.parametrize(
    ("to", "reached"), [(1, [0]), (2, [1]), (5, [0, 2]), (0x40, []), (0xFF, [0, 1, 2])]
)
def test_logical_destinations_in_the_flat_model(to, reached):
    pc = Pc(3)
    for cpu in range(3):
        pc.write(l.LDR, 1 << 24 + cpu, cpu)
    pc.send(LOGICAL | 0x40, to=to)
    assert pc.pending() == reached


@pytest.mark.parametrize(
    ("to", "reached"),
    [(0x01, [0]), (0x03, [0, 1]), (0x11, [2]), (0x13, [2]), (0x23, []), (0xFF, [0, 1, 2])],
)
def test_logical_destinations_in_the_cluster_model(to, reached):
    pc = Pc(3)
    for cpu, name in enumerate((0x01, 0x02, 0x11)):
        pc.write(l.DFR, 0x0FFF_FFFF, cpu)
        pc.write(l.LDR, name << 24, cpu)
    pc.send(LOGICAL | 0x40, to=to)
    assert pc.pending() == reached


def test_the_lowest_priority_goes_to_the_one_with_the_least_to_do():
    pc = Pc(3)
    for cpu, priority in enumerate((0x50, 0x20, 0x30)):
        pc.write(l.LDR, 1 << 24 + cpu, cpu)
        pc.write(l.TPR, priority, cpu)
    pc.send(l.LOWEST_PRIORITY << 8 | LOGICAL | 0x60, to=7)
    assert pc.pending() == [1]
    assert pc.take(1) == 0x60
    pc.send(l.LOWEST_PRIORITY << 8 | LOGICAL | 0x70, to=7)
    assert pc.pending() == [2]


def test_the_lowest_priority_goes_to_none_that_is_off():
    pc = Pc(2)
    pc.write(l.SVR, 0xFF, 0)
    pc.write(l.TPR, 0x20, 1)
    pc.send(l.LOWEST_PRIORITY << 8 | 0x40, to=0xFF)
    assert pc.pending() == [1]


def test_an_nmi_is_taken_once_and_neither_masked_nor_in_service():
    pc = Pc(2)
    pc.write(l.TPR, 0xFF, 1)
    pc.send(l.NMI << 8, to=1)
    assert pc.notified
    assert not pc.vcpus[0].take_nmi()
    assert pc.vcpus[1].take_nmi()
    assert not pc.vcpus[1].take_nmi()
    assert pc.take(1) is None


def test_init_and_sipi_are_taken_in_their_order_with_the_vector():
    pc = Pc(2)
    pc.write(l.TPR, 0x20, 1)
    pc.send(l.INIT << 8 | 0xC000, to=1)  # assert, level
    pc.send(l.INIT << 8 | 0x8000, to=1)  # de-assert, which does nothing, then or later
    pc.send(l.STARTUP << 8 | 0x9A, to=1)
    first, second = pc.vcpus[1].take_startup(), pc.vcpus[1].take_startup()
    assert first is not None and first.vector is None
    assert second is not None and second.vector == 0x9A
    pc.send(l.INIT << 8 | 0x8000, to=1)
    assert pc.vcpus[1].take_startup() is None
    assert pc.read(l.TPR, 1) == 0  # INIT resets the LAPIC
    assert pc.read(l.SVR, 1) == 0xFF
    assert pc.vcpus[0].take_startup() is None


def test_an_init_forgets_what_had_come_before():
    pc = Pc(2)
    pc.send(0x40, to=1)
    pc.send(l.NMI << 8, to=1)
    pc.send(l.STARTUP << 8 | 1, to=1)
    pc.send(l.INIT << 8 | 0x4000, to=1)
    first = pc.vcpus[1].take_startup()
    assert first is not None and first.vector is None
    assert pc.vcpus[1].take_startup() is None
    assert not pc.vcpus[1].take_nmi()
    assert pc.take(1) is None


@pytest.mark.parametrize("mode", [l.SMI, 3, l.EXTINT])
def test_modes_that_this_machine_does_not_have_reach_nobody(mode):
    pc = Pc(2)
    pc.send(mode << 8 | 0x40, to=1)
    assert pc.pending() == []
    assert not pc.vcpus[1].take_nmi() and pc.vcpus[1].take_startup() is None


def test_illegal_vectors_are_errors_of_the_sender():
    pc = Pc()
    pc.write(l.LVT_ERROR, 0x70)
    pc.send(0x0F)
    assert pc.take() == 0x70
    assert pc.read(l.ESR) == 0  # until it is written
    pc.write(l.ESR, 0)
    assert pc.read(l.ESR) == 1 << 5
    pc.write(l.ESR, 0)
    assert pc.read(l.ESR) == 0


def test_an_illegal_vector_of_the_ioapic_is_an_error_of_the_receiver():
    pc = Pc()
    pc.route(5, 0x05)
    pc.chip.set_level(5, True)
    pc.write(l.ESR, 0)
    assert pc.read(l.ESR) == 1 << 6
    assert pc.take() is None


def test_the_command_reads_back_and_is_never_pending():
    pc = Pc(2)
    pc.send(LOGICAL | 0x1000 | 0x4040, to=0xAB)
    assert pc.read(l.ICR_LOW) == LOGICAL | 0x4040
    assert pc.read(l.ICR_HIGH) == 0xAB << 24


# The timer.


@pytest.mark.parametrize(
    ("code", "divider"),
    [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)],
)
def test_the_timer_counts_at_the_divided_frequency(code, divider):
    pc = Pc()
    pc.write(l.LVT_TIMER, 0x40)
    pc.write(l.TIMER_DIVIDE, code)
    pc.write(l.TIMER_INITIAL, 1000)
    assert pc.read(l.TIMER_CURRENT) == 1000
    pc.clock.advance(400 * divider)
    assert pc.read(l.TIMER_CURRENT) == 600
    pc.clock.advance(600 * divider - 1)
    assert pc.take() is None
    pc.clock.advance(1)
    assert pc.take() == 0x40
    assert pc.read(l.TIMER_CURRENT) == 0
    assert pc.clock.armed == []  # once


def timer(pc: Pc, mode: int, ticks: int) -> None:
    pc.write(l.TIMER_DIVIDE, BY_1)
    pc.write(l.LVT_TIMER, mode)
    pc.write(l.TIMER_INITIAL, ticks)


def test_a_periodic_timer_fires_again_and_again_without_drift():
    pc = Pc()
    timer(pc, PERIODIC | 0x40, 1_000_000)
    times = []
    for _ in range(5000):
        pc.clock.advance(1000)
        if pc.all_vectors():
            times.append(pc.clock.time)
    assert [b - a for a, b in pairwise(times)] == [1_000_000] * 4
    pc.clock.advance(250_000)
    assert pc.read(l.TIMER_CURRENT) == 750_000


def test_periods_that_were_missed_are_one_interrupt_and_the_next_is_in_step():
    pc = Pc()
    began = pc.clock.time
    timer(pc, PERIODIC | 0x40, 1_000_000)
    pc.clock.sleep(3_500_000)
    assert pc.all_vectors() == [0x40]
    assert [at - began for at in pc.clock.armed] == [4_000_000]


def test_a_period_that_no_host_could_follow_is_longer():
    pc = Pc()
    timer(pc, PERIODIC | 0x40, 1)
    pc.clock.advance(10_000_000)
    assert pc.clock.calls <= 101


def test_a_count_of_0_stops_the_timer():
    pc = Pc()
    timer(pc, PERIODIC | 0x40, 1000)
    pc.write(l.TIMER_INITIAL, 0)
    pc.clock.advance(10_000)
    assert pc.take() is None and pc.clock.armed == [] and pc.read(l.TIMER_CURRENT) == 0


def test_a_masked_timer_counts_but_does_not_interrupt():
    pc = Pc()
    timer(pc, PERIODIC | MASKED | 0x40, 1_000_000)
    pc.clock.advance(1_500_000)
    assert pc.take() is None
    assert pc.read(l.TIMER_CURRENT) == 500_000
    pc.write(l.LVT_TIMER, PERIODIC | 0x40)
    assert pc.take() is None  # what was masked is not made up for
    pc.clock.advance(500_000)
    assert pc.take() == 0x40


def test_another_divider_changes_the_speed_of_what_is_left():
    pc = Pc()
    timer(pc, 0x40, 1000)
    pc.clock.advance(500)
    pc.write(l.TIMER_DIVIDE, 0)  # by 2
    assert pc.read(l.TIMER_CURRENT) == 500
    pc.clock.advance(999)
    assert pc.take() is None
    pc.clock.advance(1)
    assert pc.take() == 0x40


def test_a_timer_set_anew_forgets_the_old_time():
    pc = Pc()
    timer(pc, 0x40, 1000)
    pc.clock.advance(900)
    pc.write(l.TIMER_INITIAL, 1000)
    pc.clock.advance(999)
    assert pc.take() is None
    pc.clock.advance(1)
    assert pc.take() == 0x40


def test_a_timer_with_an_illegal_vector_interrupts_nobody():
    pc = Pc()
    timer(pc, 0x05, 1000)
    pc.clock.advance(2000)
    assert pc.take() is None


# The I/O APIC.


def test_the_ioapic_has_24_entries_that_are_masked_and_says_so():
    pc = Pc()
    assert pc.ioapic(1) == 0x17_0011
    assert [pc.entry(pin) for pin in range(24)] == [MASKED] * 24
    pc.set_ioapic(0, 0xFFFF_FFFF)
    assert pc.ioapic(0) == pc.ioapic(2) == 0xF << 24
    assert pc.bus.read(IOAPIC, 4) == 2  # the register that is selected
    pc.set_ioapic(1, 0)
    assert pc.ioapic(1) == 0x17_0011
    assert pc.ioapic(0x40) == pc.ioapic(0xFF) == 0


def test_an_entry_keeps_what_can_be_written():
    pc = Pc()
    pc.set_ioapic(0x12, 0xFFFF_FFFF)
    pc.set_ioapic(0x13, 0xFFFF_FFFF)
    assert pc.entry(1) == 0xFF00_0000_0001_AFFF  # no delivery status, no remote IRR, no reserved


def test_the_pit_is_at_pin_2_and_the_others_at_theirs():
    pc = Pc()
    for pin in range(24):
        pc.route(pin, 0x40 + pin)
    for gsi, pin in [(0, 2), (1, 1), (15, 15), (16, 16), (23, 23)]:
        pc.chip.set_level(gsi, True)
        assert pc.all_vectors() == [0x40 + pin]


def test_an_edge_is_one_interrupt_and_a_level_that_stays_none_more():
    pc = Pc()
    pc.route(4, 0x40)
    pc.chip.set_level(4, True)
    assert pc.all_vectors() == [0x40]
    pc.chip.set_level(4, True)
    assert pc.all_vectors() == []
    pc.chip.set_level(4, False)
    assert pc.all_vectors() == []
    pc.chip.set_level(4, True)
    assert pc.all_vectors() == [0x40]
    assert not pc.entry(4) & REMOTE_IRR


def test_an_edge_at_a_masked_pin_is_ignored():
    """82093AA data sheet, 3.2.4, interrupt mask: neither delivered nor held pending."""
    pc = Pc()
    pc.route(4, MASKED | 0x40)
    pc.chip.set_level(4, True)
    pc.route(4, 0x40)
    assert pc.all_vectors() == []


def test_a_level_comes_again_after_each_end_while_the_line_is_up():
    pc = Pc()
    pc.route(9, LEVEL | 0x40)
    pc.chip.set_level(9, True)
    assert pc.entry(9) & REMOTE_IRR
    assert pc.read(l.TMR + 0x20) == 1
    assert pc.take() == 0x40
    pc.chip.set_level(9, True)
    assert pc.take() is None
    pc.write(l.EOI, 0)
    assert pc.take() == 0x40
    pc.chip.set_level(9, False)
    pc.write(l.EOI, 0)
    assert pc.take() is None
    assert not pc.entry(9) & REMOTE_IRR


def test_a_level_at_a_masked_pin_waits_for_the_mask_to_go():
    pc = Pc()
    pc.route(9, MASKED | LEVEL | 0x40)
    pc.chip.set_level(9, True)
    assert pc.take() is None
    pc.route(9, LEVEL | 0x40)
    assert pc.take() == 0x40


def test_a_pin_masked_while_its_interrupt_is_in_service_comes_again_when_unmasked():
    pc = Pc()
    pc.route(9, LEVEL | 0x40)
    pc.chip.set_level(9, True)
    assert pc.take() == 0x40
    pc.set_ioapic(0x10 + 18, MASKED | LEVEL | 0x40)
    pc.write(l.EOI, 0)
    assert pc.take() is None
    pc.set_ioapic(0x10 + 18, LEVEL | 0x40)
    assert pc.take() == 0x40


def test_edge_and_back_to_level_clears_the_remote_irr():
    """So Linux ends an interrupt where the EOI has got lost (io_apic.c, __eoi_ioapic_pin)."""
    pc = Pc()
    pc.route(9, LEVEL | 0x40)
    pc.chip.set_level(9, True)
    assert pc.entry(9) & REMOTE_IRR
    pc.chip.set_level(9, False)
    pc.set_ioapic(0x10 + 18, MASKED | 0x40)
    pc.set_ioapic(0x10 + 18, MASKED | LEVEL | 0x40)
    assert not pc.entry(9) & REMOTE_IRR


def test_the_eoi_of_an_edge_is_not_told_to_the_ioapic():
    pc = Pc()
    pc.route(9, LEVEL | 0x40)
    pc.chip.set_level(9, True)
    assert pc.take() == 0x40
    pc.send(0x50)
    assert pc.take() == 0x50
    pc.write(l.EOI, 0)
    assert pc.entry(9) & REMOTE_IRR
    pc.write(l.EOI, 0)
    assert pc.take() == 0x40  # the line is up


def test_an_edge_with_the_vector_of_a_level_makes_it_one():
    pc = Pc()
    pc.route(9, LEVEL | 0x40)
    pc.chip.set_level(9, True)
    pc.send(0x40)
    assert pc.read(l.TMR + 0x20) == 0
    assert pc.all_vectors() == [0x40]
    assert pc.entry(9) & REMOTE_IRR


def test_an_entry_written_while_its_interrupt_is_in_service_does_not_send_it_again():
    pc = Pc()
    pc.route(9, LEVEL | 0x40)
    pc.chip.set_level(9, True)
    assert pc.take() == 0x40
    pc.set_ioapic(0x10 + 18, LEVEL | 0x50)
    assert pc.entry(9) & REMOTE_IRR
    assert pc.take() is None


def test_two_pins_with_one_vector_share_its_eoi():
    pc = Pc()
    for pin in (9, 10):
        pc.route(pin, LEVEL | 0x40)
        pc.chip.set_level(pin, True)
    assert pc.take() == 0x40
    pc.chip.set_level(9, False)
    pc.write(l.EOI, 0)
    assert pc.take() == 0x40
    assert [bool(pc.entry(pin) & REMOTE_IRR) for pin in (9, 10)] == [False, True]


def test_a_level_that_nobody_has_accepted_is_tried_again():
    pc = Pc(2)
    pc.write(l.SVR, 0xFF, 1)
    pc.route(9, LEVEL | 0x40, to=1)
    pc.chip.set_level(9, True)
    assert not pc.entry(9) & REMOTE_IRR
    pc.write(l.SVR, ENABLE, 1)
    assert pc.take(1) == 0x40
    assert pc.entry(9) & REMOTE_IRR


def test_the_ioapic_reaches_whom_its_entry_names():
    pc = Pc(3)
    for cpu in range(3):
        pc.write(l.LDR, 1 << 24 + cpu, cpu)
    pc.route(4, LOGICAL | 0x40, to=6)
    pc.chip.set_level(4, True)
    assert pc.pending() == [1, 2]
    pc.route(5, l.NMI << 8 | 0x40, to=2)
    pc.chip.set_level(5, True)
    assert [vcpu.take_nmi() for vcpu in pc.vcpus] == [False, False, True]


# With the PICs.


def pic_ready(pc: Pc) -> None:
    for chip, base, icw3 in ((pc.chip.pic.master, 0x30, 4), (pc.chip.pic.slave, 0x38, 2)):
        chip.write(0, 1, 0x11)
        for value in (base, icw3, 1, 0):
            chip.write(1, 1, value)


def test_the_pic_reaches_the_first_vcpu_by_lint0():
    pc = Pc(2, enable=False)
    pic_ready(pc)
    pc.chip.set_level(4, True)
    assert pc.pending() == [0]
    assert pc.take() == 0x34
    assert pc.take() is None
    assert [pc.read(l.ISR + 0x10 * i) for i in range(8)] == [0] * 8


@pytest.mark.parametrize("lint0", [MASKED | 0x700, 0x40, 0x400])
def test_lint0_that_is_masked_or_of_another_mode_keeps_the_pic_away(lint0):
    pc = Pc()
    pic_ready(pc)
    pc.write(l.LVT_LINT0, lint0)
    pc.chip.set_level(4, True)
    assert pc.take() is None
    pc.write(l.LVT_LINT0, 0x700)
    assert pc.take() == 0x34


def test_the_pic_is_not_held_back_by_priorities_and_comes_first():
    pc = Pc()
    pic_ready(pc)
    pc.write(l.LVT_LINT0, 0x700)
    pc.send(0xF0)
    assert pc.take() == 0xF0
    pc.write(l.TPR, 0xFF)
    pc.chip.set_level(4, True)
    assert pc.take() == 0x34


def test_a_pic_interrupt_that_is_gone_at_the_inta_cycle_is_irq_7():
    pc = Pc()
    pic_ready(pc)
    pc.write(l.LVT_LINT0, 0x700)
    pc.chip.set_level(4, True)
    assert pc.vcpus[0].pending()
    pc.chip.pic.master.write(1, 1, 0x10)  # masked
    assert not pc.vcpus[0].pending()
    assert pc.vcpus[0].acknowledge() == 0x37
    pc.chip.pic.master.write(0, 1, 0x0B)
    assert pc.chip.pic.master.read(0, 1) == 0  # none is in service


def test_an_nmi_of_a_level_is_one_edge_and_no_end_is_waited_for():
    pc = Pc()
    pc.route(9, LEVEL | l.NMI << 8 | 0x40)
    for _ in range(2):
        pc.chip.set_level(9, True)
        assert pc.vcpus[0].take_nmi()
        assert not pc.vcpus[0].take_nmi()
        assert not pc.entry(9) & REMOTE_IRR
        pc.chip.set_level(9, False)


def test_whether_an_nmi_may_come_is_known_for_each_vcpu():
    pc = Pc(2)
    assert [vcpu.nmi_may_come() for vcpu in pc.vcpus] == [False, False]
    pc.route(9, l.NMI << 8, to=1)
    assert [vcpu.nmi_may_come() for vcpu in pc.vcpus] == [False, True]
    pc.route(9, MASKED | l.NMI << 8, to=1)
    assert [vcpu.nmi_may_come() for vcpu in pc.vcpus] == [False, False]


def test_init_leaves_the_id_and_masks_lint0():
    pc = Pc()
    pc.write(l.ID, 5 << 24)
    pc.write(l.LVT_LINT0, 0x700)
    pc.chip.send(5, False, l.INIT, 0, False)
    assert pc.read(l.ID) == 5 << 24
    assert pc.read(l.LVT_LINT0) == MASKED


def test_an_error_interrupt_is_an_edge_even_where_a_level_had_its_vector():
    pc = Pc()
    pc.route(9, LEVEL | 0x40)
    pc.chip.set_level(9, True)
    assert pc.take() == 0x40
    pc.write(l.LVT_ERROR, 0x40)
    pc.send(0x01)  # an illegal vector
    assert pc.read(l.TMR + 0x20) == 0


# Telling the vCPUs.


def test_vcpus_are_told_when_something_becomes_pending_and_when_no_more():
    pc = Pc()
    pc.send(0x40)
    assert pc.notified == 1
    pc.send(0x41)
    assert pc.notified == 1  # they know
    pc.write(l.TPR, 0xFF)
    assert pc.notified == 2
    pc.write(l.TPR, 0)
    assert pc.notified == 3
    assert pc.take() == 0x41
    pc.write(l.EOI, 0)
    assert pc.notified == 4


def test_after_an_acknowledge_what_is_left_is_told_anew():
    pc = Pc()
    pic_ready(pc)
    pc.write(l.LVT_LINT0, 0x700)
    pc.send(0x40)
    pc.chip.set_level(4, True)
    before = pc.notified
    assert pc.take() == 0x34
    assert pc.notified > before and pc.vcpus[0].pending()


# State.


def test_a_restored_copy_goes_on_identically():
    pc, copy = Pc(2), Pc(2, enable=False)
    pic_ready(pc)
    pc.write(l.TPR, 0x20)
    pc.write(l.LDR, 1 << 24)
    timer(pc, PERIODIC | 0x60, 1_000_000)
    pc.clock.advance(300_000)
    pc.route(9, LEVEL | 0x40)
    pc.chip.set_level(9, True)
    pc.send(0x55)
    assert pc.take() == 0x55
    pc.send(l.INIT << 8 | 0x4000, to=1)
    pc.send(l.STARTUP << 8 | 0x12, to=1)
    pc.send(l.NMI << 8)
    copy.chip.restore(pc.chip.state())
    assert copy.notified
    assert copy.chip.state() == pc.chip.state()
    for one in (pc, copy):
        assert one.read(l.TIMER_CURRENT) == 700_000
        one.clock.advance(700_000)
        assert one.all_vectors() == [0x60]
        one.write(l.EOI, 0)
        assert one.take() == 0x40
        assert one.vcpus[0].take_nmi()
        starts = [one.vcpus[1].take_startup() for _ in range(2)]
        assert [s.vector for s in starts if s] == [None, 0x12]
    assert copy.chip.state() == pc.chip.state()


def broken_states():
    for path, value in [
        (("version",), 2),
        (("pic",), None),
        (("ioapic",), 7),
        (("lapics",), []),
        (("lapics", 0), None),
        (("ioapic", "version"), 0),
        (("ioapic", "entries"), [0] * 23),
        (("ioapic", "entries", 3), -1),
        (("ioapic", "entries", 3), 1 << 64),
        (("ioapic", "entries", 3), "0"),
        (("ioapic", "lines"), 1 << 24),
        (("ioapic", "select"), None),
        (("ioapic", "id"), 16),
        (("pic", "version"), 9),
        (("lapics", 1, "version"), 9),
        (("lapics", 1, "irr"), 1 << 256),
        (("lapics", 1, "tpr"), -1),
        (("lapics", 1, "svr"), "x"),
        (("lapics", 1, "lvt"), [0] * 5),
        (("lapics", 1, "lvt", 0), None),
        (("lapics", 1, "startup"), 0x100),
        (("lapics", 1, "nmi"), "yes"),
        (("lapics", 1, "timer_left"), 1 << 70),
        (("lapics", 1, "timer_left"), 1.5),
        (("lapics", 1, "icr"), 1 << 64),
    ]:
        yield pytest.param(path, value, id="-".join(map(str, path)) + f"-{str(value)[:12]}")


@pytest.mark.parametrize(("path", "value"), list(broken_states()))
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(path, value):
    pc = Pc(2)
    pc.route(9, LEVEL | 0x40)
    timer(pc, PERIODIC | 0x60, 1_000_000)
    broken = Pc(2).chip.state()
    node = broken
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    before = pc.chip.state()
    with pytest.raises(ConfigError, match="save it anew"):
        pc.chip.restore(broken)
    assert pc.chip.state() == before


def test_reset_is_as_at_power_on():
    pc = Pc(2)
    pc.route(9, LEVEL | 0x40)
    pc.chip.set_level(9, True)
    timer(pc, PERIODIC | 0x60, 1_000_000)
    pc.send(l.NMI << 8, to=1)
    pc.chip.reset()
    assert pc.pending() == []
    pc.chip.set_level(9, False)  # a reset does not reach what drives a line
    assert pc.chip.state() == Pc(2, enable=False).chip.state()
    assert pc.pending() == [] and pc.clock.armed == []


# Threads.


def test_vcpus_devices_and_timers_at_once_lose_no_interrupt():
    """Each level that goes up is taken once before it goes down, on two vCPUs at a time."""
    pc, rounds = Pc(2), 300
    for cpu in (0, 1):
        pc.route(16 + cpu, LEVEL | 0x40 + cpu, to=cpu)
    taken = [0, 0]
    failures: list[BaseException] = []
    pages = [Bus("MMIO"), Bus("MMIO")]
    for cpu in (0, 1):
        pages[cpu].attach(LAPIC, 0x1000, pc.chip.lapic_page(lambda cpu=cpu: cpu))
    stop = threading.Event()

    def vcpu(cpu: int) -> None:
        try:
            while taken[cpu] < rounds and not stop.is_set():
                pc.chip.set_level(16 + cpu, True)
                while not pc.vcpus[cpu].pending():
                    assert not stop.wait(0)
                vector = pc.vcpus[cpu].acknowledge()
                pc.chip.set_level(16 + cpu, False)
                pages[cpu].write(LAPIC + l.EOI, 4, 0)
                taken[cpu] += vector == 0x40 + cpu
        except BaseException as error:
            failures.append(error)

    def disturb() -> None:
        while not stop.is_set():
            pc.chip.set_level(4, True)
            pc.chip.set_level(4, False)
            pc.chip.state()
            pc.clock.sleep(1000)

    threads = [threading.Thread(target=vcpu, args=(cpu,)) for cpu in (0, 1)]
    noise = threading.Thread(target=disturb)
    for thread in (*threads, noise):
        thread.start()
    for thread in threads:
        thread.join(30)
    stop.set()
    noise.join(30)
    assert not failures and taken == [rounds, rounds]
