"""The UART behaves as the data sheet of the PC16550D says (section 8), for a guest that polls it.

Where it matters it is driven at random, and from several threads at once.
"""

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError
from vmexit.devices.serial import Serial

# The register map of the data sheet, table 2; not imported, so that it is checked.
DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
DLAB, LOOP, FIFO_ON = 0x80, 0x10, 0x01
DR, OE, THRE, TEMT = 0x01, 0x02, 0x20, 0x40


class Wire:
    """A backend: gives `incoming` in pieces as they are asked for, keeps what is sent."""

    def __init__(self, incoming: bytes = b"") -> None:
        self.incoming = bytearray(incoming)
        self.sent = bytearray()

    def write(self, data: bytes) -> None:
        self.sent += data

    def read(self, size: int) -> bytes:
        assert size > 0
        data = bytes(self.incoming[:size])
        del self.incoming[:size]
        return data


def uart(incoming: bytes = b"", *, fifo: bool = False) -> tuple[Serial, Wire]:
    wire = Wire(incoming)
    serial = Serial(wire)
    if fifo:
        serial.write(FCR, 1, FIFO_ON)
    return serial, wire


def receive(serial: Serial) -> bytes:
    """What a polling driver reads until there is no more."""
    data = bytearray()
    while serial.read(LSR, 1) & DR:
        data.append(serial.read(DATA, 1))
    return bytes(data)


def check_reset_state(serial: Serial) -> None:
    """Data sheet, table 1; MSR is that of a terminal that is there: DCD, DSR, CTS."""
    assert [serial.read(r, 1) for r in (IER, IIR, LCR, MCR, LSR)] == [0, 0x01, 0, 0, THRE | TEMT]
    assert serial.read(MSR, 1) == 0xB0
    serial.write(LCR, 1, DLAB)
    assert serial.read(DATA, 1) | serial.read(IER, 1) << 8 == 12  # 115200 / 12 = 9600 baud
    serial.write(LCR, 1, 0)


def test_the_registers_have_their_reset_values_at_first_and_after_reset() -> None:
    serial, _ = uart()
    check_reset_state(serial)
    for register in (IER, FCR, LCR, MCR, SCR):
        serial.write(register, 1, 0x1F)
    for _ in range(20):
        serial.write(DATA, 1, 0x55)  # looped back, until it overruns
    serial.reset()
    check_reset_state(serial)


def test_what_the_guest_writes_is_sent_in_order_and_the_transmitter_is_always_ready() -> None:
    serial, wire = uart()
    for byte in b"hello\r\n\0\xff":
        assert serial.read(LSR, 1) & (THRE | TEMT) == THRE | TEMT
        serial.write(DATA, 1, byte)
    assert wire.sent == b"hello\r\n\0\xff"


@pytest.mark.parametrize("fifo", [False, True])
def test_what_arrives_is_read_in_order_and_none_of_it_is_lost(fifo) -> None:
    data = bytes(range(256)) * 3
    serial, wire = uart(data, fifo=fifo)
    assert receive(serial) == data
    assert serial.read(LSR, 1) & (DR | OE) == 0 and not wire.sent


@pytest.mark.parametrize(("fifo", "depth"), [(False, 1), (True, 16)])
def test_the_receiver_takes_as_much_as_it_holds_and_the_backend_keeps_the_rest(fifo, depth) -> None:
    serial, wire = uart(bytes(40), fifo=fifo)
    for _ in range(5):
        assert serial.read(LSR, 1) & (DR | OE) == DR
    assert len(wire.incoming) == 40 - depth
    serial.read(DATA, 1)
    serial.read(LSR, 1)
    assert len(wire.incoming) == 40 - depth - 1


def test_reading_an_empty_receiver_gives_zero_and_takes_nothing() -> None:
    serial, _ = uart()
    assert [serial.read(DATA, 1) for _ in range(3)] == [0, 0, 0]


