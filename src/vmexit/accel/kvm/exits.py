"""What KVM's rarer exits mean, in words (KVM API 5)."""

from collections.abc import Callable
from pathlib import Path

from vmexit.abi.kvm import (
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_UNKNOWN,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
)
from vmexit.abi.kvm_run import kvm_run
from vmexit.accel.base import Exit, ExitReason, SystemEvent
from vmexit.arch.x86.code import code_bits, describe_instruction, dump, linear_ip, next_instruction
from vmexit.arch.x86.registers import CR0_PE, Registers, SystemRegisters
from vmexit.core.errors import GuestCrash
from vmexit.core.memory import GuestMemory

_SUBERRORS = {
    1: "emulation failure",
    2: "simultaneous exceptions",
    3: "event delivery needed an exit",
    4: "unexpected exit reason",
}

# The hardware's reasons for refusing to enter a guest, as far as they have names: VMX (Intel SDM
# vol. 3, 26.8; bit 31 set) and SVM (AMD APM vol. 2, 15.5.2: VMEXIT_INVALID).
_ENTRY_FAILURES = {
    0x8000_0021: "invalid guest state (VMX)",
    0x8000_0022: "a bad MSR to load (VMX)",
    0x8000_0029: "a machine check at entry (VMX)",
    0xFFFF_FFFF: "invalid guest state (SVM)",
    0xFFFF_FFFF_FFFF_FFFF: "invalid guest state (SVM)",
}


def explain(
    reason: int,
    run: kvm_run,
    memory: GuestMemory,
    registers: Callable[[], Registers],
    system_registers: Callable[[], SystemRegisters],
) -> Exit:
    """The `Exit` for an exit reason that carries more than its number.

    Raises GuestCrash, with registers, for a reason that is not known.
    """
    if reason == KVM_EXIT_SHUTDOWN:
        # AMD's KVM resets the vCPU before it reports a triple fault (the VMCB is undefined then).
        reset = registers()["rip"] == 0xFFF0 and system_registers().cs.base == 0xFFFF_0000
        more = "; this KVM has reset the vCPU since, and its registers are those after reset"
        return Exit(ExitReason.SHUTDOWN, "triple fault" + (more if reset else ""))
    if reason == KVM_EXIT_SYSTEM_EVENT:
        number = run.system_event.type
        try:
            event = SystemEvent(number)
        except ValueError:
            return Exit(ExitReason.UNKNOWN, f"system event {number}, which vmexit does not know")
        return Exit(ExitReason.SYSTEM_EVENT, event.name.lower(), event)
    if reason == KVM_EXIT_UNKNOWN:
        hardware = run.hw.hardware_exit_reason
        return Exit(ExitReason.UNKNOWN, f"hardware exit reason {hardware:#x}")
    if reason == KVM_EXIT_FAIL_ENTRY:
        hardware = run.fail_entry.hardware_entry_failure_reason
        meaning = _ENTRY_FAILURES.get(hardware, "see the processor manual")
        return Exit(
            ExitReason.FAIL_ENTRY,
            f"the processor refused the guest's state: reason {hardware:#x}, {meaning}",
        )
    regs, system = registers(), system_registers()
    if reason == KVM_EXIT_INTERNAL_ERROR:
        return Exit(ExitReason.INTERNAL_ERROR, _internal_error(run, memory, regs, system))
    _, instruction = next_instruction(memory, regs, system)
    raise GuestCrash(
        f"KVM exit reason {reason} is not known to vmexit\n{dump(regs, system, instruction)}"
    )


def _internal_error(
    run: kvm_run, memory: GuestMemory, regs: Registers, system: SystemRegisters
) -> str:
    suberror = run.internal.suberror
    name = _SUBERRORS.get(suberror, "unnamed")
    code, instruction = next_instruction(memory, regs, system)
    if suberror != KVM_INTERNAL_ERROR_EMULATION:
        data = " ".join(f"{run.internal.data[i]:#x}" for i in range(min(run.internal.ndata, 16)))
        return (
            f"KVM internal error, suberror {suberror} ({name}), data [{data}], "
            f"at rip {regs['rip']:#x}: {instruction}"
        )
    failure = run.emulation_failure
    if (
        failure.ndata >= 1
        and failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        and failure.insn_size
    ):
        # KVM's own copy: what it fetched, even if memory has changed since.
        code = bytes(failure.insn_bytes[: failure.insn_size])
        instruction = describe_instruction(code, linear_ip(regs, system), code_bits(regs, system))
    return (
        f"KVM could not emulate the instruction at rip {regs['rip']:#x}: {instruction} "
        f"(suberror {suberror}, {name}); {_why_emulated(regs, system)}"
    )


def _why_emulated(regs: Registers, system: SystemRegisters) -> str:
    """What made KVM emulate an instruction at all, as far as one can tell."""
    if Path("/sys/module/kvm_pvm").exists():
        return "kvm_pvm emulates all of ring 0 and knows only some instructions: use --accel soft"
    if not system.cr0 & CR0_PE:
        unrestricted = Path("/sys/module/kvm_intel/parameters/unrestricted_guest")
        if unrestricted.exists() and unrestricted.read_text().strip() == "N":
            return "this processor emulates real mode (kvm_intel has no unrestricted guest)"
    return "KVM emulates what accesses MMIO or a ROM, or runs from there"
