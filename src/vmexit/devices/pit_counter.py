"""One counter of an 8254, reckoned from the time: nothing has to run for it to count.

A count begins with the clock tick after the write, or the trigger, that loads it; `start` is that
tick, and what the counter shows follows from the ticks elapsed since.
"""

from vmexit.core.bus import State
from vmexit.core.saved import Saved

# The control word, of which a counter keeps six bits.
CONTROL_BCD = 1 << 0
ACCESS_LATCH, ACCESS_LSB, ACCESS_MSB, ACCESS_BOTH = 0x30, 1, 2, 3
STATUS_NULL, STATUS_OUT = 1 << 6, 1 << 7

# The modes by their names in the data sheet.
TERMINAL_COUNT, ONE_SHOT, RATE, SQUARE, SOFTWARE_STROBE, HARDWARE_STROBE = range(6)
_PERIODIC = (RATE, SQUARE)
_MODES = (*range(6), RATE, SQUARE)  # of the three bits that choose one, the highest may be ignored

_MAX_ELAPSED = 1 << 50  # thirty years
_MAX_AHEAD = 1 << 18  # four times the longest count


class Counter:
    """Times are in ticks. `gate` may be set by hand while nothing counts."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.gate = True
        self.count = 0  # what the counting element was loaded with, 0 before
        self._value = 0  # what it shows while nothing counts
        self._start: int | None = None
        self._held: int | None = None  # the ticks elapsed when the gate stopped it, modes 0 and 4
        self.set_control(ACCESS_BOTH << 4, 0)

    # The registers.

    def set_control(self, control: int, now: int) -> None:
        """A control word, bits 0 to 5; it stops the counter and forgets what was latched."""
        self._stop(now)
        self._control = control
        self.mode = _MODES[control >> 1 & 7]
        self.periodic = self.mode in _PERIODIC
        self.count = 0
        self._low: int | None = None  # the first byte of two written
        self._high_next = False  # the second byte of two is read next
        self._latch: int | None = None
        self._status: int | None = None

    def _stop(self, now: int) -> None:
        self._value = self._shown(now)
        self._start = self._held = None
        self._next: int | None = None  # a count written, and when it takes the place of `count`,
        self._switch: int | None = None  # if that is by itself
        # The next rising edge of OUT not yet taken, for a gate that is always high.
        self.rise: int | None = None

    def write(self, byte: int, now: int) -> None:
        access = self._control >> 4
        if access == ACCESS_LSB:
            self._set_count(byte, now)
        elif access == ACCESS_MSB:
            self._set_count(byte << 8, now)
        elif self._low is None:
            self._low = byte
            if self.mode == TERMINAL_COUNT:  # OUT falls and counting stops with the first byte
                self._stop(now)
                self.count = 0
        else:
            low, self._low = self._low, None
            self._set_count(byte << 8 | low, now)

    def read(self, now: int) -> int:
        if self._status is not None:
            status, self._status = self._status, None
            return status
        value = self._encoded(now) if self._latch is None else self._latch
        access = self._control >> 4
        if access == ACCESS_BOTH and not self._high_next:
            self._high_next = True
            return value & 0xFF
        self._high_next = False
        self._latch = None
        return value & 0xFF if access == ACCESS_LSB else value >> 8

    def latch_count(self, now: int) -> None:
        """What was latched before and not read stays."""
        if self._latch is None:
            self._latch = self._encoded(now)
            self._high_next = False

    def latch_status(self, now: int) -> None:
        if self._status is None:
            out = STATUS_OUT if self.out(now) else 0
            waiting = self._next is not None or not self.count
            loading = self._start is not None and now < self._start
            null = STATUS_NULL if waiting or loading else 0
            self._status = out | null | self._control

    # Counting.

    def _set_count(self, raw: int, now: int) -> None:
        self._sync(now)
        count = _decoded(raw) if self._control & CONTROL_BCD else raw or 0x10000
        if self.mode in (TERMINAL_COUNT, SOFTWARE_STROBE):
            self._stop(now)
            if self.gate:
                self._begin(count, now)
            else:
                self.count = count
                self._held = 0
        elif not self.periodic or not self.gate:
            self._next = count  # until a trigger
        elif self._start is None or now < self._start:
            self._begin(count, now)
        else:
            # It is loaded at the end of the period; in mode 3, of the half.
            self._start += (now - self._start) // self.count * self.count
            half = self._start + (self.count + 1) // 2
            end = self._start + self.count
            self._next = count
            if self.mode == SQUARE and now < half:
                self._switch, self.rise = half, half + count // 2
            else:
                self._switch = self.rise = end

    def _begin(self, count: int, now: int) -> None:
        """Load the counting element with the next tick."""
        self.count = count
        self._start = now + 1
        self._next = self._switch = None
        self.rise = self._start + count + (self.mode == SOFTWARE_STROBE)

    def _sync(self, now: int) -> None:
        """Do what has happened by itself: a new count has taken the place of the old one."""
        if self._switch is None or now < self._switch:
            return
        assert self._next is not None and self._start is not None
        at, half_done = self._switch, self._switch < self._start + self.count
        self.count = self._next
        self._next = self._switch = None
        self._start = at
        if half_done:  # go on with the low half of the new count
            self._start -= (self.count + 1) // 2

    def set_gate(self, gate: bool, now: int) -> None:
        if gate is self.gate:
            return
        self._sync(now)
        self.gate = gate
        if self.mode in (TERMINAL_COUNT, SOFTWARE_STROBE):
            if gate and self._held is not None:
                self._start, self._held = now - self._held, None
            elif not gate and self._start is not None:
                self._held, self._start, self.rise = max(0, now - self._start), None, None
        elif gate:  # a trigger
            count = self._next or self.count
            if count:
                self._begin(count, now)
        elif self.periodic:
            waiting = self._next
            self._stop(now)
            self._next = waiting

    def _elapsed(self, now: int) -> int | None:
        return self._held if self._start is None else now - self._start

    def out(self, now: int) -> bool:
        """The level of OUT."""
        self._sync(now)
        elapsed = self._elapsed(now)
        if self.mode == TERMINAL_COUNT:
            return elapsed is not None and elapsed >= self.count
        if self._start is None or elapsed is None or elapsed < 0:
            return True
        if self.mode == ONE_SHOT:
            return elapsed >= self.count
        if self.mode == RATE:
            return elapsed % self.count != self.count - 1
        if self.mode == SQUARE:
            return elapsed % self.count < (self.count + 1) // 2
        return elapsed != self.count

    def take_rises(self, now: int) -> bool:
        """Whether OUT has risen since the last call, however often. It sets `rise` to the next."""
        self._sync(now)
        if self.rise is None or now < self.rise:
            return False
        self.rise = None
        if self.periodic and self._start is not None:
            self.rise = self._start + ((now - self._start) // self.count + 1) * self.count
        return True

    def _shown(self, now: int) -> int:
        """The number in the counting element; 65536 (in BCD 10000) is shown as 0."""
        elapsed = self._elapsed(now)
        if elapsed is None:
            return self._value
        elapsed = max(0, elapsed)
        if self.mode == RATE:
            return self.count - elapsed % self.count
        if self.mode == SQUARE:  # by twos, from an even number down, once in each half
            half = (self.count + 1) // 2
            position = elapsed % self.count
            return self.count // 2 * 2 - 2 * (position if position < half else position - half)
        return self.count - elapsed  # below 0 it goes on from the top

    def _encoded(self, now: int) -> int:
        self._sync(now)
        value = self._shown(now)
        if not self._control & CONTROL_BCD:
            return value & 0xFFFF
        value %= 10000
        return int(f"{value:04}", 16)

    # Saving.

    def state(self, now: int) -> State:
        self._sync(now)
        return {
            "gate": self.gate,
            "control": self._control,
            "count": self.count,
            "next": self._next,
            "value": self._value & 0xFFFF,
            "elapsed": None if self._start is None else now - self._start,
            "held": self._held,
            "switch": None if self._switch is None else self._switch - now,
            "rise": None if self.rise is None else self.rise - now,
            "low": self._low,
            "high_next": self._high_next,
            "latch": self._latch,
            "status": self._status,
        }

    @staticmethod
    def checked(saved: Saved) -> dict[str, int | None]:
        """The values of a saved state. Raises ConfigError."""
        values: dict[str, int | None] = {
            "gate": saved.flag("gate"),
            "control": saved.number("control", 0x3F, 1 << 4),
            "count": saved.number("count", 0x10000),
            "next": saved.optional("next", 0x10000, 1),
            "value": saved.number("value", 0xFFFF),
            "elapsed": saved.optional("elapsed", _MAX_ELAPSED, -1),
            "held": saved.optional("held", _MAX_ELAPSED),
            "switch": saved.optional("switch", 0x10000, 1),
            "rise": saved.optional("rise", _MAX_AHEAD, -_MAX_ELAPSED),
            "low": saved.optional("low", 0xFF),
            "high_next": saved.flag("high_next"),
            "latch": saved.optional("latch", 0xFFFF),
            "status": saved.optional("status", 0xFF),
        }
        counting = values["elapsed"] is not None
        if (
            (counting and values["held"] is not None)
            or ((counting or values["held"] is not None) and not values["count"])
            or (values["switch"] is not None and (not counting or not values["next"]))
            or (values["rise"] is not None and not counting)
        ):
            raise saved.error()
        return values

    def restore(self, values: dict[str, int | None], now: int) -> None:
        """Take over what `checked` gave."""

        def tick(ahead: int | None) -> int | None:
            return None if ahead is None else now + ahead

        self.set_control(values["control"] or 0, now)
        self.gate = bool(values["gate"])
        self.count = values["count"] or 0
        self._value = values["value"] or 0
        elapsed = values["elapsed"]
        self._start = None if elapsed is None else now - elapsed
        self._held = values["held"]
        self._next, self._switch = values["next"], tick(values["switch"])
        self.rise = tick(values["rise"])
        self._low, self._high_next = values["low"], bool(values["high_next"])
        self._latch, self._status = values["latch"], values["status"]


def _decoded(raw: int) -> int:
    """A count in BCD. Digits above 9 mean nothing, but may be written."""
    count = sum((raw >> 4 * i & 0xF) * 10**i for i in range(4))
    return min(count, 10000) or 10000