def test_with_the_divisor_latch_open_the_first_two_registers_are_the_divisor() -> None:
    serial, wire = uart(b"x")
    serial.write(IER, 1, 0x05)
    assert serial.read(LSR, 1) & DR
    serial.write(LCR, 1, DLAB | 0x03)
    serial.write(DATA, 1, 0x34)
    serial.write(IER, 1, 0x12)
    assert (serial.read(DATA, 1), serial.read(IER, 1)) == (0x34, 0x12)
    assert serial.read(LCR, 1) == DLAB | 0x03
    serial.write(LCR, 1, 0x03)
    assert (serial.read(IER, 1), serial.read(DATA, 1)) == (0x05, ord("x"))
    assert not wire.sent
    serial.write(LCR, 1, DLAB)
    for low, high in ((0x34, 0x12), (0x43, 0x21), (0, 0xFF)):
        serial.write(IER, 1, high)
        serial.write(DATA, 1, low)
        assert (serial.read(DATA, 1), serial.read(IER, 1)) == (low, high)


@pytest.mark.parametrize("ier", range(16))
def test_no_interrupt_is_ever_pending_and_bits_6_and_7_tell_of_the_fifo(ier) -> None:
    serial, _ = uart(b"data")
    serial.write(IER, 1, ier)
    assert serial.read(LSR, 1) & DR
    assert serial.read(IIR, 1) == 0x01
    serial.write(FCR, 1, FIFO_ON)
    assert serial.read(IIR, 1) == 0xC1
    serial.write(FCR, 1, 0)
    assert serial.read(IIR, 1) == 0x01


@pytest.mark.parametrize(("register", "kept"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF)])
def test_a_register_keeps_the_bits_that_it_has(register, kept) -> None:
    serial, _ = uart()
    for value in (0xFF, 0, 0xA5, 0x5A):
        serial.write(register, 1, value)
        assert serial.read(register, 1) == value & kept
        serial.write(LCR, 1, 0)


def test_status_registers_are_not_changed_by_writing() -> None:
    serial, _ = uart()
    for register in (LSR, MSR):
        before = serial.read(register, 1)
        serial.write(register, 1, before ^ 0xFF)
        assert serial.read(register, 1) == before


def test_in_loopback_the_guest_reads_what_it_writes_and_nothing_goes_out_or_comes_in() -> None:
    serial, wire = uart(b"outside", fifo=True)
    serial.write(MCR, 1, LOOP)
    for byte in b"inside":
        serial.write(DATA, 1, byte)
    assert receive(serial) == b"inside"
    assert (bytes(wire.sent), bytes(wire.incoming)) == (b"", b"outside")
    serial.write(MCR, 1, 0)
    assert receive(serial) == b"outside"


@pytest.mark.parametrize(
    ("output", "status"), [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)]
)
def test_in_loopback_each_modem_output_is_a_modem_input(output, status) -> None:
    """Data sheet, 8.6: CTS is RTS, DSR is DTR, RI is OUT1, DCD is OUT2."""
    serial, _ = uart()
    serial.write(MCR, 1, LOOP | output)
    assert serial.read(MSR, 1) & 0xF0 == status
    serial.write(MCR, 1, LOOP | 0x0F ^ output)
    assert serial.read(MSR, 1) & 0xF0 == 0xF0 ^ status


def test_the_fifo_holds_16_bytes_and_the_17th_is_lost_with_an_overrun_shown_once() -> None:
    """Data sheet, 8.4, bit 1: in FIFO mode the new character is lost, the FIFO stays."""
    serial, _ = uart(fifo=True)
    serial.write(MCR, 1, LOOP)
    for byte in range(16):
        serial.write(DATA, 1, byte)
    assert serial.read(LSR, 1) == DR | THRE | TEMT
    serial.write(DATA, 1, 0x99)
    assert serial.read(LSR, 1) == DR | OE | THRE | TEMT
    assert serial.read(LSR, 1) == DR | THRE | TEMT
    assert receive(serial) == bytes(range(16))


