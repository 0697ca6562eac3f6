"""The two 8259A interrupt controllers of a PC, the slave at input 2 of the master.

Names and behaviour are those of the Intel 8259A data sheet (231468); the edge/level control
registers are those of the 82371 (PIIX). Where the two leave a choice, it is KVM's, so that a guest
sees the same PIC whether it is in the kernel or here: an edge stays latched although the line
falls again, and a slave that has an interrupt keeps input 2 of the master requested.
Missing: the 8080 mode, and LTIM and SNGL in ICW1, which do nothing on a PC.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from vmexit.core.bus import State
from vmexit.core.saved import Saved
from vmexit.devices.window import Window

ICW1, ICW1_IC4, ICW1_SNGL = 1 << 4, 1 << 0, 1 << 1
ICW4_AEOI, ICW4_SFNM = 1 << 1, 1 << 4
OCW3, OCW3_RIS, OCW3_RR, OCW3_POLL, OCW3_SMM, OCW3_ESMM = (
    1 << 3, 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6,
)  # fmt: skip
OCW2_EOI, OCW2_SPECIFIC, OCW2_ROTATE = 1 << 5, 1 << 6, 1 << 7

POLL_REQUEST = 1 << 7
CASCADE_PIN = 2
CASCADE = 1 << CASCADE_PIN
SPURIOUS = 7
NONE = -1

# Inputs that cannot be level-triggered: timer, keyboard, cascade; RTC, coprocessor error.
MASTER_ELCR, SLAVE_ELCR = 0xF8, 0xDE

_BYTES = (
    "lines", "irr", "isr", "imr", "elcr", "base", "highest", "step", "icw4_follows", "icw4",
    "special_mask", "rotate_on_aeoi", "read_isr", "poll",
)  # fmt: skip


class _Chip:
    """One 8259A: registers and priority logic, without lock and without neighbours."""

    __slots__ = (*_BYTES, "elcr_mask", "slaves")

    def __init__(self, slaves: int, elcr_mask: int) -> None:
        """`slaves` has a bit for each input that is a slave's output."""
        self.slaves = slaves
        self.elcr_mask = elcr_mask
        self.lines = 0  # levels of the inputs, which no reset changes
        self.reset()

    def reset(self) -> None:
        self.isr = self.imr = self.elcr = self.irr = 0
        self.base = self.icw4 = self.rotate_on_aeoi = 0
        self.step = self.icw4_follows = 0  # the ICW that comes next, 0 for none
        self.highest = 0  # the input that has the highest priority
        self.special_mask = self.read_isr = self.poll = 0

    def set_level(self, bit: int, level: bool) -> None:
        if level:
            if self.elcr & bit or not self.lines & bit:
                self.irr |= bit
            self.lines |= bit
        else:
            self.lines &= ~bit
            if self.elcr & bit:
                self.irr &= ~bit

    def request(self) -> int:
        """The input that the chip asks an interrupt for, or NONE."""
        wanted = self.irr & ~self.imr
        if not wanted:
            return NONE
        serving = self.isr & ~self.imr if self.special_mask else self.isr
        for i in range(self.highest, self.highest + 8):
            bit = 1 << (i & 7)
            if serving & bit:
                # It holds off its own input and all below; in special fully nested mode a slave
                # may interrupt itself, as it knows which of its inputs comes first.
                again = self.icw4 & ICW4_SFNM and wanted & self.slaves & bit
                return i & 7 if again else NONE
            if wanted & bit:
                return i & 7
        return NONE

    def accept(self, pin: int) -> None:
        """The input is in service from now on."""
        bit = 1 << pin
        if not self.elcr & bit:
            self.irr &= ~bit
        if not self.icw4 & ICW4_AEOI:
            self.isr |= bit
        elif self.rotate_on_aeoi:
            self.highest = (pin + 1) & 7

    def read(self, offset: int) -> int:
        if self.poll:
            self.poll = 0
            pin = self.request()
            if pin == NONE:
                return 0
            self.accept(pin)
            return POLL_REQUEST | pin
        if offset:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def write(self, offset: int, value: int) -> None:
        if not offset:
            if value & ICW1:
                self._initialize(value)
            elif value & OCW3:
                self._operate(value)
            else:
                self._end_of_interrupt(value)
        elif not self.step:
            self.imr = value
        elif self.step == 2:
            self.base = value & 0xF8
            self.step = 3 if self.step_3_follows else 4 if self.icw4_follows & 1 else 0
        elif self.step == 3:  # which input the slave is at is soldered
            self.step = 4 if self.icw4_follows & 1 else 0
        else:
            self.icw4 = value & (ICW4_AEOI | ICW4_SFNM)
            self.step = 0

    @property
    def step_3_follows(self) -> bool:
        return not self.icw4_follows & ICW1_SNGL

    def _initialize(self, icw1: int) -> None:
        """ICW1 (data sheet, "Initialization Command Words"): edges are forgotten, levels stay."""
        self.irr = self.lines & self.elcr
        self.isr = self.imr = self.highest = 0
        self.special_mask = self.read_isr = self.poll = 0
        self.icw4_follows = icw1 & (ICW1_IC4 | ICW1_SNGL)
        if not icw1 & ICW1_IC4:
            self.icw4 = 0
        self.step = 2

    def _operate(self, ocw3: int) -> None:
        if ocw3 & OCW3_ESMM:
            self.special_mask = int(ocw3 & OCW3_SMM != 0)
        self.poll = int(ocw3 & OCW3_POLL != 0)
        if ocw3 & OCW3_RR:
            self.read_isr = ocw3 & OCW3_RIS

    def _end_of_interrupt(self, ocw2: int) -> None:
        rotate = ocw2 & OCW2_ROTATE
        if ocw2 & OCW2_EOI:
            pin = ocw2 & 7 if ocw2 & OCW2_SPECIFIC else self._first_in_service()
            if pin == NONE:
                return
            self.isr &= ~(1 << pin)
            if rotate:
                self.highest = (pin + 1) & 7
        elif not ocw2 & OCW2_SPECIFIC:
            self.rotate_on_aeoi = int(rotate != 0)
        elif rotate:
            self.highest = ((ocw2 & 7) + 1) & 7

    def _first_in_service(self) -> int:
        """What a nonspecific EOI ends: in special mask mode nothing that is masked."""
        serving = self.isr & ~self.imr if self.special_mask else self.isr
        for i in range(self.highest, self.highest + 8):
            if serving >> (i & 7) & 1:
                return i & 7
        return NONE

    def set_elcr(self, value: int) -> None:
        self.elcr = value & self.elcr_mask
        self.irr = self.irr & ~self.elcr | self.lines & self.elcr

    def state(self) -> State:
        return {name: getattr(self, name) for name in _BYTES}

    def restore(self, values: dict[str, int]) -> None:
        for name in _BYTES:
            setattr(self, name, values[name])


