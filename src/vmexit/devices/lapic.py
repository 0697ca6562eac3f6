"""Local APIC in xAPIC mode (Intel SDM vol. 3, chapter 11; section numbers below are of it)."""

from contextlib import AbstractContextManager
from typing import Protocol

from vmexit.core.bus import State
from vmexit.core.clock import Clock
from vmexit.core.irq import Startup
from vmexit.core.saved import Saved

# Register offsets (table 11-1).
ID, VERSION, TPR, APR, PPR, EOI, LDR, DFR, SVR = (
    0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0,
)  # fmt: skip
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR = range(0x320, 0x380, 0x10)
TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE = 0x380, 0x390, 0x3E0

_VERSION = 0x14 | 5 << 16  # an integrated APIC whose highest LVT entry is number 5 (11.4.8)
_SVR_ENABLED = 1 << 8
_LVT_MASKED, _LVT_PERIODIC = 1 << 16, 1 << 17
_LVT_BITS = {
    LVT_TIMER: 0x3_00FF, LVT_THERMAL: 0x1_07FF, LVT_PERF: 0x1_07FF,
    LVT_LINT0: 0x1_A7FF, LVT_LINT1: 0x1_A7FF, LVT_ERROR: 0x1_00FF,
}  # fmt: skip
_ICR_WRITABLE = 0xC_CFFF
_ICR_LOGICAL, _ICR_ASSERT, _ICR_LEVEL = 1 << 11, 1 << 14, 1 << 15
_ESR_SEND_ILLEGAL, _ESR_RECEIVE_ILLEGAL = 1 << 5, 1 << 6
_LOWEST_VECTOR = 16  # those below are illegal (11.5.2)

FIXED, LOWEST_PRIORITY, SMI, NMI, INIT, STARTUP, EXTINT = 0, 1, 2, 4, 5, 6, 7
"""Delivery modes (11.5.1, 11.6.1)."""

_BROADCAST = 0xFF
TO_SELF, TO_ALL, TO_OTHERS = 1, 2, 3
"""Destination shorthands."""

# A guest may ask for a timer that fires far more often than the host could bear.
_MIN_PERIOD_NS = 100_000
_SECOND = 1_000_000_000
# More than any count down takes, or a clock goes on, and less than what overflows.
_MAX_LEFT_NS = 1 << 62


