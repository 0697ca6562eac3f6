"""One vCPU of the software accelerator: its state while another one has the engine's CPU."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from vmexit.arch.x86.registers import RFLAGS_IF, Registers, SystemRegisters
from vmexit.arch.x86.segments import reset
from vmexit.core.bus import State
from vmexit.core.irq import VcpuInterrupts
from vmexit.core.saved import Saved
from vmexit.core.trace import ExitObserver

if TYPE_CHECKING:
    from vmexit.accel.soft.processor import Processor


class SoftVcpu:
    """Made by `SoftVm.create_vcpu()`, and run by its scheduler."""

    def __init__(
        self,
        processor: "Processor",
        index: int,
        interrupts: VcpuInterrupts | None,
        observer: ExitObserver | None,
    ) -> None:
        self.index = index
        self.interrupts = interrupts
        self.observer = observer
        self.context = 0  # the engine's, by address
        self.halted = False
        self.interruptible = False  # while it is halted: whether its IF is set,
        self.in_nmi = False  # and whether it is within an NMI, in which no other one comes
        self.nmi = False  # a non-maskable interrupt waits
        # All but the first wait for it after reset (Intel SDM vol. 3, 9.4.1).
        self.waits_for_sipi = interrupts is not None and index > 0
        self._processor = processor
        processor.add(self)
        if self.waits_for_sipi:
            self.reset()

    def reset(self) -> None:
        """The state after power-on and after INIT (Intel SDM vol. 3, 9.1.1)."""
        registers, system = reset()
        self.set_system_registers(system)
        self.set_registers(registers)
        self.halted = self.nmi = False

    def power_on(self) -> None:
        """The state after power-on: MSRs and FPU, too, which INIT leaves alone."""
        self._processor.select(self)
        self._processor.power_on()
        self.reset()
        self.interruptible = self.in_nmi = False
        self.waits_for_sipi = self.interrupts is not None and self.index > 0

    def fpu(self) -> bytes:
        self._processor.select(self)
        return self._processor.fpu()

    def set_fpu(self, image: bytes) -> None:
        self._processor.select(self)
        self._processor.set_fpu(image)

    def registers(self) -> Registers:
        self._processor.select(self)
        return self._processor.registers()

    def set_registers(self, registers: Registers) -> None:
        self._processor.select(self)
        before = self._processor.registers()
        self._processor.set_registers(registers)
        self.interruptible = bool(registers["rflags"] & RFLAGS_IF)
        if registers["rip"] != before["rip"]:
            self.halted = False  # whoever sets it wants the vCPU to run from there

    def system_registers(self) -> SystemRegisters:
        self._processor.select(self)
        return self._processor.system_registers()

    def set_system_registers(self, system: SystemRegisters) -> None:
        self._processor.select(self)
        self._processor.set_system_registers(system)

    def msrs(self, indices: Iterable[int]) -> dict[int, int]:
        self._processor.select(self)
        return self._processor.msrs(indices)

    def set_msrs(self, values: Mapping[int, int]) -> list[int]:
        self._processor.select(self)
        return self._processor.set_msrs(values)

    def state(self) -> State:
        self._processor.select(self)
        flags = {name: bool(getattr(self, name)) for name in _FLAGS}
        return {"version": 1, "accel": "soft", "cpu": self._processor.state(), **flags}

    def restore(self, state: State) -> None:
        saved = Saved(state, "a vCPU of the software CPU", 1)
        if state.get("accel") != "soft":
            raise saved.error()
        cpu, flags = saved.part("cpu"), {name: saved.flag(name) for name in _FLAGS}
        if flags["waits_for_sipi"] and self.interrupts is None:
            raise saved.error()
        self._processor.select(self)
        self._processor.restore(cpu)
        for name, value in flags.items():
            setattr(self, name, value)


# What it is waiting for; the rest is the engine's.
_FLAGS = ("halted", "interruptible", "in_nmi", "nmi", "waits_for_sipi")
