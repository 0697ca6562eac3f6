"""All that KVM knows of a vCPU, as plain data."""

import struct
from ctypes import Structure, sizeof
from typing import TYPE_CHECKING, NamedTuple

from vmexit.abi.kvm import (
    KVM_GET_MP_STATE,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_GET_VCPU_EVENTS,
    KVM_MP_STATE_RUNNABLE,
    KVM_SET_MP_STATE,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    KVM_SET_VCPU_EVENTS,
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
)
from vmexit.abi.kvm_caps import (
    KVM_CAP_DEBUGREGS,
    KVM_CAP_MP_STATE,
    KVM_CAP_SYNC_REGS,
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
from vmexit.accel.kvm.registers import Request
from vmexit.accel.kvm.time import IA32_TSC, IA32_TSC_DEADLINE, has_tsc_offset
from vmexit.arch.x86.registers import MTRRS
from vmexit.core.bus import State
from vmexit.core.errors import ConfigError, HostError
from vmexit.core.known import Known
from vmexit.core.saved import Saved
from vmexit.core.steps import Steps

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
# MSRs come behind the first half, since the TSC deadline needs the mode of the local APIC's timer.
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

# HV_X64_MSR_VP_RUNTIME and _TIME_REF_COUNT of Hyper-V, which guests are not shown: how long the
# host's thread has run the vCPU, and the VM's clock. KVM lists them, and they never stand still.
_COUNTERS = (0x4000_0010, 0x4000_0020)

_VERSION = 2
_MOST_CPUID = 1 << 16  # bytes
_MOST_MSRS = 2048
_MOST_KHZ = (1 << 31) - 1
_MOST_KNOWN, _MOST_NEW = 64, 64  # states of vCPUs that are kept, and of new ones


class _Parts(NamedTuple):
    """Those that there are on a KVM."""

    first: list[_Part]
    last: list[_Part]
    every: list[_Part]
    by_run: dict[str, int]
    """The parts that KVM_RUN can take with it, with the flag for each."""

    @classmethod
    def of(cls, system: "System", *, lapic: bool) -> "_Parts":
        """`lapic`: the local APICs are the kernel's."""
        first, last = (
            [part for part in parts if system.check_extension(part.capability)]
            for parts in (_FIRST, _LAST)
        )
        synced = system.check_extension(KVM_CAP_SYNC_REGS)
        wanted = {"regs": KVM_SYNC_X86_REGS}
        # A LAPIC needs the APIC base that is among the one, and an NMI that another vCPU has sent
        # meanwhile is among the other.
        if not lapic:
            wanted |= {"sregs": KVM_SYNC_X86_SREGS, "events": KVM_SYNC_X86_EVENTS}
        there = all(synced & flag for flag in wanted.values()) and len(last) == len(_LAST)
        lapics = [_LAPIC] if lapic else []
        return cls(
            first + lapics,
            # A vCPU without a LAPIC in the kernel is always runnable (KVM API 4.38).
            last if lapic else [part for part in last if part.name != "mp_state"],
            [*first, *lapics, *last],
            wanted if there else {},
        )


_kinds: dict[tuple[str, bool], _Parts] = {}  # by the path of the KVM, and whether it has LAPICs


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


# The order in `struct kvm_sync_regs`.
_SYNCED = "regs", "sregs", "events"


# What nobody but the vCPU itself changes: a new one has it as each new one has. That is so of its
# MSRs, too, but for some of Hyper-V's and KVM's that belong to the VM: vCPUs are loaded in their
# order, so one that is new finds these as the vCPUs before it have left them.
_ITS_OWN = "xcrs", "xsave", "debugregs"


class _Changes(NamedTuple):
    """From a new vCPU to a state, besides what KVM_RUN takes."""

    new: VcpuState
    requests: list[Request]
    msrs: dict[int, int]


class _Loadable:
    """A state as KVM takes it: buffers for its requests, filled in once. Any thread may use it."""

    def __init__(self, state: VcpuState, there: _Parts) -> None:
        self.tsc_khz = state.tsc_khz
        self.cpuid = state.cpuid
        self.msrs = msrs.Wanted(state.msrs)
        self._changes: _Changes | None = None
        self.cr8 = kvm_sregs.from_buffer_copy(state.parts["sregs"]).cr8
        self.first = self._requests(there.first, state)
        self.last = self._requests(there.last, state)
        # A vCPU that waits for its SIPI has got that before KVM_RUN looks at registers, which would
        # put it back.
        mp_state = state.parts.get("mp_state", bytes(sizeof(kvm_mp_state)))
        runs = kvm_mp_state.from_buffer_copy(mp_state).mp_state == KVM_MP_STATE_RUNNABLE
        self.by_run = there.by_run if runs else {}
        self.registers = b"".join(state.parts[name] for name in _SYNCED) if self.by_run else b""
        self.which = sum(self.by_run.values())
        self.beside = [one for one in self.first + self.last if one.what not in self.by_run]

    def changes(self, new: VcpuState) -> _Changes:
        """What is to be loaded into a vCPU that is `new`."""
        changes = self._changes
        if changes is None or changes.new is not new:
            requests = [
                one
                for one in self.beside
                if one.what not in _ITS_OWN or one.data != new.parts[one.what]
            ]
            values = self.msrs.unlike_in(msrs.unpack(new.msrs))
            changes = self._changes = _Changes(new, requests, values)
        return changes

    @staticmethod
    def _requests(parts: list[_Part], state: VcpuState) -> list[Request]:
        # fcntl takes more than 1 KiB only if it may be written to.
        return [Request(part.name, part.set, bytearray(state.parts[part.name])) for part in parts]


class _Again:
    """A vCPU that is to be in a state which KVM has taken, again and again; it does not run then.

    The registers go with KVM_RUN: most often nobody looks before it runs.
    """

    def __init__(self, vcpu: "KvmVcpu", state: State, loadable: _Loadable) -> None:
        self.state = state
        self._msrs = loadable.msrs.twin()
        self._vcpu = vcpu
        self._loadable = loadable
        self._steps: Steps | None = None
        self._asked = 0  # so many of them ask; the rest compare what came, and enter
        self._enter = Steps()  # those of them that do so
        self._add_enter(self._enter)

    def _add_enter(self, steps: Steps) -> None:
        loadable = self._loadable
        self._vcpu.enter_with(steps, loadable.registers, loadable.which, loadable.cr8)

    def load_into_new(self, new: VcpuState) -> None:
        """Put it there for the first time: it is as `new`. Raises ConfigError, HostError."""
        self._vcpu.require_own()  # a fork has the page with the registers, and KVM may not be asked
        _, requests, values = self._loadable.changes(new)
        self._vcpu.set_beside(requests)
        self._end(values)

    def load(self) -> None:
        """Put it there once more. Raises ConfigError, HostError."""
        steps = self._steps
        if steps is None:
            steps = self._steps = self._make()
        done = steps.run()
        if done == len(steps):
            return
        if done >= self._asked:
            self._end(self._msrs.differing())
        else:  # once more, for what KVM says
            self._vcpu.set_beside(self._loadable.beside)
            self._end(self._msrs.unlike(self._vcpu.fd))

    def _end(self, values: dict[int, int]) -> None:
        """What is left when all but these MSRs and the registers are as they should be."""
        # Before registers wait, which to set an MSR would load.
        if values and (refused := self._vcpu.set_msrs(values)):
            raise _refused(refused)
        self._enter.run()

    def _make(self) -> Steps:
        steps, fd = Steps(), self._vcpu.fd
        # What may be refused comes first: a fork has the page with the registers, too.
        for _, number, data in self._loadable.beside:
            steps.call(fd, number, data)
        self._msrs.ask(steps, fd)
        self._asked = len(steps)
        self._msrs.compare(steps)
        self._add_enter(steps)
        return steps

    def close(self) -> None:
        """Let go of the vCPU's pages, whoever holds this: an exception may."""
        self._enter.clear()
        if self._steps is not None:
            self._steps.clear()


_known: Known[_Loadable] = Known(_MOST_KNOWN)  # which KVM has taken
_new: dict[tuple[str, bool, int, bytes], VcpuState] = {}  # by kind, number and CPUID


class StateAccess:
    """Saves and loads the state of vCPUs; which parts there are depends on this KVM."""

    def __init__(self, system: "System", *, lapic: bool) -> None:
        """`lapic`: the local APICs are the kernel's."""
        self._system = system
        self._kind = system.path, lapic
        parts = _kinds.get(self._kind)
        if parts is None:
            parts = _kinds[self._kind] = _Parts.of(system, lapic=lapic)
        self._parts = parts
        self._last: dict[int, _Again] = {}  # by the number of the vCPU

    def save(self, vcpu: "KvmVcpu") -> VcpuState:
        """The state of `vcpu`, which does not run. Raises HostError."""
        parts = {}
        # The MP state first: to tell it, KVM does what an INIT or a SIPI asks for, and that changes
        # CS and RIP.
        for part in sorted(self._parts.every, key=lambda part: part.name != "mp_state"):
            buffer = bytearray(sizeof(part.layout))
            vcpu.get(part.name, part.get, buffer)
            parts[part.name] = bytes(buffer)
        # KVM_GET_MSR_INDEX_LIST leaves the MTRRs out.
        indices = dict.fromkeys((*self._system.msr_indices(), *MTRRS))
        for counter in _COUNTERS:
            indices.pop(counter, None)
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
        if has_tsc_offset(self._system, vcpu):  # what the VM saves has it, more exactly
            values = msrs.unpack(state.msrs)
            values.pop(IA32_TSC, None)
            if values.get(IA32_TSC_DEADLINE):  # armed: by that counter, and not by what is there
                del values[IA32_TSC_DEADLINE]
            state = state._replace(msrs=msrs.pack(values))
        return state.plain()

    def parse(self, state: State) -> VcpuState:
        """What `VcpuState.plain()` gave. Raises ConfigError for anything else."""
        saved = Saved(state, "a vCPU of this KVM", _VERSION)
        parts = state.get("parts")
        layouts = {part.name: sizeof(part.layout) for part in self._parts.every}
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
        """Put `vcpu`, standing still, into what `plain()` gave. Raises ConfigError, HostError."""
        last = self._last.get(vcpu.index)
        if last is not None and last.state is state:
            last.load()
            return
        known = _known.find(state, self._kind)
        loadable = _Loadable(self.parse(state), self._parts) if known is None else known
        if loadable.cpuid != vcpu.cpuid:
            _show(vcpu, loadable.cpuid)
        _count_as(vcpu, loadable)
        if known is not None and loadable.which and vcpu.new:
            new = self._as_new(vcpu)
            # Made before anything can fail, and where close() finds it: it holds the vCPU's pages.
            again = self._last[vcpu.index] = _Again(vcpu, state, loadable)
            again.load_into_new(new)
            return
        if refused := self._load(vcpu, loadable):
            raise _refused(refused)
        if known is None:
            _known.add(state, loadable, self._kind)
        if loadable.which:
            self._last[vcpu.index] = _Again(vcpu, state, loadable)

    def _as_new(self, vcpu: "KvmVcpu") -> VcpuState:
        """The state of a vCPU that is new, and so of each that is made like that."""
        key = *self._kind, vcpu.index, vcpu.cpuid
        new = _new.get(key)
        if new is None:
            if len(_new) >= _MOST_NEW:
                _new.clear()
            new = _new[key] = self.save(vcpu)
        return new

    def close(self) -> None:
        """Before the vCPUs are."""
        for again in self._last.values():
            again.close()
        self._last.clear()

    def load(self, vcpu: "KvmVcpu", state: VcpuState) -> list[int]:
        """Put `vcpu` into `state`. Returns the MSRs that KVM refused. Raises HostError."""
        loadable = _Loadable(state, self._parts)
        _count_as(vcpu, loadable)
        return self._load(vcpu, loadable)

    def _load(self, vcpu: "KvmVcpu", state: _Loadable) -> list[int]:
        if (last := self._last.pop(vcpu.index, None)) is not None:
            last.close()
        vcpu.set_all(state.first)
        vcpu.set_cr8(state.cr8)
        # Not each KVM lets every MSR be written, even with what is in it.
        refused = vcpu.set_msrs(state.msrs.twin().unlike(vcpu.fd))
        vcpu.set_all(state.last)
        return refused


def _count_as(vcpu: "KvmVcpu", state: _Loadable) -> None:
    """Its TSC is as fast as that was, before anything else: other clocks may go by it."""
    if state.tsc_khz and vcpu.tsc_khz() != state.tsc_khz:
        vcpu.set_tsc_khz(state.tsc_khz)


def _refused(indices: list[int]) -> ConfigError:
    return ConfigError(
        f"this KVM refuses MSR {indices[0]:#x} as it was saved; restore it on a host with "
        "the processor and the kernel that it was saved on"
    )


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
