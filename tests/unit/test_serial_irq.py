"""The interrupts of the UART, as the data sheet of the PC16550D tells them (8.2, 8.5 to 8.9)."""

import os
import sys
import threading
from collections.abc import Callable

import pytest
from fakes import ManualClock, Pins
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.devices.serial import Serial

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
DR, OE = 0x01, 0x02
RDI, THRI, RLSI, MSI = 1, 2, 4, 8
DTR, RTS, OUT1, OUT2, LOOP = 1, 2, 4, 8, 16
FIFO = {1: 0x01, 4: 0x41, 8: 0x81, 14: 0xC1}
NONE, MODEM, THRE, RECEIVED, LINE, TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
GSI = 4


class Wire:
    """A backend whose loop runs when `deliver` is called."""

    def __init__(self) -> None:
        self.incoming = bytearray()
        self.sent = bytearray()
        self.waiting: list[Callable[[], None]] = []

    def write(self, data: bytes) -> None:
        self.sent += data

    def read(self, size: int) -> bytes:
        assert size > 0
        data = bytes(self.incoming[:size])
        del self.incoming[:size]
        return data

    def when_readable(self, function: Callable[[], None]) -> None:
        self.waiting.append(function)
        assert len(self.waiting) == 1  # it is asked for once

    def deliver(self, data: bytes = b"") -> None:
        self.incoming += data
        while self.incoming and self.waiting:
            self.waiting.pop()()


class Pc:
    def __init__(self, *, ier: int = 0, fcr: int = 0, mcr: int = OUT2) -> None:
        self.pins, self.wire = Pins(), Wire()
        self.serial = Serial(self.wire, self.pins.line(GSI))
        for register, value in ((FCR, fcr), (MCR, mcr), (IER, ier)):
            self.out(register, value)

    def out(self, register: int, value: int) -> None:
        self.serial.write(register, 1, value)

    def get(self, register: int) -> int:
        return self.serial.read(register, 1)

    def cause(self) -> int:
        return self.get(IIR) & 0x0F

    @property
    def line(self) -> bool:
        return self.pins.levels.get(GSI, False)

    def receive(self) -> bytes:
        data = bytearray()
        while self.get(LSR) & DR:
            data.append(self.get(DATA))
            self.wire.deliver()
        return bytes(data)


# The transmitter.


def test_enabling_the_transmitter_interrupt_raises_it_and_reading_iir_ends_it() -> None:
    pc = Pc()
    assert not pc.line
    pc.out(IER, THRI)
    assert pc.line and pc.cause() == THRE
    assert not pc.line and pc.cause() == NONE
    pc.out(IER, THRI)  # it was enabled before
    assert not pc.line
    pc.out(IER, 0)
    pc.out(IER, THRI)
    assert pc.line and pc.cause() == THRE
    pc.out(IER, 0)
    assert not pc.line and pc.cause() == NONE


def test_each_byte_sent_gives_an_edge_also_if_nobody_reads_iir() -> None:
    pc = Pc(ier=THRI)
    for sent in range(1, 5):
        before = pc.pins.edges
        pc.out(DATA, 0x40 + sent)
        assert pc.pins.edges == before + 1 and pc.line
    assert pc.wire.sent == b"ABCD"
    assert pc.cause() == THRE and not pc.line


def test_reading_iir_ends_the_transmitter_interrupt_only_if_that_is_what_it_shows() -> None:
    pc = Pc(ier=THRI | RDI)
    pc.wire.deliver(b"x")
    assert pc.cause() == RECEIVED
    pc.get(DATA)
    assert pc.line and pc.cause() == THRE and not pc.line


def test_while_another_cause_holds_the_line_sending_does_not_lower_it() -> None:
    pc = Pc(ier=THRI | RDI)
    pc.wire.deliver(b"x")
    log = len(pc.pins.log)
    pc.out(DATA, 1)
    assert pc.line and len(pc.pins.log) == log


def test_without_the_transmitter_interrupt_sending_touches_no_line() -> None:
    pc = Pc(ier=RDI | RLSI | MSI)
    log = len(pc.pins.log)
    for byte in range(100):
        pc.out(DATA, byte)
    assert len(pc.pins.log) == log and len(pc.wire.sent) == 100


# The receiver.