def test_without_fifo_an_overrun_destroys_the_character_that_was_not_read() -> None:
    """Data sheet, 8.4, bit 1: "... was not read before the next character was transferred into
    the Receiver Buffer Register, thereby destroying the previous character"."""
    serial, _ = uart()
    serial.write(MCR, 1, LOOP)
    serial.write(DATA, 1, ord("1"))
    serial.write(DATA, 1, ord("2"))
    assert serial.read(LSR, 1) & (DR | OE) == DR | OE
    assert serial.read(DATA, 1) == ord("2")
    assert serial.read(LSR, 1) & (DR | OE) == 0


@pytest.mark.parametrize("value", [0x00, 0x03, 0x02])
def test_clearing_the_receiver_or_switching_the_fifo_empties_it(value) -> None:
    serial, wire = uart(b"0123456789", fifo=True)
    assert serial.read(LSR, 1) & DR
    assert not wire.incoming
    serial.write(FCR, 1, value)
    assert serial.read(LSR, 1) & DR == 0


@pytest.mark.parametrize("value", [FIFO_ON, 0xC1, 0x05])
def test_setting_the_trigger_level_or_clearing_the_transmitter_keeps_what_was_received(
    value,
) -> None:
    serial, _ = uart(b"0123456789", fifo=True)
    assert serial.read(LSR, 1) & DR
    serial.write(FCR, 1, value)
    assert receive(serial) == b"0123456789"


def test_a_wide_access_to_the_ports_is_made_of_bytes() -> None:
    serial, wire = uart()
    bus = Bus("port")
    bus.attach(0x3F8, 8, serial)
    bus.write(0x3F8, 2, 0x0541)  # THR and IER
    assert wire.sent == b"A" and serial.read(IER, 1) == 0x05
    assert bus.read(0x3FC, 4) == 0x00B0_6000  # MCR, LSR, MSR, SCR


operations = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 7), st.none()),
        st.tuples(st.integers(0, 7), st.integers(0, 255)),
        st.tuples(st.just(DATA), st.integers(0, 255)),
        st.sampled_from([(LSR, None), (MCR, LOOP), (MCR, 0), (FCR, FIFO_ON), (LCR, 0)]),
    ),
    max_size=80,
)


def drive(serial: Serial, sequence: list[tuple[int, int | None]]) -> list[int]:
    """Do the accesses; returns what was read."""
    seen = []
    for register, value in sequence:
        if value is None:
            seen.append(serial.read(register, 1))
            assert 0 <= seen[-1] <= 0xFF
        else:
            serial.write(register, 1, value)
        received = serial.state()["received"]
        assert isinstance(received, bytes) and len(received) <= 16
    return seen


@settings(deadline=None)
@given(st.binary(max_size=40), operations, operations)
def test_any_accesses_are_answered_and_a_restored_copy_goes_on_identically(
    incoming, before, after
) -> None:
    serial, wire = uart(incoming)
    drive(serial, before)
    state = serial.state()
    copy, copy_wire = uart(bytes(wire.incoming))
    drive(copy, before[:5])  # whatever it was before
    copy_wire.incoming[:], copy_wire.sent[:] = wire.incoming, wire.sent
    copy.restore(state)
    assert copy.state() == state
    assert drive(serial, after) == drive(copy, after)
    assert (serial.state(), wire.sent) == (copy.state(), copy_wire.sent)


