"""I/O APIC (Intel 82093AA data sheet, section 3)."""

from collections.abc import Callable

from vmexit.core.bus import State
from vmexit.core.errors import ConfigError

PINS = 24

# Offsets of the two windows, and the registers that they reach.
REGISTER_SELECT, WINDOW = 0x00, 0x10
ID, VERSION, ARBITRATION, REDIRECTION = 0x00, 0x01, 0x02, 0x10

_VERSION = 0x11 | (PINS - 1) << 16

_REMOTE_IRR, _LEVEL, _MASKED, _LOGICAL = 1 << 14, 1 << 15, 1 << 16, 1 << 11
_READ_ONLY = 1 << 12 | _REMOTE_IRR  # delivery status, which is never "pending" here, too
_WRITABLE = 0xFF00_0000_0001_FFFF & ~_READ_ONLY

Send = Callable[[int, bool, int, int, bool], None]


class Ioapic:
    """24 inputs, each with an entry that says which message it becomes. Callers hold the lock."""

    widths = (4,)

    def __init__(self, send: Send) -> None:
        """`send(destination, logical, mode, vector, level)` delivers a message to the LAPICs."""
        self._send = send
        self.reset()

    def reset(self) -> None:
        self._select = self._id = 0
        self._lines = 0  # levels of the inputs
        self._pending = 0  # edges that were not delivered yet
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
        """Raise or lower an input."""
        bit = 1 << pin
        if level:
            if not self._lines & bit and not self._entries[pin] & _LEVEL:
                self._pending |= bit
            self._lines |= bit
        else:
            self._lines &= ~bit
        self._deliver(pin)

    def end_of_interrupt(self, vector: int) -> None:
        """A LAPIC is done with a level-triggered interrupt; it comes again if its line is up."""
        for pin, entry in enumerate(self._entries):
            if entry & _REMOTE_IRR and entry & 0xFF == vector:
                self._entries[pin] = entry & ~_REMOTE_IRR
                self._deliver(pin)

    def _deliver(self, pin: int) -> None:
        entry, bit = self._entries[pin], 1 << pin
        if entry & _MASKED:
            return
        level = bool(entry & _LEVEL)
        if level:
            if not self._lines & bit or entry & _REMOTE_IRR:
                return
            self._entries[pin] |= _REMOTE_IRR
        else:
            if not self._pending & bit:
                return
            self._pending &= ~bit
        self._send(entry >> 56, bool(entry & _LOGICAL), entry >> 8 & 7, entry & 0xFF, level)

    def state(self) -> State:
        return {
            "version": 1,
            "select": self._select,
            "id": self._id,
            "lines": self._lines,
            "pending": self._pending,
            "entries": list(self._entries),
        }

    def restore(self, state: State) -> None:
        """Raises ConfigError for what is no state of an I/O APIC."""
        numbers = [state.get(name) for name in ("select", "id", "lines", "pending")]
        entries = state.get("entries")
        if (
            state.get("version") != 1
            or not isinstance(entries, list)
            or len(entries) != PINS
            or not all(isinstance(n, int) and 0 <= n < 1 << PINS for n in numbers)
            or not all(isinstance(n, int) and 0 <= n < 1 << 64 for n in entries)
        ):
            raise ConfigError("this is not the state of an I/O APIC, version 1; save it anew")
        select, number, lines, pending = (n for n in numbers if isinstance(n, int))
        self._select, self._id = select & 0xFF, number & 0xF
        self._lines, self._pending = lines, pending
        self._entries = [n & (_WRITABLE | _READ_ONLY) for n in entries]