def test_without_fifo_each_byte_gives_an_interrupt_until_it_is_read() -> None:
    pc = Pc(ier=RDI)
    pc.wire.deliver(b"ab")
    for byte in b"ab":
        assert pc.line and [pc.cause(), pc.cause()] == [RECEIVED, RECEIVED]
        before = pc.pins.edges
        assert pc.get(DATA) == byte
        assert not pc.line
        pc.wire.deliver()
    assert pc.pins.edges == before and pc.get(LSR) & DR == 0


@pytest.mark.parametrize("level", [1, 4, 8, 14])
def test_below_the_trigger_level_it_is_a_timeout(level) -> None:
    pc = Pc(ier=RDI, fcr=FIFO[level])
    for count in range(1, 17):
        pc.wire.deliver(b"x")
        assert pc.line
        assert pc.get(IIR) == (RECEIVED if count >= level else TIMEOUT) | 0xC0
    for count in range(15, -1, -1):
        pc.get(DATA)
        expected = NONE if not count else RECEIVED if count >= level else TIMEOUT
        assert (pc.cause(), pc.line) == (expected, count > 0)


def test_clearing_the_fifo_ends_the_interrupt() -> None:
    pc = Pc(ier=RDI, fcr=FIFO[1])
    pc.wire.deliver(b"xyz")
    assert pc.get(LSR) & DR
    pc.out(FCR, 0x03)
    assert not pc.line and pc.get(LSR) & DR == 0


def test_the_fifo_takes_what_it_has_room_for_and_the_rest_waits_outside() -> None:
    pc = Pc(ier=RDI, fcr=FIFO[8])
    pc.wire.deliver(bytes(range(100)))
    assert len(pc.wire.incoming) == 84 and pc.wire.waiting == []
    assert pc.get(DATA) == 0
    pc.wire.deliver()
    assert len(pc.wire.incoming) == 83 and pc.wire.waiting == []
    assert pc.receive() == bytes(range(1, 100))
    assert len(pc.wire.waiting) == 1


def test_a_paste_of_100_kilobytes_arrives_whole_and_in_order() -> None:
    pc = Pc(ier=RDI, fcr=FIFO[14])
    data = os.urandom(100_000)
    pc.wire.deliver(data)
    got = bytearray()
    while pc.line:
        pc.cause()
        while pc.get(LSR) & DR:
            got.append(pc.get(DATA))
        pc.wire.deliver()
    assert got == data


def test_what_comes_before_the_guest_is_interested_waits_outside() -> None:
    """An operating system sends with polling first, and clears the FIFO when it sets up."""
    pc = Pc(fcr=FIFO[14])
    pc.wire.incoming += b"typed ahead"
    for byte in b"the boot log":
        assert pc.get(LSR) & DR == pc.get(LSR) & DR == 0
        pc.out(DATA, byte)
    pc.wire.deliver()
    for register, value in ((FCR, 0x07), (FCR, 0xC1)):
        pc.out(register, value)
    assert [pc.get(register) for register in (DATA, IIR, MSR)] == [0, 0xC1, 0xB0]
    pc.out(IER, RDI | RLSI)
    pc.wire.deliver()
    assert pc.line and pc.receive() == b"typed ahead"


def test_a_guest_that_polls_gets_its_input_without_interrupts() -> None:
    pc = Pc(mcr=0)
    pc.wire.incoming += b"hello"
    got = bytearray()
    for _ in range(100):
        if pc.get(LSR) & DR:
            got.append(pc.get(DATA))
            pc.out(DATA, got[-1])  # echo
        pc.wire.deliver()
    assert got == pc.wire.sent == b"hello" and not pc.line


def test_what_has_no_room_any_more_when_it_comes_is_kept() -> None:
    pc = Pc(ier=RDI, fcr=FIFO[1])
    take = pc.wire.read

    def meanwhile(size: int) -> bytes:
        pc.out(FCR, 0)  # no FIFO
        return take(size)

    pc.wire.read = meanwhile  # type: ignore[method-assign]
    pc.wire.deliver(b"abcd")
    assert pc.serial.state()["unread"] == b"bcd"
    copy = Pc()
    copy.serial.restore(pc.serial.state())
    assert copy.receive() == b"abcd"
    pc.wire.read = take  # type: ignore[method-assign]
    pc.out(IER, 0)
    for expected in b"abcd":
        while not pc.get(LSR) & DR:
            pass
        assert pc.get(DATA) == expected
    assert pc.get(LSR) & OE == 0