def test_an_overrun_that_nobody_has_seen_yet_is_seen_after_a_restore() -> None:
    serial, _ = uart()
    serial.write(MCR, 1, LOOP)
    serial.write(DATA, 1, 1)
    serial.write(DATA, 1, 2)
    copy, _ = uart()
    copy.restore(serial.state())
    assert copy.read(LSR, 1) & OE
    assert not copy.read(LSR, 1) & OE


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1}, {"version": None}, {"ier": None}, {"lcr": "3"}, {"divisor": 0x10000},
        {"scr": -1}, {"received": bytes(17)}, {"received": "text"}, {"received": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_state_of_a_serial_port_is_refused_and_changes_nothing(change) -> None:
    serial, _ = uart()
    serial.write(SCR, 1, 0x77)
    before = serial.state()
    with pytest.raises(ConfigError, match="; "):
        serial.restore(before | {"scr": 1} | change)
    with pytest.raises(ConfigError):
        serial.restore({})
    assert serial.state() == before


class Pipe:
    """A backend over a real pipe, as a chardev is: its calls release the GIL."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe()
        os.set_blocking(self.out, False)
        self.sent: list[bytes] = []

    def read(self, size: int) -> bytes:
        try:
            return os.read(self.out, size)
        except BlockingIOError:
            return b""

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)


def in_threads(count: int, target: Callable[[int], None]) -> None:
    """Run `target(index)` in so many threads that switch often; what it raises is raised here."""
    errors: list[BaseException] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def main(index: int) -> None:
        try:
            target(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=main, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("fifo", [False, True])
def test_four_vcpus_that_poll_at_once_neither_lose_nor_double_a_received_byte(fifo) -> None:
    pipe = Pipe()
    serial = Serial(pipe)
    serial.write(FCR, 1, int(fifo))
    data = bytes(range(1, 256)) * 150  # no 0: that is what an empty receiver gives
    os.write(pipe.into, data)
    got: list[Counter[int]] = [Counter() for _ in range(4)]
    overruns = Counter()

    def vcpu(index: int) -> None:
        while True:
            status = serial.read(LSR, 1)
            overruns[index] += status & OE
            if not status & DR:
                return
            got[index][serial.read(DATA, 1)] += 1

    in_threads(4, vcpu)
    got[0].update(receive(serial))  # a thread may stop while another has not read its byte yet
    total = sum(got, Counter())
    del total[0]
    pipe.close()
    assert (total, sum(overruns.values())) == (Counter(data), 0)


def test_a_vcpu_that_polls_while_another_takes_bytes_from_the_backend_makes_none_get_lost() -> None:
    serial, wire = uart(bytes(range(1, 21)), fifo=True)
    take, others = wire.read, []

    def meanwhile(size: int) -> bytes:
        if not others:
            others.append(threading.Thread(target=serial.read, args=(LSR, 1)))
            others[0].start()
            others[0].join(timeout=0.5)  # a serial port that lets only one poll makes it wait
        return take(size)

    wire.read = meanwhile  # type: ignore[method-assign]
    status = serial.read(LSR, 1)
    others[0].join()
    assert receive(serial) == bytes(range(1, 21))
    assert status & OE == 0


def test_four_vcpus_that_send_at_once_neither_lose_nor_double_a_byte_and_keep_their_order() -> None:
    pipe = Pipe()
    serial = Serial(pipe)

    def vcpu(index: int) -> None:
        for i in range(1000):
            serial.write(SCR, 1, i & 0xFF)
            serial.write(DATA, 1, index << 6 | i & 0x3F)
            serial.read(LSR, 1)

    in_threads(4, vcpu)
    pipe.close()
    sent = b"".join(pipe.sent)
    assert len(sent) == 4000
    for index in range(4):
        assert [b & 0x3F for b in sent if b >> 6 == index] == [i & 0x3F for i in range(1000)]


def test_while_the_output_of_one_vcpu_waits_for_its_reader_others_can_use_the_port() -> None:
    answers: list[int] = []

    class Slow(Wire):
        def write(self, data: bytes) -> None:
            other = threading.Thread(
                target=lambda: answers.append(serial.read(LSR, 1)), daemon=True
            )
            other.start()
            other.join(timeout=10)  # for ever, if the port were locked

    serial = Serial(Slow())
    serial.write(DATA, 1, 0x41)
    assert answers == [THRE | TEMT]


def test_random_accesses_reset_and_restore_from_four_threads_never_raise() -> None:
    pipe = Pipe()
    serial = Serial(pipe)
    os.write(pipe.into, bytes(range(256)) * 20)

    def vcpu(index: int) -> None:
        for i in range(4000):
            register = (i * 7 + index) % 8
            if index == 0 and i % 50 == 0:
                serial.restore(serial.state())
            if index == 1 and i % 70 == 0:
                serial.reset()
            if i % 3:
                serial.read(register, 1)
            else:
                serial.write(register, 1, i * 31 + index & 0xFF)
            received = serial.state()["received"]
            assert isinstance(received, bytes) and len(received) <= 16

    in_threads(4, vcpu)
    pipe.close()
