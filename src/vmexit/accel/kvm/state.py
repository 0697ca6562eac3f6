"""All that KVM knows of a vCPU, as plain data."""

import struct
from ctypes import Structure, sizeof
from typing import TYPE_CHECKING, NamedTuple

from vmexit.abi.kvm import (
    KVM_GET_MP_STATE,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_GET_VCPU_EVENTS,
    KVM_SET_MP_STATE,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    KVM_SET_VCPU_EVENTS,
)
from vmexit.abi.kvm_caps import (
    KVM_CAP_DEBUGREGS,
    KVM_CAP_MP_STATE,
    KVM_CAP_USER_MEMORY,
    KVM_CAP_VCPU_EVENTS,
    KVM_CAP_XCRS,
    KVM_CAP_XSAVE,
)
from vmexit.abi.kvm_irq import KVM_GET_LAPIC, KVM_SET_LAPIC, kvm_lapic_state
from vmexit.abi.kvm_state import (
    KVM_GET_DEBUGREGS,
    KVM_GET_XCRS,
    KVM_GET_XSAVE,
    KVM_SET_DEBUGREGS,
    KVM_SET_XCRS,
    KVM_SET_XSAVE,
    kvm_debugregs,
    kvm_xcrs,
    kvm_xsave,
)
from vmexit.abi.kvm_structs import kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events
from vmexit.accel.kvm import msrs
from vmexit.accel.kvm.cpuid import lacking, sound
from vmexit.arch.x86.registers import MTRRS
from vmexit.core.bus import State
from vmexit.core.errors import ConfigError, HostError
from vmexit.core.saved import Saved

if TYPE_CHECKING:
    from vmexit.accel.kvm.system import System
    from vmexit.accel.kvm.vcpu import KvmVcpu


class _Part(NamedTuple):
    name: str
    capability: int
    get: int
    set: int
    layout: type[Structure]


# In the order in which they are loaded: what a later one means depends on those before it. The
# MSRs come between the two halves, since the TSC deadline needs the mode of the local APIC's timer.
_FIRST = (
    _Part("sregs", KVM_CAP_USER_MEMORY, KVM_GET_SREGS, KVM_SET_SREGS, kvm_sregs),
    _Part("xcrs", KVM_CAP_XCRS, KVM_GET_XCRS, KVM_SET_XCRS, kvm_xcrs),
    _Part("xsave", KVM_CAP_XSAVE, KVM_GET_XSAVE, KVM_SET_XSAVE, kvm_xsave),
)
_LAPIC = _Part("lapic", KVM_CAP_USER_MEMORY, KVM_GET_LAPIC, KVM_SET_LAPIC, kvm_lapic_state)
_LAST = (
    _Part("events", KVM_CAP_VCPU_EVENTS, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, kvm_vcpu_events),
    _Part("debugregs", KVM_CAP_DEBUGREGS, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, kvm_debugregs),
    _Part("mp_state", KVM_CAP_MP_STATE, KVM_GET_MP_STATE, KVM_SET_MP_STATE, kvm_mp_state),
    _Part("regs", KVM_CAP_USER_MEMORY, KVM_GET_REGS, KVM_SET_REGS, kvm_regs),
)


_CR4_VMXE, _EFER_SVME = 1 << 13, 1 << 12

_VERSION = 2
_MOST_CPUID = 1 << 16  # bytes
_MOST_MSRS = 2048
_MOST_KHZ = (1 << 31) - 1


class VcpuState(NamedTuple):
    """The kernel's own structures by name."""

    parts: dict[str, bytes]
    msrs: bytes
    """A `struct kvm_msr_entry` for each."""
    tsc_khz: int
    """The frequency of the TSC, 0 where this KVM does not tell."""
    cpuid: bytes
    """What the guest was shown: a `struct kvm_cpuid2` with its entries."""

    def plain(self) -> State:
        """What `StateAccess.parse()` reads."""
        head = {"version": _VERSION, "accel": "kvm", "tsc_khz": self.tsc_khz}
        return {**head, "parts": self.parts.copy(), "msrs": self.msrs, "cpuid": self.cpuid}


