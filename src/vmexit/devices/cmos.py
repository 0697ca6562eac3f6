"""The real-time clock and CMOS memory of a PC: an MC146818 at an index and a data register.

Names and behaviour are those of the Motorola MC146818A data sheet; the century register and the
memory sizes are those that PC firmware keeps there. The date and time are the host's, in UTC, until
the guest sets them: then it is the difference that is kept. Nothing runs while no interrupt is
enabled: flags are worked out when somebody looks.
"""

import threading
import time
from collections.abc import Callable

from vmexit.arch.x86.layout import RTC_CENTURY
from vmexit.core.bus import State
from vmexit.core.clock import Clock
from vmexit.core.irq import IrqLine
from vmexit.core.saved import Saved
from vmexit.devices.rtc_calendar import (
    SPAN,
    UNIX_EPOCH,
    Format,
    fields,
    next_alarm,
    seconds_of,
)

INDEX, DATA = 0, 1
INDEX_MASK = 0x7F  # bit 7 masks the NMI, which nothing raises here

ALARM = (1, 3, 5)  # seconds, minutes, hours
A, B, C, D = 10, 11, 12, 13
TIME = (0, 2, 4, 6, 7, 8, 9, RTC_CENTURY)  # in the order of rtc_calendar

A_UIP, A_DIVIDER, A_DIVIDER_RUNS, A_RATE = 1 << 7, 7 << 4, 2 << 4, 0xF
B_SET, B_PIE, B_AIE, B_UIE, B_BINARY, B_24H = 1 << 7, 1 << 6, 1 << 5, 1 << 4, 1 << 2, 1 << 1
C_IRQF, C_FLAGS = 1 << 7, B_PIE | B_AIE | B_UIE  # the flags have the places of their enables
D_VRT = 1 << 7
ALARM_ANY = 0xC0

EQUIPMENT, EQUIPMENT_FPU = 0x14, 1 << 1

SECOND = 1_000_000_000
UIP_BEFORE = 244_000  # ns between the rise of UIP and the update (data sheet, figure 15)
DIVIDER_FIRST = SECOND // 2  # ns from the release of the divider to the first update
CRYSTAL = 32768
# An alarm is looked for again after this time, as somebody may set the clock of the host.
MAX_SLEEP = 60 * SECOND


def memory_sizes(low: int, high: int) -> dict[int, int]:
    """The CMOS bytes for `low` bytes of RAM from 0 on and `high` from 4 GiB on."""
    base = min(low >> 10, 640)
    extended = min(max((low >> 10) - 1024, 0), 0xFFFF)  # KiB above 1 MiB
    above_16m = min(max((low >> 16) - 256, 0), 0xFFFF)  # 64 KiB units
    above_4g = min(high >> 16, 0xFF_FFFF)
    bytes_at = {}
    for index, value in ((0x15, base), (0x17, extended), (0x30, extended), (0x34, above_16m)):
        bytes_at[index], bytes_at[index + 1] = value & 0xFF, value >> 8
    for i in range(3):
        bytes_at[0x5B + i] = above_4g >> 8 * i & 0xFF
    return bytes_at


