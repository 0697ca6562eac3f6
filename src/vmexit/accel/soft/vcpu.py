"""The vCPU of a Unicorn engine: hooks that answer its I/O, and the loop around `uc_emu_start`."""

from collections.abc import Callable, Iterable, Mapping

from vmexit.accel.base import Exit, ExitReason
from vmexit.accel.soft.cpu_state import (
    EFLAGS,
    ERROR_CODE,
    HF_CPL,
    HF_INHIBIT_IRQ,
    HFLAGS,
    IS_INT,
    OLD_EXCEPTION,
    CpuState,
)
from vmexit.accel.soft.mmio import Mmio
from vmexit.accel.soft.native import (
    Engine,
    InCallback,
    InterruptCallback,
    Library,
    OutCallback,
    StopWords,
    Stubs,
    SyscallCallback,
    address_of,
)
from vmexit.accel.soft.ports import PortAccess, bitmap_allows, decode_port_access
from vmexit.accel.soft.replay import Replay
from vmexit.arch.x86.code import (
    MAX_INSTRUCTION,
    code_bits,
    linear_ip,
    next_instruction,
    read_linear,
)
from vmexit.arch.x86.registers import (
    CR0_PE,
    EFER_LMA,
    EFER_SCE,
    RFLAGS_DF,
    RFLAGS_RF,
    RFLAGS_VM,
    Registers,
    SystemRegisters,
)
from vmexit.core.bus import Bus
from vmexit.core.memory import PAGE_SIZE, GuestMemory
from vmexit.core.trace import ExitObserver

# KVM reads ahead for INS in pieces of at most so many bytes (arch/x86/kvm, read-ahead buffer);
# vmexit does the same, so that both accelerators show a device the same accesses.
_INS_AHEAD = 1024

_EXCEPTION_NAMES = {
    0: "#DE", 1: "#DB", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS",
    11: "#NP", 12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM",
}  # fmt: skip
_SYSTEM_CALL = -1  # no exception: SYSCALL or SYSENTER, with somewhere to go
_MSR_SYSENTER_CS = 0x174

_DEBUG, _UNDEFINED_OPCODE, _GENERAL_PROTECTION = 1, 6, 13

_MAX_PLAIN = 4096