class StateAccess:
    """Saves and loads the state of vCPUs; which parts there are depends on this KVM."""

    def __init__(self, system: "System", *, lapic: bool) -> None:
        """`lapic`: the local APICs are the kernel's."""
        self._system = system
        self._first = self._there(_FIRST) + ([_LAPIC] if lapic else [])
        self._last = self._there(_LAST)
        self._parsed: dict[int, tuple[State, VcpuState]] = {}  # the last one of each vCPU

    def _there(self, parts: tuple[_Part, ...]) -> list[_Part]:
        return [part for part in parts if self._system.check_extension(part.capability)]

    def save(self, vcpu: "KvmVcpu") -> VcpuState:
        """The state of `vcpu`, which does not run. Raises HostError."""
        parts = {}
        # The MP state first: to tell it, KVM does what an INIT or a SIPI asks for, and that changes
        # CS and RIP.
        for part in sorted(self._first + self._last, key=lambda part: part.name != "mp_state"):
            buffer = bytearray(sizeof(part.layout))
            vcpu.get(part.name, part.get, buffer)
            parts[part.name] = bytes(buffer)
        # KVM_GET_MSR_INDEX_LIST leaves the MTRRs out.
        indices = dict.fromkeys((*self._system.msr_indices(), *MTRRS))
        entries = msrs.pack(vcpu.msrs_that_exist(indices))
        return VcpuState(parts, entries, vcpu.tsc_khz(), vcpu.cpuid)

    def plain(self, vcpu: "KvmVcpu") -> State:
        """The state of `vcpu` as plain data. Raises ConfigError, HostError."""
        state = self.save(vcpu)
        sregs = kvm_sregs.from_buffer_copy(state.parts["sregs"])
        if sregs.cr4 & _CR4_VMXE or sregs.efer & _EFER_SVME:
            raise ConfigError(
                "the guest is a hypervisor itself, whose guests are not saved; end them, and "
                "unload its kvm module"
            )
        return state.plain()

    def parse(self, state: State) -> VcpuState:
        """What `VcpuState.plain()` gave. Raises ConfigError for anything else."""
        saved = Saved(state, "a vCPU of this KVM", _VERSION)
        parts = state.get("parts")
        layouts = {part.name: sizeof(part.layout) for part in self._first + self._last}
        entries = saved.data("msrs", _MOST_MSRS * msrs.ENTRY_SIZE)
        cpuid = saved.data("cpuid", _MOST_CPUID)
        if (
            state.get("accel") != "kvm"
            or not isinstance(parts, dict)
            or parts.keys() != layouts.keys()
            or len(entries) % msrs.ENTRY_SIZE
            or not sound(cpuid)
        ):
            raise saved.error()
        images = saved.part("parts")
        return VcpuState(
            {name: images.data(name, size, size) for name, size in layouts.items()},
            entries,
            saved.number("tsc_khz", _MOST_KHZ),
            cpuid,
        )

    def restore(self, vcpu: "KvmVcpu", state: State) -> None:
        """Put `vcpu` into what `plain()` gave. Raises ConfigError, HostError."""
        known, parsed = self._parsed.get(vcpu.index, (None, None))
        if parsed is None or known is not state:
            parsed = self.parse(state)
            self._parsed[vcpu.index] = state, parsed
        if parsed.cpuid != vcpu.cpuid:
            _show(vcpu, parsed.cpuid)
        refused = self.load(vcpu, parsed)
        if refused:
            raise ConfigError(
                f"this KVM refuses MSR {refused[0]:#x} as it was saved; restore it on a host with "
                "the processor and the kernel that it was saved on"
            )

    def load(self, vcpu: "KvmVcpu", state: VcpuState) -> list[int]:
        """Put `vcpu` into `state`. Returns the MSRs that KVM refused. Raises HostError."""
        for part in self._first:
            vcpu.set(part.name, part.set, bytearray(state.parts[part.name]))
        vcpu.load_cr8(state.parts["sregs"])
        if state.tsc_khz and vcpu.tsc_khz() != state.tsc_khz:
            vcpu.set_tsc_khz(state.tsc_khz)
        # Not each KVM lets every MSR be written, even with what is in it.
        refused = vcpu.set_msrs(vcpu.msrs_unlike(state.msrs))
        for part in self._last:
            vcpu.set(part.name, part.set, bytearray(state.parts[part.name]))
        return refused


def _show(vcpu: "KvmVcpu", cpuid: bytes) -> None:
    """The guest goes on to see the processor that it has seen before, as far as this one has it."""
    if names := lacking(cpuid, vcpu.cpuid):
        raise ConfigError(
            f"the guest was shown {', '.join(names)}, which this machine has not; use the --cpu "
            "and the processor that it was saved with"
        )
    try:
        vcpu.set_cpuid(cpuid)
    except HostError as error:  # KVM wants that before the first run
        raise ConfigError(
            "the guest was shown another processor, and this machine has run already; use a new one"
        ) from error


_INDICES = struct.Struct("=I")


def unpack_indices(data: bytes | bytearray) -> list[int]:
    """The MSR numbers in a `struct kvm_msr_list`."""
    (count,) = _INDICES.unpack_from(data)
    return list(struct.unpack_from(f"={count}I", data, _INDICES.size))
