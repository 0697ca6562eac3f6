"""The processor of a Unicorn engine: hooks that answer its I/O, and one stretch of execution.

An engine has one CPU. Several vCPUs take turns on it, each with a context that is loaded and
saved; see scheduler.py.
"""

import ctypes
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from vmexit.accel.base import Exit, ExitReason, Point
from vmexit.accel.soft.cpu_state import CpuState
from vmexit.accel.soft.cpuid import Cpuid
from vmexit.accel.soft.fpu import Fpu
from vmexit.accel.soft.host_writes import HostWrites
from vmexit.accel.soft.layout import (
    EFLAGS,
    HF2_NMI,
    HF_INHIBIT_IRQ,
    HFLAGS,
    HFLAGS2,
    NMI,
    OLD_EXCEPTION,
    RAX,
    RBX,
    RCX,
    RDX,
    TSC_OFFSET,
    VIRTUAL_INTERRUPT,
    VMCB,
)
from vmexit.accel.soft.mmio import Mmio
from vmexit.accel.soft.native import (
    CpuidCallback,
    Engine,
    InCallback,
    Library,
    MmioReadCallback,
    MmioWriteCallback,
    OutCallback,
    SyscallCallback,
    address_of,
)
from vmexit.accel.soft.points import Points
from vmexit.accel.soft.port_io import MAX_AHEAD, PortIo
from vmexit.accel.soft.replay import Replay
from vmexit.accel.soft.saving import CpuSaving
from vmexit.accel.soft.stopping import Stopper
from vmexit.accel.soft.stubs import RAISE, StopWords, Stubs
from vmexit.accel.soft.system_calls import SystemCalls
from vmexit.accel.soft.vcpu import SoftVcpu
from vmexit.arch.x86.code import linear_ip, next_instruction
from vmexit.arch.x86.cpu_model import CpuModel
from vmexit.arch.x86.registers import (
    RFLAGS_IF,
    RFLAGS_RF,
    Registers,
    SystemRegisters,
)
from vmexit.core.bus import Bus, State
from vmexit.core.errors import HostError, VmexitError
from vmexit.core.memory import PAGE_SIZE, GuestMemory
from vmexit.core.saved import Saved
from vmexit.core.trace import ExitObserver

if TYPE_CHECKING:
    from vmexit.arch.x86.cpuid import Table

_EXCEPTION_NAMES = {
    0: "#DE", 1: "#DB", 2: "NMI", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF",
    10: "#TS", 11: "#NP", 12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC",
    19: "#XM",
}  # fmt: skip
_WITH_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17))

_DOUBLE_FAULT = 8

# The CPU reads the vector of an interrupt from this page, which answers with an INTA cycle. The
# guest cannot reach it: its page tables and the CPU's physical addresses end below.
_VECTOR_PAGE = 1 << 52
_VECTOR_OFFSET = 0x64  # of V_INTR_VECTOR in a VMCB (AMD APM vol. 2, appendix B)