def test_looped_back_nothing_comes_from_outside() -> None:
    pc = Pc(ier=RDI, fcr=FIFO[1], mcr=OUT2 | LOOP)
    pc.wire.incoming += b"outside"
    pc.wire.deliver()
    pc.out(DATA, 0x55)
    assert pc.line and pc.get(DATA) == 0x55 and not pc.line
    pc.out(MCR, OUT2)
    pc.wire.deliver()
    assert pc.receive() == b"outside"


def test_a_test_in_loopback_sees_its_own_bytes_and_input_of_before_comes_after_it() -> None:
    pc = Pc(ier=RDI, fcr=FIFO[1])
    pc.wire.deliver(b"ab")
    pc.out(MCR, OUT2 | LOOP)
    pc.out(DATA, 0x55)
    assert pc.get(DATA) == 0x55 and pc.get(LSR) & DR == 0
    pc.out(FCR, FIFO[1] | 2)  # clear the receiver
    pc.out(MCR, OUT2)
    pc.wire.deliver()
    assert pc.receive() == b"ab"


def test_input_comes_no_faster_than_a_line_brings_it() -> None:
    """16 KiB at once, then 11520 bytes a second; the backend is asked again when there is room."""
    clock = ManualClock()
    pins, wire = Pins(), Wire()
    serial = Serial(wire, pins.line(GSI), clock)
    for register, value in ((FCR, FIFO[8]), (MCR, OUT2), (IER, RDI)):
        serial.write(register, 1, value)
    wire.incoming += bytes(40_000)

    def drain() -> int:
        wire.deliver()
        number = 0
        while serial.read(LSR, 1) & DR:
            serial.read(DATA, 1)
            number += 1
            wire.deliver()
        return number

    assert abs(drain() - (16 << 10)) <= 16
    assert drain() == 0 and not wire.waiting
    clock.advance(100_000_000)
    assert 1100 <= drain() <= 1200
    total = 0
    for _ in range(100):
        clock.advance(10_000_000)
        total += drain()
    assert 11_400 <= total <= 11_600


# Line and modem status, priorities, the gate.


def test_an_overrun_interrupts_until_the_line_status_is_read() -> None:
    pc = Pc(ier=RLSI, mcr=OUT2 | LOOP)
    pc.out(DATA, 1)
    assert not pc.line
    pc.out(DATA, 2)
    assert pc.line and [pc.cause(), pc.cause()] == [LINE, LINE]
    assert pc.get(LSR) & OE
    assert not pc.line and pc.cause() == NONE


@pytest.mark.parametrize(
    ("output", "delta", "rising"),
    [(DTR, 0x02, True), (RTS, 0x01, True), (OUT1, 0x04, False), (OUT2, 0x08, True)],
)
def test_looped_back_outputs_change_the_modem_status_and_that_interrupts(
    output, delta, rising
) -> None:
    """Of RI only the trailing edge counts: data sheet, 8.8."""
    pc = Pc(ier=MSI, mcr=OUT2 | LOOP)
    pc.get(MSR)
    keep = OUT2 ^ (output & OUT2)
    pc.out(MCR, LOOP | keep)
    pc.get(MSR)
    pc.out(MCR, LOOP | keep | output)
    assert pc.get(MSR) & 0x0F == (delta if rising else 0)
    assert pc.get(MSR) & 0x0F == 0
    pc.out(MCR, LOOP | keep | output)
    assert pc.get(MSR) & 0x0F == 0
    pc.out(MCR, LOOP | keep)
    assert pc.cause() == MODEM and pc.line == (keep == OUT2)
    assert pc.get(MSR) & 0x0F == delta
    assert pc.cause() == NONE and not pc.line


def test_entering_and_leaving_loopback_changes_the_modem_lines_too() -> None:
    pc = Pc(ier=MSI)
    pc.out(MCR, LOOP | OUT2)
    assert pc.get(MSR) == 0x80 | 0x03  # DCD was and is up
    pc.out(MCR, OUT2)
    assert pc.get(MSR) == 0xB0 | 0x03


def test_the_causes_are_shown_by_their_priority() -> None:
    pc = Pc(ier=0x0F, mcr=OUT2 | LOOP)
    pc.out(DATA, 1)
    pc.out(DATA, 2)
    pc.out(MCR, OUT2 | LOOP | RTS)
    assert pc.cause() == LINE
    pc.get(LSR)
    assert pc.cause() == RECEIVED
    pc.get(DATA)
    assert pc.cause() == THRE
    assert pc.cause() == MODEM
    pc.get(MSR)
    assert pc.cause() == NONE