class ApicBus(Protocol):
    """What connects the APICs of a machine. Called with their lock held."""

    def send(self, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool:
        """Deliver a message to the APICs that `destination` names; whether any accepts it."""
        ...

    def send_to(self, targets: "list[Lapic]", mode: int, vector: int) -> None:
        """Deliver it to these."""
        ...

    def shorthand(self, kind: int, source: "Lapic") -> "list[Lapic]":
        """The APICs that a destination shorthand stands for."""
        ...

    def end_of_interrupt(self, vector: int) -> None:
        """A level-triggered interrupt is over: the IOAPICs are told."""
        ...

    def accepts_again(self) -> None:
        """An APIC was switched on: the IOAPICs send what it refused."""
        ...

    def update(self, lapic: "Lapic") -> None:
        """Something changed that may decide whether `lapic` has an interrupt for its vCPU."""
        ...


class Lapic:
    """The local APIC of one vCPU: registers, 4 bytes each. All calls hold the APIC bus's lock."""

    def __init__(
        self,
        index: int,
        bus: ApicBus,
        clock: Clock,
        hz: int,
        lock: AbstractContextManager[object],
    ) -> None:
        """`hz` is the frequency of the timer before its divider; `lock` the bus's."""
        self.index = index
        self._bus = bus
        self._clock = clock
        self._hz = hz
        self._timer = clock.timer(self._on_timer)
        self._lock = lock
        self.reset()

    def reset(self) -> None:
        """The state after power-on, and with the BSP the PIC's INTR reaches its vCPU by LINT0.

        So firmware leaves it: virtual wire mode (MultiProcessor Specification 1.4, 3.6.2.2).
        """
        self.init()
        self._id = self.index
        if self.index == 0:
            self._lvt[LVT_LINT0] = EXTINT << 8
        self._nmi = False
        self._init_pending = False
        self._startup: int | None = None

    def init(self) -> None:
        """The state after INIT (11.4.7.3): all but the ID."""
        self._tpr = self._ldr = self._esr = self._esr_next = 0
        self._icr = 0
        self._dfr = 0xFFFF_FFFF
        self._svr = 0xFF
        self._irr = self._isr = self._tmr = 0  # 256 bits each
        self._lvt = dict.fromkeys(_LVT_BITS, _LVT_MASKED)
        self._divide = 0
        self._initial = 0
        self._deadline: int | None = None
        self._timer.set(None)

    # What the vCPU asks.

    @property
    def accepts_pic(self) -> bool:
        """Whether an interrupt of the PIC goes through to the vCPU."""
        lint0 = self._lvt[LVT_LINT0]
        return not lint0 & _LVT_MASKED and lint0 >> 8 & 7 == EXTINT

    def deliverable(self) -> int | None:
        """The vector of the interrupt that the vCPU would take now."""
        if not self._irr or not self.enabled:
            return None
        vector = self._irr.bit_length() - 1
        return vector if vector >> 4 > self._ppr() >> 4 else None

    @property
    def enabled(self) -> bool:
        """Whether it is on; else it takes no interrupts (11.4.7.2)."""
        return bool(self._svr & _SVR_ENABLED)

    def acknowledge(self, vector: int) -> None:
        """The vCPU takes `vector`: it is in service (11.8.4)."""
        self._irr &= ~(1 << vector)
        self._isr |= 1 << vector

    @property
    def has_nmi(self) -> bool:
        """Whether an NMI waits."""
        return self._nmi

    @property
    def has_startup(self) -> bool:
        """Whether an INIT or a SIPI waits."""
        return self._init_pending or self._startup is not None

    @property
    def spurious(self) -> int:
        """The vector of an interrupt that is there no more (11.9)."""
        return self._svr & 0xFF

    def take_nmi(self) -> bool:
        """Whether an NMI waits; it is taken."""
        taken, self._nmi = self._nmi, False
        return taken

    def take_startup(self) -> Startup | None:
        """The INIT that waits, or else the SIPI; it is taken."""
        if self._init_pending:
            self._init_pending = False
            return Startup(None)
        if self._startup is not None:
            vector, self._startup = self._startup, None
            return Startup(vector)
        return None

    # What others send.

    def is_addressed(self, destination: int, logical: bool) -> bool:
        """Whether a message to `destination` is for this APIC (11.6.2)."""
        if not logical:
            return destination in (_BROADCAST, self._id)
        if destination == _BROADCAST:
            return True
        own = self._ldr >> 24
        if self._dfr >> 28 == 0xF:  # flat
            return bool(own & destination)
        return own >> 4 == destination >> 4 and bool(own & destination & 0xF)

    @property
    def priority(self) -> int:
        """For messages of lowest priority."""
        return self._ppr()

    def receive(self, mode: int, vector: int, level: bool) -> bool:
        """A message has arrived; whether it is accepted."""
        if mode in (FIXED, LOWEST_PRIORITY):
            if not self.enabled:
                return False
            if vector < _LOWEST_VECTOR:
                self._error(_ESR_RECEIVE_ILLEGAL)
                return False
            self._irr |= 1 << vector
            if level:
                self._tmr |= 1 << vector
            else:
                self._tmr &= ~(1 << vector)
        elif mode == NMI:
            self._nmi = True
        elif mode == INIT:
            self.init()
            self._nmi = False
            self._init_pending, self._startup = True, None
        elif mode == STARTUP:
            self._startup = vector
        else:
            return False
        return True

    # Registers.

    def read(self, offset: int) -> int:
        """The register at `offset`, a multiple of 16."""
        if offset in self._lvt:
            return self._lvt[offset]
        if offset == TIMER_CURRENT:
            return self._current()
        for base, bits in ((ISR, self._isr), (TMR, self._tmr), (IRR, self._irr)):
            if base <= offset < base + 0x80:
                return bits >> 2 * (offset - base) & 0xFFFF_FFFF
        return {
            ID: self._id << 24,
            VERSION: _VERSION,
            TPR: self._tpr,
            PPR: self._ppr(),
            LDR: self._ldr,
            DFR: self._dfr,
            SVR: self._svr,
            ESR: self._esr,
            ICR_LOW: self._icr & 0xFFFF_FFFF,
            ICR_HIGH: self._icr >> 32,
            TIMER_INITIAL: self._initial,
            TIMER_DIVIDE: self._divide,
        }.get(offset, 0)

    def write(self, offset: int, value: int) -> None:
        """Store `value` in the register at `offset`."""
        if offset == EOI:
            self._end_of_interrupt()
        elif offset == TIMER_INITIAL:
            self._initial = value
            self._start_timer()
        elif offset in self._lvt:
            self._write_lvt(offset, value)
        elif offset == TPR:
            self._tpr = value & 0xFF
        elif offset == ICR_LOW:
            self._icr = self._icr >> 32 << 32 | value & _ICR_WRITABLE
            self._send()
        elif offset == ICR_HIGH:
            self._icr = (value & 0xFF00_0000) << 32 | self._icr & 0xFFFF_FFFF
        elif offset == ID:
            self._id = value >> 24
        elif offset == LDR:
            self._ldr = value & 0xFF00_0000
        elif offset == DFR:
            self._dfr = value | 0x0FFF_FFFF
        elif offset == SVR:
            was_enabled = self.enabled
            self._svr = value & 0x1FF
            if self.enabled and not was_enabled:
                self._bus.accepts_again()
            if not self.enabled:  # all LVT entries are masked (11.4.7.2)
                for entry in self._lvt:
                    self._lvt[entry] |= _LVT_MASKED
        elif offset == ESR:
            self._esr, self._esr_next = self._esr_next, 0
        elif offset == TIMER_DIVIDE:
            left = self._current()
            self._divide = value & 0b1011
            if left:
                self._count_down(left)
        else:
            return
        self._bus.update(self)

    def _write_lvt(self, offset: int, value: int) -> None:
        value &= _LVT_BITS[offset]
        if not self.enabled:
            value |= _LVT_MASKED
        self._lvt[offset] = value

    def _ppr(self) -> int:
        """Processor priority (11.8.3.1)."""
        in_service = max(self._isr.bit_length() - 1, 0)
        return self._tpr if self._tpr >> 4 >= in_service >> 4 else in_service & 0xF0

    def _end_of_interrupt(self) -> None:
        if not self._isr:
            return
        vector = self._isr.bit_length() - 1
        self._isr &= ~(1 << vector)
        if self._tmr >> vector & 1:
            self._bus.end_of_interrupt(vector)

    def _error(self, bit: int) -> None:
        self._esr_next |= bit
        entry = self._lvt[LVT_ERROR]
        if not entry & _LVT_MASKED and entry & 0xFF >= _LOWEST_VECTOR:
            self._irr |= 1 << (entry & 0xFF)
            self._tmr &= ~(1 << (entry & 0xFF))

    def _send(self) -> None:
        """The interrupt command register was written (11.6.1)."""
        icr = self._icr
        mode, vector, shorthand = icr >> 8 & 7, icr & 0xFF, icr >> 18 & 3
        if mode == INIT and icr & _ICR_LEVEL and not icr & _ICR_ASSERT:
            return  # INIT level de-assert: processors since the P6 ignore it
        if mode in (FIXED, LOWEST_PRIORITY) and vector < _LOWEST_VECTOR:
            self._error(_ESR_SEND_ILLEGAL)
            return
        if shorthand:
            targets = self._bus.shorthand(shorthand, self)
            self._bus.send_to(targets, FIXED if mode == LOWEST_PRIORITY else mode, vector)
        else:
            logical = bool(icr & _ICR_LOGICAL)
            self._bus.send(icr >> 56, logical, mode, vector, False)

    # The timer (11.5.4).

    def _divider(self) -> int:
        code = self._divide & 3 | self._divide >> 1 & 4
        return 1 if code == 7 else 2 << code

    def _nanoseconds(self, ticks: int) -> int:
        return ticks * self._divider() * _SECOND // self._hz

    def _start_timer(self) -> None:
        self._deadline = None
        self._timer.set(None)
        if self._initial:
            self._count_down(self._initial)

    def _count_down(self, ticks: int) -> None:
        self._deadline = self._clock.now() + self._nanoseconds(ticks)
        self._timer.set(self._deadline)

    def _current(self) -> int:
        if self._deadline is None:
            return 0
        left = self._deadline - self._clock.now()
        return min(max(left * self._hz // (_SECOND * self._divider()), 0), self._initial)

    def _on_timer(self) -> None:
        with self._lock:
            now = self._clock.now()
            if self._deadline is None or now < self._deadline:
                return
            entry = self._lvt[LVT_TIMER]
            if entry & _LVT_PERIODIC:
                period = max(self._nanoseconds(self._initial), _MIN_PERIOD_NS)
                # Late by more than a period, those in between are lost, as they would be on a
                # processor that is busy: one interrupt is all that IRR can hold.
                self._deadline += (1 + (now - self._deadline) // period) * period
                self._timer.set(self._deadline)
            else:
                self._deadline = None
            if not entry & _LVT_MASKED and entry & 0xFF >= _LOWEST_VECTOR:
                self._irr |= 1 << (entry & 0xFF)
                self._tmr &= ~(1 << (entry & 0xFF))
                self._bus.update(self)

    # State.

    def state(self) -> State:
        """All of it; the timer as nanoseconds that are left."""
        left = None if self._deadline is None else self._deadline - self._clock.now()
        return {
            "version": 1,
            **{name: getattr(self, f"_{name}") for name in _NUMBERS},
            "lvt": [self._lvt[offset] for offset in _LVT_BITS],
            "timer_left": left,
            "nmi": self._nmi,
            "init_pending": self._init_pending,
            "startup": self._startup,
        }

    def restore(self, state: State) -> None:
        """Raises ConfigError for what is no state of a LAPIC."""
        saved = Saved(state, "a LAPIC", 1)
        numbers = {name: saved.number(name, (1 << bits) - 1) for name, bits in _NUMBERS.items()}
        lvt = saved.numbers("lvt", 0xFFFF_FFFF, len(_LVT_BITS))
        left = saved.optional("timer_left", _MAX_LEFT_NS, -_MAX_LEFT_NS)
        nmi, init = saved.flag("nmi"), saved.flag("init_pending")
        startup = saved.optional("startup", 0xFF)
        for name, number in numbers.items():
            setattr(self, f"_{name}", number)
        masks = _LVT_BITS.items()
        self._lvt = {offset: entry & bits for (offset, bits), entry in zip(masks, lvt, strict=True)}
        self._nmi, self._init_pending, self._startup = nmi, init, startup
        self._deadline = None if left is None else self._clock.now() + left
        self._timer.set(self._deadline)


# What the state holds as it is, with the bits of each.
_NUMBERS = {
    "id": 8, "tpr": 8, "ldr": 32, "dfr": 32, "svr": 9, "esr": 32, "esr_next": 32, "icr": 64,
    "irr": 256, "isr": 256, "tmr": 256, "divide": 4, "initial": 32,
}  # fmt: skip
