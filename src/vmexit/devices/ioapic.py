"""I/O APIC (Intel 82093AA data sheet, section 3)."""

from collections.abc import Callable, Iterator

from vmexit.core.bus import State
from vmexit.core.saved import Saved
from vmexit.devices.lapic import FIXED, LOWEST_PRIORITY, NMI

PINS = 24

# Offsets of the two windows, and the registers that they reach.
REGISTER_SELECT, WINDOW = 0x00, 0x10
ID, VERSION, ARBITRATION, REDIRECTION = 0x00, 0x01, 0x02, 0x10

_VERSION = 0x11 | (PINS - 1) << 16

_REMOTE_IRR, _LEVEL, _MASKED, _LOGICAL = 1 << 14, 1 << 15, 1 << 16, 1 << 11
_READ_ONLY = 1 << 12 | _REMOTE_IRR  # delivery status, which is never "pending" here, too
_WRITABLE = 0xFF00_0000_0001_FFFF & ~_READ_ONLY

Send = Callable[[int, bool, int, int, bool], bool]


class Ioapic:
    """24 inputs, each with an entry that says which message it becomes. Callers hold the lock."""

    widths = (4,)

    def __init__(self, send: Send) -> None:
        """`send(destination, logical, mode, vector, level)` delivers a message to the LAPICs.

        It answers whether any has accepted it.
        """
        self._send = send
        self._lines = 0  # levels of the inputs
        self.reset()

    def reset(self) -> None:
        """All but the levels of the inputs, which are the devices'."""
        self._select = self._id = 0
        self._entries = [_MASKED] * PINS

    def read(self, offset: int, size: int) -> int:
        if offset == REGISTER_SELECT:
            return self._select
        if offset != WINDOW:
            return 0
        if self._select in (ID, ARBITRATION):
            return self._id << 24
        if self._select == VERSION:
            return _VERSION
        pin, high = divmod(self._select - REDIRECTION, 2)
        if 0 <= pin < PINS:
            return self._entries[pin] >> 32 * high & 0xFFFF_FFFF
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == REGISTER_SELECT:
            self._select = value & 0xFF
        elif offset == WINDOW:
            if self._select == ID:
                self._id = value >> 24 & 0xF
            pin, high = divmod(self._select - REDIRECTION, 2)
            if 0 <= pin < PINS:
                self._write_entry(pin, high, value)

    def _write_entry(self, pin: int, high: int, value: int) -> None:
        old = self._entries[pin]
        kept = old & (0xFFFF_FFFF << 32 * (1 - high))
        entry = (kept | value << 32 * high) & _WRITABLE | old & _READ_ONLY
        if not entry & _LEVEL:
            entry &= ~_REMOTE_IRR
        self._entries[pin] = entry
        self._deliver(pin)

    def set_level(self, pin: int, level: bool) -> None:
        """Raise or lower an input. An edge at a masked one is lost (3.2.4, interrupt mask)."""
        bit = 1 << pin
        if not level:
            self._lines &= ~bit
            return
        rises = not self._lines & bit
        self._lines |= bit
        if _is_level(self._entries[pin]):
            self._deliver(pin)
        elif rises and not self._entries[pin] & _MASKED:
            self._message(pin)

    def end_of_interrupt(self, vector: int) -> None:
        """A LAPIC is done with a level-triggered interrupt; it comes again if its line is up."""
        for pin, entry in enumerate(self._entries):
            if entry & _REMOTE_IRR and entry & 0xFF == vector:
                self._entries[pin] = entry & ~_REMOTE_IRR
                self._deliver(pin)

    def deliver_levels(self) -> None:
        """A LAPIC takes interrupts now: those that it refused come again."""
        for pin in range(PINS):
            self._deliver(pin)

    def nmi_targets(self) -> Iterator[tuple[int, bool]]:
        """Destinations of the inputs that are NMIs, and whether they are logical ones."""
        for entry in self._entries:
            if not entry & _MASKED and entry >> 8 & 7 == NMI:
                yield entry >> 56, bool(entry & _LOGICAL)

    def _deliver(self, pin: int) -> None:
        """Send the message of a level that is up, unless one is in service already."""
        entry = self._entries[pin]
        if not _is_level(entry) or entry & (_MASKED | _REMOTE_IRR) or not self._lines >> pin & 1:
            return
        # One that nobody has accepted has no end that could be waited for.
        if self._message(pin):
            self._entries[pin] |= _REMOTE_IRR

    def _message(self, pin: int) -> bool:
        entry = self._entries[pin]
        level, logical = bool(entry & _LEVEL), bool(entry & _LOGICAL)
        return self._send(entry >> 56, logical, entry >> 8 & 7, entry & 0xFF, level)

    def state(self) -> State:
        return {
            "version": 1,
            "select": self._select,
            "id": self._id,
            "lines": self._lines,
            "entries": list(self._entries),
        }

    def restore(self, state: State) -> None:
        """Raises ConfigError for what is no state of an I/O APIC."""
        saved = Saved(state, "an I/O APIC", 1)
        select, number = saved.number("select", 0xFF), saved.number("id", 0xF)
        lines = saved.number("lines", (1 << PINS) - 1)
        entries = saved.numbers("entries", (1 << 64) - 1, PINS)
        self._select, self._id, self._lines = select, number, lines
        self._entries = [n & (_WRITABLE | _READ_ONLY) for n in entries]


def _is_level(entry: int) -> bool:
    """Level-triggered, with an end of interrupt to come: an NMI and its like have none."""
    return bool(entry & _LEVEL) and entry >> 8 & 7 in (FIXED, LOWEST_PRIORITY)
