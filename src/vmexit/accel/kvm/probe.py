"""Whether this KVM executes what kernels consist of, or emulates ring 0 and knows only some of it.

A hypervisor that has no virtualization to build on (it runs in a VM itself) may offer KVM with an
emulator for ring 0. Firmware and small guests run on that; kernels end at the first instruction
that it lacks.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmexit.abi.kvm_state import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
)
from vmexit.accel.base import ExitReason
from vmexit.arch.x86.paging import identity_map
from vmexit.arch.x86.registers import Table
from vmexit.arch.x86.segments import boot_gdt, general, long_mode
from vmexit.core.bus import Bus
from vmexit.core.errors import HostError
from vmexit.core.memory import PAGE_SIZE, GuestMemory

if TYPE_CHECKING:
    from vmexit.accel.kvm.system import System
    from vmexit.accel.kvm.vcpu import KvmVcpu

_CODE, _GDT, _PAGE_TABLES = 0, PAGE_SIZE, 2 * PAGE_SIZE
_PAGES = 5
_GIB = 1 << 30
# fnclex; fwait; hlt: on every x86-64 processor, and in no kernel's emulator for device access.
_PROGRAM = b"\xdb\xe2\x9b\xf4"

# int3; hlt
_BREAK = b"\xcc\xf4"
# nop; hlt
_NOP = b"\x90\xf4"
_BEHIND_NOP = 1
# mov [rip], al; hlt: it writes to the HLT's place, where a 0xf4 is and stays: al is that.
_WRITE = b"\xb0\xf4\x88\x05\x00\x00\x00\x00\xf4"
_WRITTEN = 8
# Intel SDM vol. 3, 18.2.4.
_DR7_EXECUTES_0 = 1 << 10 | 2
_DR7_WRITES_0 = _DR7_EXECUTES_0 | 1 << 16

# By path: the same for the life of the host's KVM.
_answers: dict[str, str] = {}
_int3_exits: dict[str, bool] = {}
_registers: dict[tuple[str, bytes], bool] = {}


def why_no_kernels(system: "System") -> str:
    """Why kernels do not run on this KVM, in a few words; empty if they do. Raises HostError."""
    if system.path not in _answers:
        _answers[system.path] = _try(system)
    return _answers[system.path]


def int3_exits(system: "System") -> bool:
    """Whether an INT3 in ring 0 comes to whoever debugs the guest. Raises HostError."""
    if system.path not in _int3_exits:

        def debug(vcpu: "KvmVcpu") -> None:
            vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, [0] * 8)

        _int3_exits[system.path] = _run(system, _BREAK, debug) is ExitReason.DEBUG
    return _int3_exits[system.path]


def breaks_by_register(system: "System") -> bool:
    """Whether a breakpoint in a debug register stops code of ring 0. Raises HostError."""
    return _by_register(system, _NOP, _BEHIND_NOP, _DR7_EXECUTES_0)


def watches_memory(system: "System") -> bool:
    """Whether a write of ring 0 to an address in a debug register is seen. Raises HostError."""
    return _by_register(system, _WRITE, _WRITTEN, _DR7_WRITES_0)


def _by_register(system: "System", program: bytes, address: int, dr7: int) -> bool:
    if (system.path, program) not in _registers:

        def debug(vcpu: "KvmVcpu") -> None:
            control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP
            vcpu.set_guest_debug(control, [address, 0, 0, 0, 0, 0, 0, dr7])

        reason = _run(system, program, debug)
        _registers[system.path, program] = reason is ExitReason.DEBUG
    return _registers[system.path, program]


def _try(system: "System") -> str:
    reason = _run(system, _PROGRAM)
    if reason is ExitReason.HALT:
        return ""
    if reason is ExitReason.INTERNAL_ERROR:
        return "this KVM emulates ring 0 and lacks instructions of kernels"
    raise HostError(f"a probe of {system.path} ended with {reason.value}; use --accel soft")


def _run(
    system: "System", program: bytes, prepare: "Callable[[KvmVcpu], None]" = lambda _: None
) -> ExitReason:
    """How a little 64-bit program in ring 0 ends."""
    memory = GuestMemory([(0, _PAGES * PAGE_SIZE)])
    try:
        memory.write(_CODE, program)
        table = boot_gdt()
        memory.write(_GDT, table)
        memory.write(_PAGE_TABLES, identity_map(_PAGE_TABLES, _GIB))
        with system.create_vm(memory, Bus("port"), Bus("MMIO")) as vm:
            vcpu = vm.create_vcpu(0)
            vcpu.set_system_registers(long_mode(Table(_GDT, len(table) - 1), _PAGE_TABLES))
            vcpu.set_registers(general(_CODE))
            prepare(vcpu)
            return vcpu.run().reason
    finally:
        memory.close()
