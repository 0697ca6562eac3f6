"""The 8254 interval timer of a PC: three counters, and port 0x61, which belongs to the third.

Names and behaviour are those of the Intel 8254 data sheet (231164). Counter 0 drives an interrupt
line; the gate of counter 2 and its output are at port 0x61. The interrupt line tells of rising
edges of OUT when they are due, and of its falling only with the next of them: no controller input
that the PIT has on a PC sees a difference.
"""

import threading

from vmexit.core.bus import State
from vmexit.core.clock import Clock
from vmexit.core.irq import IrqLine
from vmexit.core.saved import Saved
from vmexit.devices.pit_counter import ACCESS_LATCH, Counter
from vmexit.devices.window import Window

FREQUENCY = 1_193_182  # Hz: a third of the colour burst of NTSC
SECOND = 1_000_000_000

CONTROL, PORT61 = 3, 4
READ_BACK = 3
READ_BACK_NO_COUNT, READ_BACK_NO_STATUS = 1 << 5, 1 << 4

PORT61_GATE2 = 1 << 0
PORT61_WRITABLE = 0x0F  # gate, speaker, and two NMI masks
PORT61_REFRESH, PORT61_OUT2 = 1 << 4, 1 << 5
REFRESH_TICKS = 18  # what a BIOS gives counter 1: memory was refreshed each 15 µs

# A guest may ask for a million interrupts a second. The host serves one each 100 µs.
MIN_TICKS = 120


def _ticks(nanoseconds: int) -> int:
    return nanoseconds * FREQUENCY // SECOND


def _nanoseconds(tick: int) -> int:
    """The first nanosecond at which the tick has come."""
    return -(-tick * SECOND // FREQUENCY)


class Pit:
    """Registers 0 to 3 are the chip's, 4 is port 0x61.

    Any vCPU and the clock's thread may enter; one lock guards it all.
    """

    widths = (1,)

    def __init__(self, clock: Clock, irq: IrqLine) -> None:
        self._clock = clock
        self._irq = irq
        self._lock = threading.Lock()
        self._timer = clock.timer(self._due)
        self._counters = (Counter(), Counter(), Counter())
        self._served = 0  # when the last edge was
        self.port61 = Window(self, PORT61)
        self.reset()

    def reset(self) -> None:
        """Nothing counts. (The data sheet leaves the state after power-on open.)"""
        with self._lock:
            for counter in self._counters:
                counter.reset()
            self._port61 = 0
            self._counters[2].gate = False
            self._timer.set(None)
            self._irq.set_level(self._counters[0].out(self._now()))

    def _now(self) -> int:
        return _ticks(self._clock.now())

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            now = self._now()
            if offset == PORT61:
                refresh = PORT61_REFRESH if now // REFRESH_TICKS & 1 else 0
                out = PORT61_OUT2 if self._counters[2].out(now) else 0
                return self._port61 | refresh | out
            if offset == CONTROL:
                return 0xFF  # the data bus stays in its third state
            return self._counters[offset].read(now)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            now = self._now()
            if offset == PORT61:
                self._port61 = value & PORT61_WRITABLE
                self._counters[2].set_gate(value & PORT61_GATE2 != 0, now)
                return
            which = value >> 6 if offset == CONTROL else offset
            if which == READ_BACK:
                self._read_back(value, now)
                return
            counter = self._counters[which]
            if offset == CONTROL and not value & ACCESS_LATCH:
                counter.latch_count(now)
                return
            if which == 0:
                self._deliver(now)  # what was due before
            if offset == CONTROL:
                counter.set_control(value & 0x3F, now)
            else:
                counter.write(value, now)
            if which == 0:
                self._irq.set_level(counter.out(now))
                self._arm(now)

    def _read_back(self, command: int, now: int) -> None:
        for which, counter in enumerate(self._counters):
            if command >> which + 1 & 1:
                if not command & READ_BACK_NO_COUNT:
                    counter.latch_count(now)
                if not command & READ_BACK_NO_STATUS:
                    counter.latch_status(now)

    def _due(self) -> None:
        with self._lock:
            now = self._now()
            self._deliver(now)
            self._arm(now)

    def _deliver(self, now: int) -> None:
        """One edge for all that have been due: a host that is late does not flood the guest."""
        if self._counters[0].take_rises(now):
            self._served = now
            self._irq.set_level(False)
            self._irq.set_level(True)

    def _arm(self, now: int) -> None:
        counter = self._counters[0]
        rise = counter.rise
        if rise is None:
            self._timer.set(None)
        elif counter.periodic:
            self._timer.set(_nanoseconds(max(rise, self._served + MIN_TICKS)))
        else:
            self._timer.set(_nanoseconds(rise))

    def state(self) -> State:
        """Times are relative to the moment of the call."""
        with self._lock:
            now = self._now()
            counters = {f"counter{i}": c.state(now) for i, c in enumerate(self._counters)}
            return {"version": 1, "port61": self._port61, **counters}

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        saved = Saved(state, "an 8254 timer", 1)
        port61 = saved.number("port61", PORT61_WRITABLE)
        checked = [Counter.checked(saved.part(f"counter{i}")) for i in range(3)]
        with self._lock:
            now = self._now()
            for counter, values in zip(self._counters, checked, strict=True):
                counter.restore(values, now)
            self._port61 = port61
            self._irq.set_level(self._counters[0].out(now))
            self._arm(now)