def _checked(saved: Saved) -> dict[str, int]:
    tops = {"highest": 7, "step": 4, "icw4_follows": 3, "special_mask": 1, "rotate_on_aeoi": 1,
            "read_isr": 1, "poll": 1}  # fmt: skip
    values = {name: saved.number(name, tops.get(name, 0xFF)) for name in _BYTES}
    if values["step"] == 1 or values["base"] & 7:
        raise saved.error()
    return values


class PicPair:
    """Registers 0 and 1 are the master's, 2 and 3 the slave's, 4 and 5 the edge/level control.

    Any thread may enter. It shares the lock with the other interrupt controllers, so that what
    one vCPU sees of them is of one moment; `changed` is called under it.
    """

    widths = (1,)

    def __init__(self, lock: AbstractContextManager[object], changed: Callable[[], None]) -> None:
        """`changed` is called after each change of `pending()`; it may not call back."""
        self._lock = lock
        self._changed = changed
        self._intr = False
        self._master = _Chip(CASCADE, MASTER_ELCR)
        self._slave = _Chip(0, SLAVE_ELCR)
        self._chips = (self._master, self._slave)
        self.master, self.slave, self.elcr = Window(self, 0), Window(self, 2), Window(self, 4)

    def set_level(self, pin: int, level: bool) -> None:
        """Raise or lower input 0 to 15. Input 2 is the slave's: it is ignored."""
        if pin == CASCADE_PIN:
            return
        with self._lock:
            self._chips[pin >> 3].set_level(1 << (pin & 7), level)
            self._update()

    def pending(self) -> bool:
        """The INTR output."""
        return self._intr

    def acknowledge(self) -> int:
        """The INTA cycle: the vector of the interrupt that is in service from now on.

        Without a request, as when it went away, the vector of input 7; no input is in service then.
        """
        with self._lock:
            chip = self._master
            pin = chip.request()
            if pin != NONE:
                chip.accept(pin)
                if pin == CASCADE_PIN:
                    chip = self._slave
                    pin = chip.request()
                    if pin != NONE:
                        chip.accept(pin)
            self._update()
            return chip.base + (SPURIOUS if pin == NONE else pin)

    def _update(self) -> None:
        if self._slave.request() != NONE:
            self._master.irr |= CASCADE
        intr = self._master.request() != NONE
        if intr is not self._intr:
            self._intr = intr
            self._changed()

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            chip = self._chips[offset >> 1 & 1]
            if offset >= 4:
                return self._chips[offset & 1].elcr
            polled = chip.poll
            value = chip.read(offset & 1)
            if polled:
                if chip is self._slave:  # its output, and with it the request, falls
                    self._master.irr &= ~CASCADE
                self._update()
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset >= 4:
                self._chips[offset & 1].set_elcr(value)
            else:
                self._chips[offset >> 1].write(offset & 1, value)
            self._update()

    def reset(self) -> None:
        """Nothing is requested, in service or masked; the inputs keep their levels."""
        with self._lock:
            for chip in self._chips:
                chip.reset()
            self._update()

    def state(self) -> State:
        with self._lock:
            return {"version": 1, "master": self._master.state(), "slave": self._slave.state()}

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        saved = Saved(state, "a pair of 8259A", 1)
        values = [_checked(saved.part(name)) for name in ("master", "slave")]
        with self._lock:
            for chip, chip_values in zip(self._chips, values, strict=True):
                chip.restore(chip_values)
            self._update()