class Cmos:
    """Register 0 is the index, 1 the data. Any vCPU and the clock's thread may enter: one lock."""

    widths = (1,)

    def __init__(
        self,
        clock: Clock,
        irq: IrqLine,
        *,
        low_memory: int = 0,
        high_memory: int = 0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`low_memory` is the RAM below, `high_memory` that above 4 GiB, in bytes; `wall` gives
        the seconds since 1970 in UTC, and is called with the lock held.
        """
        self._clock = clock
        self._irq = irq
        self._wall = wall
        self._lock = threading.Lock()
        self._timer = clock.timer(self._due)
        self._level = False  # of the interrupt line
        self._ram = bytearray(128)
        self._ram[A] = A_DIVIDER_RUNS | 6  # 1024 Hz, as the BIOS of an AT sets it
        self._ram[B] = B_24H
        self._ram[EQUIPMENT] = EQUIPMENT_FPU
        for index, byte in memory_sizes(low_memory, high_memory).items():
            self._ram[index] = byte
        self._offset = 0  # ns that the guest's clock is ahead of the host's
        self._weekday_shift = 0
        self._seen_second = self._now() // SECOND  # up to here, flags are worked out
        self._seen_tick = self._tick()
        self.reset()

    def reset(self) -> None:
        """What the RESET pin does: no interrupts. A battery keeps time and memory."""
        with self._lock:
            self._look()
            self._index = 0
            self._ram[B] &= ~(B_PIE | B_AIE | B_UIE)
            self._ram[C] = 0
            self._update()

    # Time.

    def _now(self) -> int:
        """Nanoseconds since the year 1 on the guest's clock, if it runs."""
        host = UNIX_EPOCH * SECOND + int(self._wall() * SECOND)
        return (host + self._offset) % (SPAN * SECOND)

    def _tick(self) -> int:
        """Periods of the crystal."""
        return self._clock.now() * CRYSTAL // SECOND

    @property
    def _runs(self) -> bool:
        return not self._ram[B] & B_SET and self._ram[A] & A_DIVIDER == A_DIVIDER_RUNS

    @property
    def _format(self) -> Format:
        return Format(self._ram[B] & B_BINARY != 0, self._ram[B] & B_24H != 0)

    def _show(self) -> None:
        """Put the time into its registers."""
        shown = fields(self._now() // SECOND, self._weekday_shift, self._format)
        for index, value in zip(TIME, shown, strict=True):
            self._ram[index] = value

    def _set(self, fraction: int) -> None:
        """Go on from the time in the registers, `fraction` nanoseconds into that second."""
        registers = [self._ram[index] for index in TIME]
        seconds, self._weekday_shift = seconds_of(registers, self._format)
        self._offset = (self._offset + seconds * SECOND + fraction - self._now()) % (SPAN * SECOND)
        self._seen_second = seconds

    # Registers.

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            if offset == INDEX:
                return 0xFF  # it is write-only
            index = self._index
            if index in TIME:
                if self._runs:
                    self._show()
            elif index == A:
                return self._ram[A] | (A_UIP if self._update_is_near() else 0)
            elif index == C:
                self._look()
                flags = self._flags()
                self._ram[C] = 0
                self._update()
                return flags
            elif index == D:
                return D_VRT
            return self._ram[index]

    def _update_is_near(self) -> bool:
        return self._runs and self._now() % SECOND >= SECOND - UIP_BEFORE

    def _flags(self) -> int:
        flags = self._ram[C]
        return flags | (C_IRQF if flags & self._ram[B] else 0)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset == INDEX:
                self._index = value & INDEX_MASK
                return
            index = self._index
            self._look()
            if index in TIME:
                self._write_time(index, value)
            elif index in (A, B):
                self._control(index, value)
            elif index not in (C, D):
                self._ram[index] = value
            self._update()

    def _write_time(self, index: int, value: int) -> None:
        if not self._runs:
            self._ram[index] = value
            return
        self._show()
        self._ram[index] = value
        self._set(self._now() % SECOND)

    def _control(self, index: int, value: int) -> None:
        """Write A or B. The registers of a clock that stands still are what was written there."""
        ran, divider = self._runs, self._ram[A] & A_DIVIDER
        if ran:
            self._show()
        if index == A:
            self._ram[A] = value & ~A_UIP
        else:
            self._ram[B] = value & ~B_UIE if value & B_SET else value
        if self._runs and not ran:
            released = divider != A_DIVIDER_RUNS
            self._set(SECOND - DIVIDER_FIRST if released else self._now() % SECOND)

    # Interrupts.

    def _alarm(self) -> list[int | None]:
        form = self._format
        second, minute, hour = (self._ram[index] for index in ALARM)
        decoded = form.decode(second), form.decode(minute), form.decode_hour(hour)
        registers = second, minute, hour
        return [
            None if register >= ALARM_ANY else number
            for register, number in zip(registers, decoded, strict=True)
        ]

    def _period(self) -> int:
        """The ticks of the crystal from one periodic interrupt to the next, 0 for none."""
        rate = self._ram[A] & A_RATE
        if not rate or self._ram[A] & A_DIVIDER != A_DIVIDER_RUNS:
            return 0
        return 1 << (rate + 6 if rate < 3 else rate - 1)  # 1 and 2 are as 8 and 9

    def _look(self) -> None:
        """Set the flags for what has happened since the last time."""
        tick, period = self._tick(), self._period()
        if period and tick // period != self._seen_tick // period:
            self._ram[C] |= B_PIE
        self._seen_tick = tick
        if not self._runs:
            return
        second = self._now() // SECOND
        if second != self._seen_second:
            self._ram[C] |= B_UIE
            alarm = next_alarm(self._seen_second, self._alarm())
            if alarm is not None and alarm <= second:
                self._ram[C] |= B_AIE
            self._seen_second = second

    def _update(self) -> None:
        """Give the line its level, and while it is low, wait for what would raise it.

        A line that is high stays so until register C is read: there is nothing to wait for.
        """
        level = self._flags() & C_IRQF != 0
        if level is not self._level:
            self._level = level
            self._irq.set_level(level)
        waits = [] if level else self._waits()
        self._timer.set(self._clock.now() + min(waits) if waits else None)

    def _waits(self) -> list[int]:
        """Nanoseconds until each of the interrupts that are enabled; never 0."""
        enabled = self._ram[B] & C_FLAGS
        if not enabled:
            return []
        waits = []
        period = self._period()
        if enabled & B_PIE and period:
            due = -(-(self._seen_tick // period + 1) * period * SECOND // CRYSTAL)
            waits.append(max(1, due - self._clock.now()))
        if enabled & (B_UIE | B_AIE) and self._runs:
            second = self._seen_second + 1
            if not enabled & B_UIE:
                alarm = next_alarm(self._seen_second, self._alarm())
                if alarm is None:
                    return waits
                second = alarm
            # The clock of the host goes in fractions of microseconds.
            waits.append(min(max(1000, second * SECOND - self._now()), MAX_SLEEP))
        return waits

    def _due(self) -> None:
        with self._lock:
            self._look()
            self._update()

    # Saving.

    def state(self) -> State:
        """The time is saved as its difference to the host's: a restored clock shows what it is
        then.
        """
        with self._lock:
            self._look()
            self._update()
            return {
                "version": 1,
                "index": self._index,
                "ram": bytes(self._ram),
                "offset": self._offset,
                "weekday_shift": self._weekday_shift,
            }

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        saved = Saved(state, "a real-time clock", 1)
        index = saved.number("index", INDEX_MASK)
        ram = saved.data("ram", 128, 128)
        offset = saved.number("offset", SPAN * SECOND - 1)
        shift = saved.number("weekday_shift", 6)
        with self._lock:
            self._index, self._ram = index, bytearray(ram)
            self._ram[A] &= ~A_UIP
            self._ram[C] &= C_FLAGS
            self._offset, self._weekday_shift = offset, shift
            self._seen_second = self._now() // SECOND
            self._seen_tick = self._tick()
            self._level = self._flags() & C_IRQF != 0  # whatever the other end believes
            self._irq.set_level(self._level)
            self._update()