def test_out2_is_the_gate_of_the_line_but_not_of_iir() -> None:
    pc = Pc(ier=THRI, mcr=0)
    assert pc.pins.log == []
    pc.out(MCR, OUT2)
    assert pc.line
    pc.out(MCR, RTS)
    assert not pc.line and pc.cause() == THRE


def test_the_line_is_told_only_of_changes() -> None:
    pc = Pc(ier=RDI | THRI, fcr=FIFO[1])
    for _ in range(3):
        pc.wire.deliver(b"abc")
        pc.out(DATA, 5)
        pc.cause()
        pc.receive()
        pc.cause()
    levels = [level for _, level in pc.pins.log]
    assert levels == [i % 2 == 0 for i in range(len(levels))]


def test_reset_lowers_the_line_and_keeps_the_backend_waiting() -> None:
    pc = Pc(ier=RDI | THRI)
    pc.serial.reset()
    assert not pc.line
    pc.wire.deliver(b"x")
    assert pc.get(LSR) & DR == 0
    pc.out(IER, RDI)
    pc.wire.deliver()
    assert pc.get(DATA) == ord("x")


operations = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 7), st.none()),
        st.tuples(st.integers(0, 7), st.integers(0, 255)),
        st.tuples(st.just(-1), st.binary(min_size=1, max_size=20)),
        st.sampled_from([(IER, 3), (IER, 15), (MCR, OUT2), (FCR, 1), (LCR, 0), (LSR, None)]),
    ),
    max_size=60,
)


def drive(pc: Pc, sequence) -> list[object]:
    seen: list[object] = []
    for register, value in sequence:
        if register == -1:
            pc.wire.deliver(value)
        elif value is None:
            seen.append(pc.get(register))
        else:
            pc.out(register, value)
        pc.wire.deliver()
        seen.append(pc.line)
    return seen


@settings(deadline=None)
@given(operations, operations)
def test_a_restored_copy_goes_on_identically(before, after) -> None:
    pc, copy = Pc(), Pc(ier=15)
    drive(pc, [*before, (SCR, 1)])
    copy.serial.restore(pc.serial.state())
    copy.wire.incoming += pc.wire.incoming
    copy.wire.deliver()
    assert copy.serial.state() == pc.serial.state() and copy.line == pc.line
    assert drive(pc, after) == drive(copy, after)
    assert copy.serial.state() == pc.serial.state()


@settings(deadline=None)
@given(operations)
def test_the_line_is_high_whenever_iir_shows_a_cause_and_out2_is_set(sequence) -> None:
    pc = Pc()
    for step in sequence:
        drive(pc, [step])
        dlab = pc.get(LCR) & 0x80
        assert pc.line == (pc.get(MCR) & OUT2 != 0 and pc.serial._cause() != NONE), dlab


def test_input_and_output_from_threads_at_once_lose_nothing() -> None:
    pc = Pc(ier=RDI | THRI, fcr=FIFO[8])
    data = bytes(range(1, 256)) * 40
    got = bytearray()
    pc.wire.incoming += data
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    done = threading.Event()

    def loop() -> None:
        while not done.is_set():
            pc.wire.deliver()

    def sender() -> None:
        for _ in range(2000):
            pc.out(DATA, 0)
            pc.cause()

    threads = [threading.Thread(target=main, daemon=True) for main in (loop, sender)]
    for thread in threads:
        thread.start()
    while len(got) < len(data):
        if pc.get(LSR) & DR:
            got.append(pc.get(DATA))
    done.set()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert got == data and len(pc.wire.sent) == 2000


def test_what_a_guest_cannot_have_seen_is_not_cleared() -> None:
    """As Linux opens the port: the interrupt first, with no FIFO yet, and the FIFO only then."""
    pc = Pc(ier=RDI)
    pc.wire.deliver(b"uname")
    pc.out(FCR, 0x01)  # enabling the FIFO clears it
    pc.out(FCR, FIFO[8] | 0x02)  # as this bit does
    assert pc.receive() == b"uname"


def test_what_a_guest_knows_of_is_cleared() -> None:
    pc = Pc(ier=RDI, fcr=FIFO[1])
    for register in (LSR, IIR):
        pc.wire.deliver(b"old")
        assert pc.get(register) & (DR if register == LSR else RECEIVED)
        pc.wire.deliver(b"new")
        pc.out(FCR, FIFO[1] | 0x02)
        assert pc.receive() == b"new"