class Processor:
    """The one CPU of an engine; made by `SoftVm`."""

    def __init__(
        self,
        library: Library,
        engine: Engine,
        memory: GuestMemory,
        pio: Bus,
        mmio: Bus,
        holes: list[tuple[int, int]],
        cpus: int,
        model: CpuModel,
    ) -> None:
        from unicorn import x86_const

        self._library = library
        self._engine = engine
        self._handle = engine._uch.value or 0
        self._memory = memory
        self._index = 0
        self._observer: ExitObserver | None = None
        engine.reg_read(x86_const.UC_X86_REG_RAX)  # the engine makes its CPU at the first use
        library.check_at_accesses(self._handle, False)
        self._cpu = cpu = library.get_cpu(self._handle, -1)
        prefix = "UC_X86_REG_"
        ids = {
            name.removeprefix(prefix).lower(): getattr(x86_const, name)
            for name in dir(x86_const)
            if name.startswith(prefix)
        }
        ids |= {"gdt": ids["gdtr"], "idt": ids["idtr"]}
        self._state = CpuState(library, engine, cpu, ids)
        self._cpuid = Cpuid(library, self._state.base, cpus, model)
        self._fpu = Fpu(engine)
        self._saving = CpuSaving(library, engine, self._state, self._fpu)
        self._calls = SystemCalls(self._state, engine, self._raise, self._fail)
        # The TSC begins at 0 with reset (SDM vol. 3, 10.1.1); firmware counts on it.
        self._state.set_tsc(library, 0)
        self._stubs = Stubs(library, self._handle, cpu, self._state.base)
        self._words = self._stubs.view
        self._limited = False  # the engine has a hook that counts instructions
        self._points = Points(library, self._handle, cpu, self._stubs)
        self._stopper = Stopper(library, cpu, self._words)
        self._host_writes = HostWrites(library, self._handle, memory, self._stopper)
        self._replay = Replay(self._words)
        self._ports = PortIo(
            self._state,
            memory,
            pio,
            self._words,
            self._replay,
            self._fail,
            self._raise,
            self._withhold,
        )
        self._mmio = Mmio(
            library,
            self._handle,
            mmio,
            self._words,
            self._replay,
            lambda: self._state.rip,
            self._fail,
        )
        self._vcpu: SoftVcpu | None = None  # whose state the CPU has
        self._withheld = 0  # interrupts that were requested, and are not for now
        # What must outlive this call: C holds the addresses of these.
        self._callbacks: list[object] = []
        # The first thing that went wrong inside a callback, where no exception can pass.
        self._error: BaseException | None = None
        self._contexts: list[int] = []
        self._install(holes, cpus)
        self._reset_context = self._new_context()
        library.context_save(self._handle, self._reset_context)

    def _install(self, holes: list[tuple[int, int]], cpus: int) -> None:
        import unicorn
        from unicorn import x86_const

        hook, engine = self._library.hook, self._handle
        for number, callback in (
            (x86_const.UC_X86_INS_OUT, OutCallback(self._ports.on_out)),
            (x86_const.UC_X86_INS_IN, InCallback(self._ports.on_in)),
            (x86_const.UC_X86_INS_SYSCALL, SyscallCallback(self._calls.on_syscall)),
            (x86_const.UC_X86_INS_SYSENTER, SyscallCallback(self._calls.on_sysenter)),
            (x86_const.UC_X86_INS_CPUID, CpuidCallback(self._on_cpuid)),
        ):
            stub = self._stubs.leaving_hook(self._c(callback))
            if number == x86_const.UC_X86_INS_SYSCALL:
                stub = self._stubs.syscall_hook(stub)
            hook(engine, unicorn.UC_HOOK_INSN, stub, instruction=number)
        self._state.replace(self._stubs.entry, self._stubs.interrupt, self._stubs.breakpoint)
        if cpus > 1:
            hook(engine, unicorn.UC_HOOK_BLOCK, self._stubs.turn_hook)
        hook(engine, unicorn.UC_HOOK_INTR, self._stubs.exception_hook)
        hook(engine, unicorn.UC_HOOK_INSN_INVALID, self._stubs.invalid_hook)
        for gpa, size in holes:
            self._mmio.add_hole(gpa, size, self._stubs)
        for region in self._memory.regions:
            if region.readonly:
                self._mmio.add_rom(region, self._stubs)
        self._map_vector_page()
        self._speed_up_writes()
        self._stubs.seal()

    def _speed_up_writes(self) -> None:
        """Answer at once where RAM is.

        The engine looks it up twice at each write to a page which the guest may execute, as all
        data of a kernel is for most of its start.
        """
        library, engine = self._library, self._handle
        find = address_of(library.find_region)
        for memory in self._memory.regions:
            region = 0 if memory.readonly else library.find_region(engine, memory.gpa)
            if region and region == library.find_region(engine, memory.end - 1):
                find = self._stubs.find_region(memory.gpa, memory.end, region, find)
        library.replace_find_region(engine, find)

    def _map_vector_page(self) -> None:
        read = self._c(MmioReadCallback(self._on_vector))
        write = self._c(MmioWriteCallback(lambda *_: None))
        page = _VECTOR_PAGE, PAGE_SIZE
        if self._library.mmio_map(self._handle, *page, read, None, write, None):
            raise HostError("Unicorn refused the page for interrupt vectors; use --accel kvm")
        self._state.u64[VMCB // 8] = _VECTOR_PAGE

    def _c(self, callback: Callable[..., object]) -> int:
        self._callbacks.append(callback)
        return address_of(callback)

    # The vCPU whose turn it is.

    def add(self, vcpu: SoftVcpu) -> None:
        """Take a new vCPU; its state is that of a processor after reset."""
        vcpu.context = self._new_context()
        if self._vcpu is not None:
            self._library.context_save(self._handle, self._vcpu.context)
            self._library.context_restore(self._handle, self._reset_context)
        self._library.context_save(self._handle, vcpu.context)
        self._take(vcpu)

    def select(self, vcpu: SoftVcpu) -> None:
        """Load the state of `vcpu` into the CPU, if it is not there."""
        if vcpu is self._vcpu:
            return
        assert self._vcpu is not None
        if self._stopper.in_callback:
            raise VmexitError(
                f"vCPU {self._index} has its turn, and the state of vCPU {vcpu.index} is for "
                "after the run; stop() it first"
            )
        self._library.context_save(self._handle, self._vcpu.context)
        self._library.context_restore(self._handle, vcpu.context)
        self._library.flush_tlb(self._handle)
        self._take(vcpu)

    def _take(self, vcpu: SoftVcpu) -> None:
        self._vcpu = vcpu
        self._index = vcpu.index
        self._observer = vcpu.observer
        self._mmio.serve(vcpu.index, vcpu.observer)
        self._ports.serve(vcpu.index, vcpu.observer)

    def _new_context(self) -> int:
        context = ctypes.c_void_p()
        if self._library.context_alloc(self._handle, ctypes.byref(context)):
            raise HostError("Unicorn has no memory for a vCPU; free some")
        self._contexts.append(context.value or 0)
        return context.value or 0

    # Running.

    def ask_to_stop(self, word: int) -> None:
        """Set the stop word KICK or ATTENTION; from any thread."""
        self._stopper.ask(word)

    def cpuid(self, index: int) -> "Table":
        """What CPUID says on vCPU `index`."""
        apic = self._vcpu is not None and self._vcpu.interrupts is not None
        return self._cpuid.table(index, apic)

    def go_on(self, word: int) -> None:
        """Clear a stop word."""
        self._words[word] = 0

    def run(self, vcpu: SoftVcpu, blocks: int) -> Exit | None:
        """Execute `vcpu` for so many blocks, or until a stop word or something else ends it.

        None if it can go on; raises what a device has raised.
        """
        self.select(vcpu)
        words, state = self._words, self._state
        interrupts = vcpu.interrupts
        if interrupts is not None:
            state.request(
                (VIRTUAL_INTERRUPT if interrupts.pending() else 0) | (NMI if vcpu.nmi else 0)
            )
        words[StopWords.SLICE_END] = words[StopWords.BLOCKS] + blocks & 0xFFFF_FFFF
        if not self._points.watching:
            return self._execute(vcpu, 0)
        self._stopper.hold(True)  # the hook of each instruction looks by itself
        try:
            return self._execute(vcpu, 0)
        finally:
            self._stopper.hold(False)

    def step(self, vcpu: SoftVcpu) -> Exit:
        """Execute one instruction of `vcpu`, without interrupts; else as `run()`."""
        self.select(vcpu)
        self._state.request(0)
        self._withheld = NMI if vcpu.nmi else 0  # one that waits goes on waiting
        self._stopper.hold(True)
        self._translate_for_steps(True)
        try:
            exit = self._execute(vcpu, 1)
        finally:
            self._translate_for_steps(False)
            self._stopper.hold(False)
        if exit is None:
            exit = Exit(ExitReason.DEBUG, vcpu=vcpu.index)
            self._tell(exit)
        return exit

    def _translate_for_steps(self, wanted: bool) -> None:
        """Whether code is translated such that it can stop before each instruction.

        The limit of one instruction holds for code that is translated with it, and with tests.
        """
        self._library.check_at_accesses(self._handle, wanted or self._points.watching)
        self._library.flush_translations(self._handle)
        if not wanted:
            self._drop_limit()

    def _drop_limit(self) -> None:
        """Have the engine forget the limit of one instruction now, by a run that ends at once.

        It has a hook for that, and removes it with the next start. Wherever the hook was it looks
        for translated code then, by the page tables of the moment: of another vCPU, or of ring 3.
        What of that faults must not be seen by the guest.
        """
        words, state = self._words, self._state
        if not self._limited:
            return
        requested, halted, held = state.requested, state.halted, words[StopWords.HOLD]
        state.request(0)
        words[StopWords.HOLD] = 0
        words[StopWords.ATTENTION] = 1  # which is looked at again in any case
        with state.exceptions_kept():
            self._start(0)
        words[StopWords.HOLD] = held
        state.halted = halted
        state.request(requested)

    def _start(self, count: int) -> int:
        """Run from where the CPU is, for so many instructions, 0: no limit; gives the error."""
        self._limited = count > 0
        error: int = self._library.emu_start(self._handle, self._state.rip, 0, 0, count)
        return error

    def _execute(self, vcpu: SoftVcpu, count: int) -> Exit | None:
        words, state = self._words, self._state
        self._host_writes.drop()
        words[StopWords.DELIVERING] = 0  # a triple fault ends within one
        self._points.forget()
        observer = self._observer
        if observer is not None:
            observer.left(self._index)
            observer.enters(self._index)
        self._stopper.running(True)
        error = self._start(count)
        if self._replay.unfinished or (not error and self._ports.in_string):
            error = self._finish()
        self._stopper.running(False)
        if observer is not None:
            observer.left(self._index)
        if vcpu.nmi and not (state.requested | self._withheld) & NMI:
            vcpu.nmi = False
        self._withheld = 0
        if self._error is not None:
            failure, self._error = self._error, None
            raise failure
        point = self._points.hit(lambda: linear_ip(self.registers(), self.system_registers()))
        if point is not None:
            exit = Exit(ExitReason.DEBUG, vcpu=self._index, point=point)
            self._tell(exit)
            return exit
        if not error and not state.halted and not self._is_double_fault():
            return None
        exit = self._exit(error)
        if exit.reason is ExitReason.HALT:
            # The shadow of an STI before HLT ends with it; the engine leaves it set.
            state.u32[HFLAGS // 4] &= ~HF_INHIBIT_IRQ & 0xFFFF_FFFF
            if vcpu.interrupts is not None:
                vcpu.halted = True
                vcpu.interruptible = bool(state.u32[EFLAGS // 4] & RFLAGS_IF)
                vcpu.in_nmi = bool(state.u32[HFLAGS2 // 4] & HF2_NMI)
                return None
        self._tell(exit)
        return exit

    def _tell(self, exit: Exit) -> None:
        if self._observer is not None:
            self._observer.other(self._index, exit.reason.value, exit.detail)

    def debug(
        self, breakpoints: Iterable[Point], watched: Iterable[tuple[Point, list[tuple[int, int]]]]
    ) -> None:
        """Stop at these points and no others; see `Points.set()`."""
        with self._state.exceptions_kept():
            self._points.set(breakpoints, watched)
        self._translate_for_steps(False)

    def begin(self) -> None:
        """A run begins: the host may have written code since, of which translations are stale."""
        self._library.flush_translations(self._handle)
        self._ports.begin()
        self._words[StopWords.EXCEPTIONS] = 0

    def _finish(self) -> int:
        """Execute the instruction that was left, and no more; returns the engine's error.

        An INS goes on until it has consumed what it read ahead: the device has given it.
        """
        self._withheld |= self._state.requested
        self._state.request(0)
        self._stopper.hold(True)
        self._replay.repeat()
        self._translate_for_steps(True)
        error = self._start(1)
        self._replay.repeated()
        # What is written may be the INS itself, and then nothing consumes the rest.
        for _ in range(MAX_AHEAD):
            if error or not self._ports.in_string or self._is_double_fault():
                break
            error = self._start(1)
        self._ports.forget_ahead()
        self._translate_for_steps(False)
        self._replay.finished()
        self._stopper.hold(False)
        return error

    def _is_double_fault(self) -> bool:
        """Whether the engine ended for an exception within the delivery of a double fault."""
        return self._state.u32[OLD_EXCEPTION // 4] == _DOUBLE_FAULT

    def _exit(self, error: int) -> Exit:
        import unicorn

        state = self._state
        if not error and not self._is_double_fault():
            return Exit(ExitReason.HALT, vcpu=self._index)
        registers, system = self.registers(), self.system_registers()
        _, instruction = next_instruction(self._memory, registers, system)
        where = f"at rip {registers['rip']:#x}: {instruction}"
        if not error:
            # Left as it is, the next exception would count as one within this.
            state.u32[OLD_EXCEPTION // 4] = 0xFFFF_FFFF
            if not instruction.startswith("`int"):
                # As KVM shows it: for a fault a processor pushes flags with RF (SDM, "RF flag").
                state.write_flags(registers["rflags"] | RFLAGS_RF)
            return Exit(
                ExitReason.SHUTDOWN, f"triple fault: {self._chain()} {where}", vcpu=self._index
            )
        return Exit(
            ExitReason.INTERNAL_ERROR,
            f"the software CPU could not execute the instruction {where} "
            f"({unicorn.UcError(error)})",
            vcpu=self._index,
        )

    def _chain(self) -> str:
        """The exceptions that led to a triple fault, none of which could be delivered."""
        words = self._words
        number, chain, rip = words[StopWords.EXCEPTIONS], list[str](), None
        for back in range(1, min(number, StopWords.RING_SIZE) + 1):
            at = StopWords.RING + 4 * ((number - back) % StopWords.RING_SIZE)
            vector, error, low, high = words[at : at + 4]
            if rip is None:
                rip = low, high
            elif rip != (low, high):
                break
            name = _EXCEPTION_NAMES.get(vector, f"interrupt {vector:#x}")
            if vector in _WITH_ERROR_CODE and vector != _DOUBLE_FAULT:
                name += f" (error code {error:#x})"
            chain.insert(0, name)
        return ", ".join(chain)

    # Hooks. They are called from C: none may let an exception out.

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._stopper.ask(StopWords.KICK)

    def _withhold(self) -> None:
        """No interrupt may come until `_finish()` has finished the INS, soon."""
        if self._state.requested:
            self._withheld |= self._state.requested
            self._state.request(0)
            self._stopper.ask(StopWords.ATTENTION)

    def _raise(self, vector: int, error_code: int = 0) -> None:
        """The instruction whose hook this is raises an exception instead."""
        self._words[StopWords.VECTOR] = vector
        self._words[StopWords.ERROR] = error_code
        self._words[StopWords.LEAVE] = RAISE

    def _on_vector(self, _uc: int, offset: int, _size: int, _data: int) -> int:
        """An INTA cycle: the CPU takes the interrupt that was requested."""
        try:
            vcpu = self._vcpu
            if offset == _VECTOR_OFFSET and vcpu is not None and vcpu.interrupts is not None:
                return vcpu.interrupts.acknowledge()
        except BaseException as error:
            self._fail(error)
        return 0

    def _on_cpuid(self, _uc: int, _data: int) -> int:
        try:
            u64 = self._state.u64
            leaf, subleaf = u64[RAX] & 0xFFFF_FFFF, u64[RCX] & 0xFFFF_FFFF
            apic = self._vcpu is not None and self._vcpu.interrupts is not None
            answer = self._cpuid.query(leaf, subleaf, self._index, apic)
            u64[RAX], u64[RBX], u64[RCX], u64[RDX] = answer
        except BaseException as error:
            self._fail(error)
        return 1

    # Registers of the selected vCPU.

    def registers(self) -> Registers:
        return self._state.read_general()

    def set_registers(self, registers: Registers) -> None:
        if registers["rip"] != self._state.rip:
            self._ports.forget_ahead()
        self._state.write_general(registers)

    def system_registers(self) -> SystemRegisters:
        return self._state.read_system()

    def set_system_registers(self, system: SystemRegisters) -> None:
        self._ports.forget_ahead()
        self._state.write_system(system)
        self._library.flush_tlb(self._handle)

    def power_on(self) -> None:
        """All of the selected vCPU as after power-on, its TSC at 0."""
        self._ports.forget_ahead()
        self._library.context_restore(self._handle, self._reset_context)
        self._library.flush_tlb(self._handle)
        self._state.set_tsc(self._library, 0)

    def state(self) -> State:
        return self._saving.save()

    def restore(self, saved: Saved) -> None:
        self._ports.forget_ahead()
        self._saving.load(saved)

    @property
    def tsc_khz(self) -> int:
        """The frequency of the TSC, as the guest was told; 0 if it has not asked."""
        return self._cpuid.known_khz

    @tsc_khz.setter
    def tsc_khz(self, value: int) -> None:
        self._cpuid.known_khz = value

    @property
    def host_khz(self) -> int:
        """The frequency of that of the host."""
        return self._cpuid.tsc_khz()

    @property
    def host_tsc(self) -> int:
        """The time stamp counter of the host, as it is now."""
        return self._state.tsc(self._library) - self.tsc_offset & 0xFFFF_FFFF_FFFF_FFFF

    @property
    def tsc_offset(self) -> int:
        """What the TSC of the selected vCPU is ahead of the host's, modulo 2^64."""
        return self._state.u64[TSC_OFFSET // 8]

    @tsc_offset.setter
    def tsc_offset(self, value: int) -> None:
        self._state.u64[TSC_OFFSET // 8] = value

    def fpu(self) -> bytes:
        return self._fpu.read()

    def set_fpu(self, image: bytes) -> None:
        self._fpu.write(image)

    def msrs(self, indices: Iterable[int]) -> dict[int, int]:
        return {index: self._engine.msr_read(index) for index in indices}

    def set_msrs(self, values: Mapping[int, int]) -> list[int]:
        for index, value in values.items():
            self._engine.msr_write(index, value)
        return []

    def close(self) -> None:
        if self._callbacks:
            self._stopper.close()
            self._callbacks.clear()
            self._mmio.close()
            self._state.close()
            self._stubs.close()
            for context in self._contexts:
                self._library.context_free(context)
            # The engine has megabytes that should not wait for the garbage collector.
            self._calls.close()
            self._fpu.close()
            del self._saving
            del self._engine