class SoftVcpu:
    """The one vCPU of an engine; made by `SoftVm.create_vcpu()`."""

    def __init__(
        self,
        library: Library,
        engine: Engine,
        index: int,
        memory: GuestMemory,
        pio: Bus,
        mmio: Bus,
        observer: ExitObserver | None,
        holes: list[tuple[int, int]],
    ) -> None:
        from unicorn import x86_const

        self.index = index
        self._library = library
        self._engine = engine
        self._handle = engine._uch.value or 0
        self._memory = memory
        self._pio = pio
        self._observer = observer
        engine.reg_read(x86_const.UC_X86_REG_RAX)  # the engine makes its CPU at the first use
        cpu: int = library.get_cpu(self._handle, -1)
        prefix = "UC_X86_REG_"
        ids = {
            name.removeprefix(prefix).lower(): getattr(x86_const, name)
            for name in dir(x86_const)
            if name.startswith(prefix)
        }
        ids |= {"gdt": ids["gdtr"], "idt": ids["idtr"]}
        self._state = CpuState(engine, cpu, ids)
        self._stubs = Stubs(library, self._handle, cpu)
        self._words = self._stubs.view
        self._replay = Replay(self._words)
        self._mmio = Mmio(
            library,
            self._handle,
            index,
            mmio,
            observer,
            self._words,
            self._replay,
            lambda: self._state.rip,
            self._fail,
        )
        # What must outlive this call: C holds the addresses of these.
        self._callbacks: list[object] = []
        # The first thing that went wrong inside a callback, where no exception can pass.
        self._error: BaseException | None = None
        self._exception: tuple[int, int, bool] | None = None  # vector, error code, is `int n`
        self._plain: set[int] = set()  # where an IN or OUT is known not to be a string one
        self._ahead: list[int] = []  # what an INS has read but not consumed yet, last first
        self._ahead_of = (0, 0, 0)  # and which: RIP, port, size
        self._postponed = False  # a kick waits until all that is consumed
        self._install(holes)

    def _install(self, holes: list[tuple[int, int]]) -> None:
        import unicorn
        from unicorn import x86_const

        hook, engine = self._library.hook, self._handle
        out_stub = self._stubs.leaving_hook(self._c(OutCallback(self._on_out)))
        in_stub = self._stubs.leaving_hook(self._c(InCallback(self._on_in)))
        hook(engine, unicorn.UC_HOOK_INSN, out_stub, instruction=x86_const.UC_X86_INS_OUT)
        hook(engine, unicorn.UC_HOOK_INSN, in_stub, instruction=x86_const.UC_X86_INS_IN)
        for number, function in (
            (x86_const.UC_X86_INS_SYSCALL, self._on_syscall),
            (x86_const.UC_X86_INS_SYSENTER, self._on_sysenter),
        ):
            stub = self._stubs.leaving_hook(self._c(SyscallCallback(function)))
            hook(engine, unicorn.UC_HOOK_INSN, stub, instruction=number)
        hook(engine, unicorn.UC_HOOK_BLOCK, self._stubs.block_hook())
        hook(engine, unicorn.UC_HOOK_INTR, self._c(InterruptCallback(self._on_exception)))
        for gpa, size in holes:
            self._mmio.add_hole(gpa, size, self._stubs)
        for region in self._memory.regions:
            if region.readonly:
                self._mmio.add_rom(region, self._stubs)
        self._stubs.seal()

    def _c(self, callback: Callable[..., object]) -> int:
        self._callbacks.append(callback)
        return address_of(callback)

    # Running.

    def attach_thread(self) -> None:
        """Any thread may run it."""

    def detach_thread(self) -> None:
        """Nothing was attached."""

    def kick(self) -> None:
        self._words[StopWords.KICK] = 1

    def run(self) -> Exit:
        words = self._words
        # The host may have written code since: translations of it would be stale.
        self._library.flush_translations(self._handle)
        self._plain.clear()
        while True:
            words[StopWords.STOPPED] = 0
            self._exception = None
            error = self._library.emu_start(self._handle, self._state.rip, 0, 0, 0)
            if self._replay.unfinished:
                error = self._finish()
            if self._error is not None:
                failure, self._error = self._error, None
                words[StopWords.KICK] = 0
                raise failure
            if words[StopWords.STOPPED] and not error and self._exception is None:
                words[StopWords.KICK] = 0
                return Exit(ExitReason.INTERRUPTED)
            exit = self._exit(error)
            if self._observer is not None:
                self._observer.other(self.index, exit.reason.value, exit.detail)
            return exit

    def _finish(self) -> int:
        """Execute the instruction that was left, and no more; returns the engine's error."""
        words = self._words
        words[StopWords.HOLD] = 1
        self._replay.repeat()
        # The limit of one instruction holds for code that is translated with it only.
        self._library.flush_translations(self._handle)
        error: int = self._library.emu_start(self._handle, self._state.rip, 0, 0, 1)
        self._library.flush_translations(self._handle)
        self._replay.finished()
        words[StopWords.HOLD] = 0
        words[StopWords.STOPPED] = 1
        return error

    def _exit(self, error: int) -> Exit:
        import unicorn

        registers, system = self.registers(), self.system_registers()
        if self._exception is None and error == unicorn.UC_ERR_INSN_INVALID:
            self._exception = (_UNDEFINED_OPCODE, 0, False)
        if self._exception is not None and self._exception[0] == _SYSTEM_CALL:
            _, instruction = next_instruction(self._memory, registers, system)
            return Exit(
                ExitReason.INTERNAL_ERROR,
                f"the software accelerator cannot execute {instruction}; use --accel kvm",
            )
        if self._exception is not None:
            return self._undelivered(*self._exception, registers, system)
        if not error:
            return Exit(ExitReason.HALT)
        _, instruction = next_instruction(self._memory, registers, system)
        return Exit(
            ExitReason.INTERNAL_ERROR,
            f"the software CPU could not execute the instruction at rip {registers['rip']:#x}: "
            f"{instruction} ({unicorn.UcError(error)})",
        )

    def _undelivered(
        self,
        vector: int,
        error_code: int,
        software: bool,
        registers: Registers,
        system: SystemRegisters,
    ) -> Exit:
        """An exception: with no gate to take it, nor its #GP and #DF, it is a triple fault."""
        if software:
            # RIP is behind the INT; a fault in its delivery points at it (SDM vol. 3, 6.12).
            registers["rip"] -= self._software_interrupt_length(registers, system)
        elif vector != _DEBUG:
            # As KVM shows it; a processor sets RF in the flags that it pushes (SDM, "RF flag").
            registers["rflags"] |= RFLAGS_RF
        self.set_registers(registers)
        _, instruction = next_instruction(self._memory, registers, system)
        name = _EXCEPTION_NAMES.get(vector, f"interrupt {vector:#x}")
        what = f"{name} (error code {error_code:#x}) at rip {registers['rip']:#x}: {instruction}"
        if not any(self._has_gate(v, system) for v in (vector, 13, 11, 8)):
            return Exit(ExitReason.SHUTDOWN, f"triple fault: no IDT entry for {what}")
        return Exit(
            ExitReason.INTERNAL_ERROR,
            f"the software accelerator cannot deliver through the IDT: {what}; use --accel kvm",
        )

    def _software_interrupt_length(self, registers: Registers, system: SystemRegisters) -> int:
        before = read_linear(self._memory, system, linear_ip(registers, system) - 2, 2)
        return 2 if before[:1] == b"\xcd" else 1

    def _has_gate(self, vector: int, system: SystemRegisters) -> bool:
        """Whether the IDT has a present gate for `vector`; real mode's table has no such bit."""
        if not system.cr0 & CR0_PE:
            return vector * 4 + 3 <= system.idt.limit
        size = 16 if system.efer & EFER_LMA else 8
        if vector * size + size - 1 > system.idt.limit:
            return False
        gate = read_linear(self._memory, system, system.idt.base + vector * size, 8)
        return len(gate) == 8 and bool(gate[5] & 0x80)

    # Hooks. They are called from C: none may let an exception out.

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._words[StopWords.KICK] = 1

    def _on_exception(self, _uc: int, vector: int, _data: int) -> None:
        try:
            state = self._state
            self._exception = (
                vector,
                state.u32[ERROR_CODE // 4],
                bool(state.u32[IS_INT // 4]),
            )
            # Left as it is, the next exception would count as a double fault.
            state.u32[OLD_EXCEPTION // 4] = 0xFFFF_FFFF
            self._library.emu_stop(self._handle)
        except BaseException as error:
            self._fail(error)

    def _on_syscall(self, _uc: int, _data: int) -> None:
        """The engine only steps over SYSCALL and SYSENTER."""
        try:
            enabled = self._state.read_system().efer & EFER_SCE
            self._exception = (_SYSTEM_CALL if enabled else _UNDEFINED_OPCODE, 0, False)
        except BaseException as error:
            self._fail(error)
        self._words[StopWords.LEAVE] = 1

    def _on_sysenter(self, _uc: int, _data: int) -> None:
        try:
            usable = self._engine.msr_read(_MSR_SYSENTER_CS) & 0xFFFC
            self._exception = (_SYSTEM_CALL if usable else _GENERAL_PROTECTION, 0, False)
        except BaseException as error:
            self._fail(error)
        self._words[StopWords.LEAVE] = 1

    def _on_out(self, _uc: int, port: int, size: int, value: int, _data: int) -> None:
        try:
            if self._replay.repeating and self._replay.answer("out", port, size) is not None:
                return
            if self._refused(port, size):
                return
            if self._observer is not None:
                data = value.to_bytes(4, "little")[:size]
                self._observer.io(self.index, True, port, size, 1, data)
            self._pio.write(port, size, value)
        except BaseException as error:
            self._fail(error)
        self._made("out", port, size, value)

    def _on_in(self, _uc: int, port: int, size: int, _data: int) -> int:
        try:
            if self._replay.repeating:
                answer = self._replay.answer("in", port, size)
                if answer is not None:
                    return answer
            if self._refused(port, size):
                return 0
            rip = self._state.rip
            if self._ahead:
                value = self._take_ahead(rip, port, size)
            elif rip in self._plain:
                value = self._read_port(port, size)
            else:
                value = self._first_in(rip, port, size)
        except BaseException as error:
            self._fail(error)
            value = (1 << 8 * size) - 1
        self._made("in", port, size, value)
        return value

    def _made(self, kind: str, port: int, size: int, value: int) -> None:
        """A port access was made, and perhaps it was the last one of the run."""
        rip = self._state.rip
        kicked = self._words[StopWords.KICK] and not self._replay.repeating
        if rip in self._plain and not kicked:
            return
        access = self._port_access()
        if access is None or not access.string:
            self._note_plain(rip)
            if kicked and access is not None:
                self._leave(access, value if kind == "in" else None, size)
        elif access.repeated:
            # The next element begins a block; but the memory side may be MMIO, and leave this one.
            self._replay.note(rip, kind, port, size, value)
        else:
            self._replay.made(rip, kind, port, size, value)

    def _note_plain(self, rip: int) -> None:
        """No string access is at `rip`: no need to look at it again in this run."""
        if len(self._plain) >= _MAX_PLAIN:
            self._plain.clear()
        self._plain.add(rip)

    def _refused(self, port: int, size: int) -> bool:
        """Whether the code may not use the port: the engine leaves that check to us.

        Then the block is left at once, before the instruction, with #GP to deliver.
        """
        state = self._state
        flags = state.u32[EFLAGS // 4]
        level = 3 if flags & RFLAGS_VM else state.u32[HFLAGS // 4] & HF_CPL
        if not level or (level <= flags >> 12 & 3 and not flags & RFLAGS_VM):
            return False
        if bitmap_allows(self._memory, self.system_registers(), port, size):
            return False
        self._exception = (_GENERAL_PROTECTION, 0, False)
        self._words[StopWords.LEAVE] = 1
        return True

    def _read_port(self, port: int, size: int) -> int:
        value = self._pio.read(port, size)
        if self._observer is not None:
            self._observer.io(self.index, False, port, size, 1, value.to_bytes(size, "little"))
        return value

    def _take_ahead(self, rip: int, port: int, size: int) -> int:
        if (rip, port, size) == self._ahead_of:
            value = self._ahead.pop()
            if self._postponed and not self._ahead:
                self._postponed = False
                self._words[StopWords.KICK] = 1
            return value
        # The INS was left in the middle, by an exception: what it had read is lost, as on KVM.
        if self._postponed:
            self._words[StopWords.KICK] = 1
        self._forget_ahead()
        return self._first_in(rip, port, size)

    def _first_in(self, rip: int, port: int, size: int) -> int:
        """An IN not seen before: the start of a REP INS reads ahead, as KVM does."""
        access = self._port_access()
        if access is None or not access.string:
            self._note_plain(rip)
            return self._read_port(port, size)
        if not access.repeated:
            return self._read_port(port, size)
        mask = (1 << access.address_bits) - 1
        registers = self._state.read_general()
        in_page = registers["rdi"] % PAGE_SIZE
        if not registers["rflags"] & RFLAGS_DF:
            in_page = PAGE_SIZE - in_page
        count = max(1, min(in_page, _INS_AHEAD // size, registers["rcx"] & mask))
        data = self._pio.read_string(port, size, count)
        if self._observer is not None:
            self._observer.io(self.index, False, port, size, count, data)
        values = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
        self._ahead = values[:0:-1]
        self._ahead_of = (rip, port, size)
        if self._ahead and self._words[StopWords.KICK]:
            # What was read is consumed first, or the device would have lost it.
            self._words[StopWords.KICK] = 0
            self._postponed = True
        return values[0]

    def _port_access(self) -> PortAccess | None:
        registers, system = self.registers(), self.system_registers()
        code = read_linear(self._memory, system, linear_ip(registers, system), MAX_INSTRUCTION)
        return decode_port_access(code, code_bits(registers, system))

    def _leave(self, access: PortAccess, value: int | None, size: int) -> None:
        """Finish the port access under way (`value` is what an IN read), and stop behind it."""
        state = self._state
        state.rip += access.length
        state.u32[HFLAGS // 4] &= ~HF_INHIBIT_IRQ & 0xFFFF_FFFF
        if value is not None:
            keep = 0 if size == 4 else state.u64[0] >> 8 * size << 8 * size
            state.u64[0] = keep | value
        self._words[StopWords.STOPPED] = 1
        self._words[StopWords.LEAVE] = 1

    def _forget_ahead(self) -> None:
        """The vCPU goes on elsewhere: what a REP INS has read for later is lost, as on KVM."""
        self._ahead.clear()
        self._postponed = False

    # Registers.

    def registers(self) -> Registers:
        return self._state.read_general()

    def set_registers(self, registers: Registers) -> None:
        if registers["rip"] != self._state.rip:
            self._forget_ahead()
        self._state.write_general(registers)

    def system_registers(self) -> SystemRegisters:
        return self._state.read_system()

    def set_system_registers(self, system: SystemRegisters) -> None:
        self._forget_ahead()
        self._state.write_system(system)
        self._library.flush_tlb(self._handle)

    def msrs(self, indices: Iterable[int]) -> dict[int, int]:
        return {index: self._engine.msr_read(index) for index in indices}

    def set_msrs(self, values: Mapping[int, int]) -> list[int]:
        for index, value in values.items():
            self._engine.msr_write(index, value)
        return []

    def close(self) -> None:
        if self._callbacks:
            self._callbacks.clear()
            self._mmio.close()
            self._state.close()
            self._stubs.close()
            # The engine has megabytes that should not wait for the garbage collector.
            del self._engine
