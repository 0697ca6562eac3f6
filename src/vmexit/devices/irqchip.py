"""The interrupt controllers of a PC together: the PICs, an I/O APIC, a LAPIC for each vCPU.

GSIs are as KVM numbers them (KVM API 4.24, default routing): 0 to 15 are the ISA interrupts, which
reach both the PICs and the I/O APIC, where GSI 0 has pin 2; those up to 23 reach the I/O APIC only.
GSI 2 leads nowhere: that input of the master PIC is the slave's.
"""

import threading
from collections.abc import Callable

from vmexit.core.bus import State, Stateful
from vmexit.core.clock import Clock
from vmexit.core.errors import ConfigError
from vmexit.core.irq import Startup
from vmexit.devices.ioapic import PINS, Ioapic
from vmexit.devices.lapic import LOWEST_PRIORITY, TO_ALL, TO_SELF, Lapic
from vmexit.devices.pic import PicPair

_ISA_PINS = 16
_TIMER_PIN = 2  # of the I/O APIC, for GSI 0
_CASCADE_GSI = 2


class PcIrqChip:
    """All of them share one lock, as they call each other. Any thread may call in.

    `notify()` is called, with the lock held, when a vCPU may have to do something: take an
    interrupt, or not take one that was pending before.
    """

    def __init__(self, cpus: int, clock: Clock, timer_hz: int, notify: Callable[[], None]) -> None:
        """`timer_hz` is the frequency of the LAPIC timers."""
        self._lock = threading.RLock()
        self._notify = notify
        self.pic = PicPair(self._lock, self._pic_changed)
        self._ioapic = Ioapic(self.send)
        self._pending = [False] * cpus  # what the vCPUs were last told
        self._lapics = [Lapic(i, self, clock, timer_hz, self._lock) for i in range(cpus)]
        self.vcpus = [_VcpuSide(self, lapic) for lapic in self._lapics]

    def set_level(self, gsi: int, level: bool) -> None:
        """Raise or lower a GSI, 0 to 23. Raises ConfigError for any other."""
        if not 0 <= gsi < PINS:
            raise ConfigError(f"there is no GSI {gsi}; use 0 to {PINS - 1}")
        if gsi == _CASCADE_GSI:
            return
        with self._lock:
            if gsi < _ISA_PINS:
                self.pic.set_level(gsi, level)
            self._ioapic.set_level(_TIMER_PIN if gsi == 0 else gsi, level)

    def ioapic_page(self) -> "IoapicPage":
        """The I/O APIC as the guest sees it, 32 bytes."""
        return IoapicPage(self._ioapic, self._lock)

    def lapic_page(self, current: Callable[[], int]) -> "LapicPage":
        """The LAPICs as the guest sees them, one page; `current()` tells whose vCPU accesses it."""
        return LapicPage(self._lapics, current, self._lock)

    # The APIC bus; the lock is held.

    def send(self, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool:
        targets = [x for x in self._lapics if x.is_addressed(destination, logical)]
        if mode == LOWEST_PRIORITY:
            able = [x for x in targets if x.enabled]
            targets = [min(able, key=lambda lapic: lapic.priority)] if able else []
        return self._deliver(targets, mode, vector, level)

    def send_to(self, targets: list[Lapic], mode: int, vector: int) -> None:
        self._deliver(targets, mode, vector, False)

    def _deliver(self, targets: list[Lapic], mode: int, vector: int, level: bool) -> bool:
        accepted = False
        for lapic in targets:
            accepted |= lapic.receive(mode, vector, level)
            self.update(lapic)
            if lapic.has_startup or lapic.has_nmi:
                self._notify()
        return accepted

    def shorthand(self, kind: int, source: Lapic) -> list[Lapic]:
        if kind == TO_SELF:
            return [source]
        return [x for x in self._lapics if kind == TO_ALL or x is not source]

    def end_of_interrupt(self, vector: int) -> None:
        self._ioapic.end_of_interrupt(vector)

    def accepts_again(self) -> None:
        self._ioapic.deliver_levels()

    def update(self, lapic: Lapic) -> None:
        pending = self._is_pending(lapic)
        if pending != self._pending[lapic.index]:
            self._pending[lapic.index] = pending
            self._notify()

    def _is_pending(self, lapic: Lapic) -> bool:
        return lapic.deliverable() is not None or (lapic.accepts_pic and self.pic.pending())

    def _pic_changed(self) -> None:
        for lapic in self._lapics:
            if lapic.accepts_pic:
                self.update(lapic)

    # What a vCPU asks.

    def pending(self, lapic: Lapic) -> bool:
        return self._pending[lapic.index]

    def acknowledge(self, lapic: Lapic) -> int:
        with self._lock:
            found = lapic.deliverable()
            if lapic.accepts_pic and (self.pic.pending() or found is None):
                vector = self.pic.acknowledge()  # its spurious one, if it has withdrawn its INTR
            elif found is None:
                vector = lapic.spurious
            else:
                lapic.acknowledge(found)
                vector = found
            # The vCPU forgets its request now, so it must hear of the next one in any case.
            self._pending[lapic.index] = False
            self.update(lapic)
            return vector

    def take_nmi(self, lapic: Lapic) -> bool:
        with self._lock:
            return lapic.take_nmi()

    def nmi_may_come(self, lapic: Lapic) -> bool:
        with self._lock:
            return any(lapic.is_addressed(*target) for target in self._ioapic.nmi_targets())

    def take_startup(self, lapic: Lapic) -> Startup | None:
        with self._lock:
            return lapic.take_startup()

    # State.

    def reset(self) -> None:
        """All of them as after power-on."""
        with self._lock:
            self.pic.reset()
            self._ioapic.reset()
            for lapic in self._lapics:
                lapic.reset()
                self.update(lapic)

    def state(self) -> State:
        with self._lock:
            return {
                "version": 1,
                "pic": self.pic.state(),
                "ioapic": self._ioapic.state(),
                "lapics": [lapic.state() for lapic in self._lapics],
            }

    def restore(self, state: State) -> None:
        """Raises ConfigError for what is no state of this machine's interrupt controllers.

        Then they are as before.
        """
        pic, ioapic, lapics = (state.get(name) for name in ("pic", "ioapic", "lapics"))
        if (
            state.get("version") != 1
            or not isinstance(pic, dict)
            or not isinstance(ioapic, dict)
            or not isinstance(lapics, list)
            or len(lapics) != len(self._lapics)
            or not all(isinstance(lapic, dict) for lapic in lapics)
        ):
            raise ConfigError(
                "this is not the state of these interrupt controllers, version 1; save it anew"
            )
        parts: list[Stateful] = [self.pic, self._ioapic, *self._lapics]
        with self._lock:
            before = [part.state() for part in parts]
            try:
                for part, one in zip(parts, [pic, ioapic, *lapics], strict=True):
                    part.restore(one)
            except ConfigError:
                for part, one in zip(parts, before, strict=True):
                    part.restore(one)
                raise
            finally:
                for lapic in self._lapics:
                    self.update(lapic)
                self._notify()


class _VcpuSide:
    """`vmexit.core.irq.VcpuInterrupts` for one vCPU."""

    def __init__(self, chip: PcIrqChip, lapic: Lapic) -> None:
        self._chip = chip
        self._lapic = lapic

    def pending(self) -> bool:
        return self._chip.pending(self._lapic)

    def acknowledge(self) -> int:
        return self._chip.acknowledge(self._lapic)

    def take_nmi(self) -> bool:
        return self._lapic.has_nmi and self._chip.take_nmi(self._lapic)

    def nmi_may_come(self) -> bool:
        return self._chip.nmi_may_come(self._lapic)

    def take_startup(self) -> Startup | None:
        return self._chip.take_startup(self._lapic) if self._lapic.has_startup else None


class LapicPage:
    """Registers of 4 bytes, 16 bytes apart (Intel SDM vol. 3, 11.4.1). Any thread may enter."""

    widths = (4,)

    def __init__(
        self, lapics: list[Lapic], current: Callable[[], int], lock: "threading.RLock"
    ) -> None:
        self._lapics = lapics
        self._current = current
        self._lock = lock

    def read(self, offset: int, size: int) -> int:
        if offset & 0xF:
            return 0
        with self._lock:
            return self._lapics[self._current()].read(offset)

    def write(self, offset: int, size: int, value: int) -> None:
        if not offset & 0xF:
            with self._lock:
                self._lapics[self._current()].write(offset, value)


class IoapicPage:
    """The two windows of the I/O APIC. Any thread may enter."""

    widths = (4,)

    def __init__(self, ioapic: Ioapic, lock: "threading.RLock") -> None:
        self._ioapic = ioapic
        self._lock = lock

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            return self._ioapic.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            self._ioapic.write(offset, size, value)
