"""Turns of the vCPUs on the engine's one CPU, in one host thread."""

from queue import Empty, SimpleQueue

from vmexit.accel.base import Exit, ExitReason
from vmexit.accel.soft.processor import Processor
from vmexit.accel.soft.stubs import StopWords
from vmexit.accel.soft.vcpu import SoftVcpu
from vmexit.arch.x86.segments import real_mode
from vmexit.core.irq import Startup

# Blocks in one turn where several vCPUs want to run: about a millisecond.
_TURN = 1 << 16
# And where only one does: as good as for ever.
_ALONE = (1 << 32) - 1


class Scheduler:
    """Runs all vCPUs of a VM, as `vmexit.accel.base.Executor` says."""

    def __init__(self, processor: Processor, vcpus: list[SoftVcpu]) -> None:
        self._processor = processor
        self._vcpus = vcpus
        self._last = 0
        self._kicked = False
        self._waiting = False
        self._step: int | None = None
        self._only: int | None = None
        self._wake: SimpleQueue[None] = SimpleQueue()

    def debug(self, step: int | None, only: int | None) -> None:
        """For the run to come: vCPU `step` executes one instruction; `only` one vCPU runs."""
        self._step, self._only = step, only

    @property
    def current(self) -> int:
        """The number of the vCPU whose turn it is."""
        return self._vcpus[self._last].index

    def attach_thread(self) -> None:
        """Any thread may run it."""

    def detach_thread(self) -> None:
        """Nothing was attached."""

    def kick(self) -> None:
        # In this order: whoever sees the flag clears the word, which must not be set afterwards.
        self._processor.ask_to_stop(StopWords.KICK)
        self._kicked = True
        self._rouse()

    def attention(self) -> None:
        """The interrupt controller has news for some vCPU. Any thread, and within an access."""
        self._processor.ask_to_stop(StopWords.ATTENTION)
        self._rouse()

    def _rouse(self) -> None:
        if self._waiting:
            self._wake.put(None)

    def run(self) -> Exit:
        processor = self._processor
        processor.begin()
        try:
            while True:
                if self._kicked:
                    self._kicked = False
                    return Exit(ExitReason.INTERRUPTED, vcpu=self.current)
                # In this order: what comes from here on is seen below, or ends the turn.
                processor.go_on(StopWords.ATTENTION)
                ready = self._ready()
                if not ready:
                    exit = self._wait()
                    if exit is not None:
                        return exit
                    continue
                if self._step in ready:
                    self._last = self._step
                    return processor.step(self._vcpus[self._step])
                # The first behind the one that had the last turn.
                index = next((i for i in ready if i > self._last), ready[0])
                self._last = index
                exit = processor.run(self._vcpus[index], _ALONE if len(ready) == 1 else _TURN)
                if exit is not None:
                    return exit
        finally:
            processor.go_on(StopWords.KICK)

    def _ready(self) -> list[int]:
        """The vCPUs that have something to do, by their place in the list."""
        only = self._only
        return [
            i
            for i, vcpu in enumerate(self._vcpus)
            if (only is None or only == i) and self._is_ready(vcpu)
        ]

    def _is_ready(self, vcpu: SoftVcpu) -> bool:
        interrupts = vcpu.interrupts
        if interrupts is None:
            return True
        while (startup := interrupts.take_startup()) is not None:
            self._start(vcpu, startup)
        if vcpu.waits_for_sipi:
            return False
        vcpu.nmi |= interrupts.take_nmi()
        if vcpu.halted and (
            (vcpu.nmi and not vcpu.in_nmi) or (vcpu.interruptible and interrupts.pending())
        ):
            vcpu.halted = False
        return not vcpu.halted

    def _start(self, vcpu: SoftVcpu, startup: Startup) -> None:
        """INIT and SIPI (Intel SDM vol. 3, 9.4): a SIPI counts only after an INIT."""
        if startup.vector is None:
            vcpu.reset()
            vcpu.waits_for_sipi = vcpu.index > 0  # the first begins at the reset vector
        elif vcpu.waits_for_sipi:
            vcpu.waits_for_sipi = False
            vcpu.set_system_registers(real_mode(startup.vector << 12))
            vcpu.set_registers(vcpu.registers() | {"rip": 0})

    def _wait(self) -> Exit | None:
        """Wait until something happens; an exit if nothing can."""
        asleep = [vcpu for vcpu in self._vcpus if not vcpu.waits_for_sipi]
        if not any(_may_wake(vcpu) for vcpu in asleep):
            number = asleep[0].index if asleep else 0
            return Exit(ExitReason.HALT, "halted with interrupts off", vcpu=number)
        self._waiting = True
        try:
            # Set before the last look: whoever comes later sees it.
            while not self._kicked and not self._ready():
                self._wake.get()
        finally:
            self._waiting = False
            self._drain()
        return None

    def _drain(self) -> None:
        try:
            while True:
                self._wake.get_nowait()
        except Empty:
            return


def _may_wake(vcpu: SoftVcpu) -> bool:
    """Whether anything can end the HLT of `vcpu`."""
    if vcpu.interruptible:
        return True
    interrupts = vcpu.interrupts
    return interrupts is not None and not vcpu.in_nmi and interrupts.nmi_may_come()
