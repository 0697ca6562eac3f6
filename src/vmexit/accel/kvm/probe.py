"""Whether this KVM executes what kernels consist of, or emulates ring 0 and knows only some of it.

A hypervisor that has no virtualization to build on (it runs in a VM itself) may offer KVM with an
emulator for ring 0. Firmware and small guests run on that; kernels end at the first instruction
that it lacks.
"""

from typing import TYPE_CHECKING

from vmexit.accel.base import ExitReason
from vmexit.arch.x86.paging import identity_map
from vmexit.arch.x86.registers import Table
from vmexit.arch.x86.segments import boot_gdt, general, long_mode
from vmexit.core.bus import Bus
from vmexit.core.errors import HostError
from vmexit.core.memory import PAGE_SIZE, GuestMemory

if TYPE_CHECKING:
    from vmexit.accel.kvm.system import System

_CODE, _GDT, _PAGE_TABLES = 0, PAGE_SIZE, 2 * PAGE_SIZE
_PAGES = 5
_GIB = 1 << 30
# fnclex; fwait; hlt: on every x86-64 processor, and in no kernel's emulator for device access.
_PROGRAM = b"\xdb\xe2\x9b\xf4"

_answers: dict[str, str] = {}  # by path: the same for the life of the host's KVM


def why_no_kernels(system: "System") -> str:
    """Why kernels do not run on this KVM, in a few words; empty if they do. Raises HostError."""
    if system.path not in _answers:
        _answers[system.path] = _try(system)
    return _answers[system.path]


def _try(system: "System") -> str:
    memory = GuestMemory([(0, _PAGES * PAGE_SIZE)])
    try:
        memory.write(_CODE, _PROGRAM)
        table = boot_gdt()
        memory.write(_GDT, table)
        memory.write(_PAGE_TABLES, identity_map(_PAGE_TABLES, _GIB))
        with system.create_vm(memory, Bus("port"), Bus("MMIO")) as vm:
            vcpu = vm.create_vcpu(0)
            vcpu.set_system_registers(long_mode(Table(_GDT, len(table) - 1), _PAGE_TABLES))
            vcpu.set_registers(general(_CODE))
            reason = vcpu.run().reason
    finally:
        memory.close()
    if reason is ExitReason.HALT:
        return ""
    if reason is ExitReason.INTERNAL_ERROR:
        return "this KVM emulates ring 0 and lacks instructions of kernels"
    raise HostError(f"a probe of {system.path} ended with {reason.value}; use --accel soft")
