"""Ports by which a guest resets the machine, switches it off, and reads the ACPI timer."""

import threading
from collections.abc import Callable

from vmexit.core.bus import State
from vmexit.core.clock import Clock
from vmexit.core.irq import IrqLine
from vmexit.core.saved import Saved

PORT92_RESET, PORT92_A20 = 1 << 0, 1 << 1


class Port92:
    """System control port A of the PS/2. A20 is always on.

    It has no state; any vCPU may enter, and the callback must allow that.
    """

    widths = (1,)

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine

    def read(self, offset: int, size: int) -> int:
        return PORT92_A20

    def write(self, offset: int, size: int, value: int) -> None:
        if value & PORT92_RESET:
            self._reset_machine()

    def reset(self) -> None:
        """It has no state."""

    def state(self) -> State:
        return {"version": 1}

    def restore(self, state: State) -> None:
        """It has no state."""


RESET_OFFSET = 1  # 0xcf9 in 0xcf8 to 0xcfb
RESET_HARD, RESET_CPU, RESET_FULL = 1 << 1, 1 << 2, 1 << 3


class ResetControl:
    """The reset control register (82371 PIIX, RC): a rising RST_CPU resets the machine.

    It answers at the four ports from 0xcf8 on, so that what a guest writes there as one 32-bit
    access, to look for PCI, is the address of a PCI function and no reset; PCI there is none.
    Any vCPU may enter; the callback is called without the lock.
    """

    widths = (1, 2, 4)

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine
        self._lock = threading.Lock()
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        if offset == RESET_OFFSET and size == 1:
            return self._value
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset != RESET_OFFSET or size != 1:
            return
        with self._lock:
            rises = value & ~self._value & RESET_CPU
            self._value = value & (RESET_HARD | RESET_CPU | RESET_FULL)
        if rises:
            self._reset_machine()

    def reset(self) -> None:
        with self._lock:
            self._value = 0

    def state(self) -> State:
        return {"version": 1, "value": self._value}

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        value = Saved(state, "a reset control register", 1).number("value", 0xFF)
        with self._lock:
            self._value = value & (RESET_HARD | RESET_CPU | RESET_FULL)


# ACPI 6.4, 4.8.3: offsets of the registers, and their bits.
PM1_STS, PM1_EN, PM1_CNT, PM_TMR = 0, 2, 4, 8
PM_SIZE = 12
TMR, GBL, PWRBTN = 1 << 0, 1 << 5, 1 << 8  # in PM1_STS and, to enable the SCI, in PM1_EN
RTC = 1 << 10  # never happens (FIX_RTC in the FADT), but Linux enables it and looks whether it is
PM1_EN_BITS = TMR | GBL | PWRBTN | RTC
CNT_SCI_EN, CNT_BM_RLD, CNT_SLP_TYP, CNT_SLP_EN = 1 << 0, 1 << 1, 7 << 10, 1 << 13
SLP_TYP_SHIFT, S5 = 10, 5

PM_FREQUENCY = 3_579_545  # Hz
SECOND = 1_000_000_000


class AcpiPm:
    """PM1a event block at 0, PM1a control block at 4, PM timer at 8: one device of 12 bytes.

    The machine is always in ACPI mode. Besides the power button there is only the timer, of 32
    bits, whose highest bit sets TMR_STS with each change: each ten minutes. S5 is the only sleep
    state. Any vCPU, the event loop and `press_power_button` may enter: one lock; the callback is
    called without it.
    """

    widths = (1, 2, 4)

    def __init__(self, clock: Clock, sci: IrqLine, power_off: Callable[[], None]) -> None:
        self._clock = clock
        self._sci = sci
        self._power_off = power_off
        self._lock = threading.Lock()
        self._timer = clock.timer(self._due)
        self._level = False
        self._zero = 0  # the tick of the clock at which the timer was 0
        self.reset()

    def reset(self) -> None:
        """No events, and the timer begins at 0."""
        with self._lock:
            self._status = self._enable = self._control = 0
            self._zero = self._tick()
            self._seen = 0  # the halves of the timer's range that TMR_STS tells of
            self._update()

    def press_power_button(self) -> None:
        """Tell the guest that the user wants it to shut down."""
        with self._lock:
            self._status |= PWRBTN
            self._update()

    def _tick(self) -> int:
        return self._clock.now() * PM_FREQUENCY // SECOND

    def _elapsed(self) -> int:
        return self._tick() - self._zero

    def _look(self) -> None:
        """Set TMR_STS if the highest bit of the timer has changed since the last time."""
        halves = self._elapsed() >> 31
        if halves != self._seen:
            self._seen = halves
            self._status |= TMR

    def _update(self) -> None:
        level = self._status & self._enable != 0
        if level is not self._level:
            self._level = level
            self._sci.set_level(level)
        due = None
        if self._enable & ~self._status & TMR:
            due = -(-(self._zero + (self._seen + 1 << 31)) * SECOND // PM_FREQUENCY)
        self._timer.set(due)

    def _due(self) -> None:
        with self._lock:
            self._look()
            self._update()

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            if offset >= PM_TMR:
                registers = (self._elapsed() & 0xFFFF_FFFF) << 8 * PM_TMR
            else:
                self._look()
                self._update()
                control = self._control | CNT_SCI_EN
                registers = self._status | self._enable << 8 * PM1_EN | control << 8 * PM1_CNT
            return registers >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        # What of the registers is written, in their places, so that any access does.
        written = ((1 << 8 * size) - 1) << 8 * offset
        value <<= 8 * offset
        off = False
        with self._lock:
            self._look()
            self._status &= ~value  # to write a 1 clears a bit
            if mask := written >> 8 * PM1_EN & PM1_EN_BITS:
                self._enable = self._enable & ~mask | value >> 8 * PM1_EN & mask
            control = value >> 8 * PM1_CNT
            if mask := written >> 8 * PM1_CNT & (CNT_BM_RLD | CNT_SLP_TYP):
                self._control = self._control & ~mask | control & mask
            if control & CNT_SLP_EN:
                off = (self._control & CNT_SLP_TYP) >> SLP_TYP_SHIFT == S5
            self._update()
        if off:
            self._power_off()

    def state(self) -> State:
        with self._lock:
            self._look()
            self._update()
            return {
                "version": 1,
                "status": self._status,
                "enable": self._enable,
                "control": self._control,
                "elapsed": self._elapsed(),
            }

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        saved = Saved(state, "an ACPI power management block", 1)
        status, enable = saved.number("status", 0xFFFF), saved.number("enable", 0xFFFF)
        control, elapsed = saved.number("control", 0xFFFF), saved.number("elapsed", 1 << 60)
        with self._lock:
            self._status, self._enable = status & PM1_EN_BITS, enable & PM1_EN_BITS
            self._control = control & (CNT_BM_RLD | CNT_SLP_TYP)
            self._zero = self._tick() - elapsed
            self._seen = elapsed >> 31
            self._level = self._status & self._enable != 0
            self._sci.set_level(self._level)  # whatever the other end believes
            self._update()
