"""A VM's file descriptor: memory slots and vCPUs."""

import ctypes
import errno
import os
import struct
import time
from collections.abc import Callable
from fcntl import ioctl
from functools import cache, partial
from typing import TYPE_CHECKING

from vmexit.abi.kvm import (
    KVM_CREATE_VCPU,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_SET_IDENTITY_MAP_ADDR,
    KVM_SET_TSS_ADDR,
    KVM_SET_USER_MEMORY_REGION,
)
from vmexit.abi.kvm_caps import (
    KVM_CAP_IRQCHIP,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_PIT2,
    KVM_CAP_READONLY_MEM,
    KVM_CAP_SET_IDENTITY_MAP_ADDR,
    KVM_CAP_SET_TSS_ADDR,
    KVM_CAP_TSC_DEADLINE_TIMER,
)
from vmexit.abi.kvm_structs import kvm_userspace_memory_region
from vmexit.accel.base import ANY_CPU
from vmexit.accel.kvm.vcpu import KvmVcpu
from vmexit.arch.x86.cpu_model import CpuModel
from vmexit.arch.x86.layout import KVM_IDENTITY_MAP_ADDRESS, KVM_TSS_ADDRESS
from vmexit.core.bus import Bus, State
from vmexit.core.errors import HostError
from vmexit.core.irq import VcpuInterrupts
from vmexit.core.memory import PAGE_SIZE, GuestMemory, Region
from vmexit.core.trace import ExitObserver

if TYPE_CHECKING:
    from vmexit.accel.kvm.debug import KvmDebugger
    from vmexit.accel.kvm.dirty_log import SlotLog
    from vmexit.accel.kvm.dirty_ring import DirtyRings, RingLog
    from vmexit.accel.kvm.irqchip import KvmIrqChip
    from vmexit.accel.kvm.state import StateAccess
    from vmexit.accel.kvm.system import System
    from vmexit.accel.kvm.time import VmTime
    from vmexit.arch.x86.cpuid import Table

_CPUID_ENTRIES = 256


class KvmVm:
    """One VM; made by `System.create_vm()`."""

    def __init__(
        self,
        system: "System",
        fd: int,
        memory: GuestMemory,
        pio: Bus,
        mmio: Bus,
        cpus: int,
        model: CpuModel,
    ) -> None:
        self.fd = fd
        self.later: Callable[[Callable[[], None]], None] | None = None
        """What calls a function that takes some time, while others go on."""
        self._model = model
        self._cpus = cpus
        self._irqchip: KvmIrqChip | None = None
        self._debugger: KvmDebugger | None = None
        self._access: StateAccess | None = None
        self._time: VmTime | None = None
        self._system = system
        self._memory = memory
        self._pio = pio
        self._mmio = mmio
        self._slots: dict[int, int] = {}  # GPA of a region → slot number
        self._logs: dict[int, SlotLog | RingLog] = {}
        self._rings: DirtyRings | None = None
        self._vcpus: list[KvmVcpu] = []
        try:
            # On Intel without unrestricted guest, real mode needs both (KVM API 4.36, 4.40); they
            # must be set before the first vCPU exists.
            if system.check_extension(KVM_CAP_SET_IDENTITY_MAP_ADDR):
                ioctl(fd, KVM_SET_IDENTITY_MAP_ADDR, struct.pack("Q", KVM_IDENTITY_MAP_ADDRESS))
            if system.check_extension(KVM_CAP_SET_TSS_ADDR):
                _ioctl_value(fd, KVM_SET_TSS_ADDR, KVM_TSS_ADDRESS)
            for region in memory.regions:
                self.map(region)
        except OSError as error:
            self.close()
            raise HostError(f"KVM refused to set up the VM: {error.strerror}") from error
        except HostError:
            self.close()
            raise

    def map(self, region: Region, *, log_dirty: bool = False) -> None:
        """Put `region` in a memory slot, or change its flags (KVM API 4.35). Raises HostError."""
        flags = KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        if region.readonly:
            if not self._system.check_extension(KVM_CAP_READONLY_MEM):
                raise HostError(
                    "this KVM lacks KVM_CAP_READONLY_MEM, which a ROM needs; use --accel soft"
                )
            flags |= KVM_MEM_READONLY
        slot = self._slots.setdefault(region.gpa, len(self._slots))
        try:
            self._set_slot(slot, flags, region.gpa, region.size, region.hva)
        except OSError as error:
            raise HostError(
                f"KVM refused the memory slot {region.gpa:#x}..{region.end - 1:#x}: "
                f"{error.strerror}; use less --memory"
            ) from error

    def unmap(self, region: Region) -> None:
        """Take `region` away from the guest."""
        slot = self._slots.pop(region.gpa)
        self._logs.pop(region.gpa, None)
        self._set_slot(slot, 0, region.gpa, 0, region.hva)

    def _set_slot(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        request = kvm_userspace_memory_region(slot, flags, gpa, size, hva)
        ioctl(self.fd, KVM_SET_USER_MEMORY_REGION, bytes(request))

    def use_dirty_rings(self, entries: int) -> None:
        """Have rings of so many entries for each vCPU in the place of the log; before the first.

        A KVM without rings goes on to have the log: it tells the same. Raises HostError.
        """
        from vmexit.accel.kvm.dirty_ring import DirtyRings, most_entries

        if most := most_entries(self._system):
            self._rings = DirtyRings(self.fd, min(entries, most))

    def start_dirty_log(self) -> None:
        """Have KVM note which pages of RAM the vCPUs write to. Raises HostError."""
        from vmexit.accel.kvm.dirty_log import SlotLog, keep_marks

        rings = self._rings
        kept = bool(self._system.check_extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2))
        if kept and rings is None:
            keep_marks(self.fd)
        for region in self._memory.regions:
            if not region.readonly:
                self.map(region, log_dirty=True)
                slot, pages = self._slots[region.gpa], region.size // PAGE_SIZE
                self._logs[region.gpa] = (
                    SlotLog(self.fd, slot, pages, kept=kept)
                    if rings is None
                    else rings.log(slot, pages)
                )

    def written(self, region: Region) -> bytes | bytearray:
        """The pages of `region` written since the last `forget_written()`: see `SlotLog.read()`.

        From a log, what was given once may be missing, unless it was written again.
        """
        return self._logs[region.gpa].read()

    def forget_written(self, region: Region) -> None:
        """What `written()` has given is noted when it is written again. Raises HostError."""
        self._logs[region.gpa].forget()

    def dirty_log(self, region: Region) -> bytes:
        """The pages of `region` written since the last call, one bit each, lowest first.

        Raises HostError.
        """
        bitmap = bytes(self.written(region))
        self.forget_written(region)
        return bitmap

    def assign_ioeventfd(self, gpa: int, size: int, value: int, eventfd: int) -> None:
        """A write of `value`, of `size` bytes at `gpa`, signals `eventfd` in place of an exit.

        KVM_IOEVENTFD (KVM API 4.59). Raises HostError.
        """
        from vmexit.abi.kvm_irq import KVM_IOEVENTFD, KVM_IOEVENTFD_FLAG_DATAMATCH, kvm_ioeventfd

        request = kvm_ioeventfd(
            datamatch=value, addr=gpa, len=size, fd=eventfd, flags=KVM_IOEVENTFD_FLAG_DATAMATCH
        )
        try:
            ioctl(self.fd, KVM_IOEVENTFD, bytes(request))
        except OSError as error:
            raise HostError(
                f"KVM refused an ioeventfd at {gpa:#x}: {error.strerror}; use --accel soft"
            ) from error

    def assign_irqfd(self, gsi: int, eventfd: int) -> None:
        """See `KvmIrqChip.assign_irqfd()`."""
        assert self._irqchip is not None
        self._irqchip.assign_irqfd(gsi, eventfd)

    def create_irqchip(self) -> "KvmIrqChip":
        """Interrupt controllers and the timer of a PC in the kernel; before the first vCPU.

        HLT is no exit any more then: it waits in KVM_RUN. Raises HostError.
        """
        for name, capability in (
            ("KVM_CAP_IRQCHIP", KVM_CAP_IRQCHIP),
            ("KVM_CAP_PIT2", KVM_CAP_PIT2),
        ):
            if not self._system.check_extension(capability):
                raise HostError(f"this KVM lacks {name}, which interrupts need; use --accel soft")
        from vmexit.accel.kvm.irqchip import KvmIrqChip

        self._irqchip = KvmIrqChip(self.fd)
        return self._irqchip

    def create_vcpu(
        self,
        index: int,
        observer: ExitObserver | None = None,
        interrupts: VcpuInterrupts | None = None,
    ) -> KvmVcpu:
        """KVM_CREATE_VCPU (KVM API 4.7), with what CPUID says. Raises HostError."""
        if interrupts is not None:
            raise HostError("KVM's interrupt controllers are its own; use --accel soft")
        try:
            fd = ioctl(self.fd, KVM_CREATE_VCPU, index)
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise HostError(f"vCPU {index} exists already; give each its own index") from error
            raise HostError(
                f"KVM refused to create vCPU {index}: {error.strerror}; free some, or use "
                "--accel soft"
            ) from error
        try:
            vcpu = KvmVcpu(
                fd,
                index,
                self._system.vcpu_mmap_size,
                self._memory,
                self._pio,
                self._mmio,
                observer,
                self._state_access,
            )
        except OSError as error:
            os.close(fd)
            raise _cannot_map(index, error) from error
        self._vcpus.append(vcpu)
        if self._rings is not None:
            try:
                self._rings.add(fd)
            except OSError as error:
                raise _cannot_map(index, error) from error
            vcpu.on_ring_full = self._rings.make_room
        vcpu.begin(self._system.power_on(vcpu), lapic=self._irqchip is not None)
        vcpu.set_cpuid(self._cpuid(index))
        vcpu.new = True
        if self._model.left_out:
            self._check_left_out(vcpu)
        return vcpu

    def _cpuid(self, index: int) -> bytes:
        from vmexit.accel.kvm.cpuid import pack, packed_of_vcpu

        if self._model == ANY_CPU:
            return packed_of_vcpu(*self._cpuid_basis(index))
        return pack(self.cpuid(index))

    def _cpuid_basis(self, index: int) -> tuple[bytes, int, int, bool, bool]:
        lapic = self._irqchip is not None
        deadline = lapic and bool(self._system.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
        return self._system.supported_cpuid(), index, self._cpus, lapic, deadline

    def cpuid(self, index: int) -> "Table":
        """What vCPU `index` is to say of itself. Raises HostError for a model that cannot be."""
        from vmexit.accel.kvm.cpuid import of_vcpu

        return self._model.applied(of_vcpu(*self._cpuid_basis(index)), "KVM")

    def guest_cpuid(self, vcpu: KvmVcpu) -> "Table":
        """What `vcpu` says of itself indeed (KVM_GET_CPUID2): not every KVM does as it is told."""
        from vmexit.accel.kvm.cpuid import empty, parse

        buffer = empty(_CPUID_ENTRIES)
        vcpu.get_cpuid(buffer)
        return parse(buffer)

    def _check_left_out(self, vcpu: KvmVcpu) -> None:
        """Raises HostError if the guest sees a feature that was left out."""
        from vmexit.arch.x86.cpu_features import FEATURES, with_dependents

        table = self.guest_cpuid(vcpu)
        for wanted in self._model.left_out:
            for name in with_dependents([wanted]):
                if FEATURES[name].is_in(table):
                    raise HostError(
                        f"this KVM shows {name} to its guests in spite of -{wanted}; "
                        f"leave -{wanted} out, or use --accel soft"
                    )

    def inject_nmi(self) -> None:
        """KVM_NMI for each vCPU (KVM API 4.64). Raises HostError."""
        from vmexit.abi.kvm_irq import KVM_NMI

        for vcpu in self._vcpus:
            vcpu.set("NMI", KVM_NMI, b"")

    def reset_vcpus(self) -> None:
        """Each vCPU as after power-on: as it is in a VM that was just made. Raises HostError."""
        access, lapic = self._state_access(), self._irqchip is not None
        memory = GuestMemory([(0, PAGE_SIZE)])
        try:
            with self._system.create_vm(
                memory, Bus("port"), Bus("MMIO"), self._cpus, self._model
            ) as new:
                if lapic:
                    new.create_irqchip()
                for vcpu in self._vcpus:
                    access.load(vcpu, access.save(new.create_vcpu(vcpu.index)))
        finally:
            memory.close()

    def _state_access(self) -> "StateAccess":
        if self._access is None:
            from vmexit.accel.kvm.state import StateAccess

            self._access = StateAccess(self._system, lapic=self._irqchip is not None)
        return self._access

    def moment(self, ago: int = 0) -> int:
        return time.monotonic_ns() - ago

    def state(self, moment: int) -> State:
        return self._vm_time().save(moment)

    def restore(self, state: State, moment: int) -> None:
        self._vm_time().load(state, moment)

    def _vm_time(self) -> "VmTime":
        if self._time is None:
            from vmexit.accel.kvm.time import VmTime

            self._time = VmTime(self._system, self.fd, self._vcpus)
        return self._time

    @property
    def debugger(self) -> "KvmDebugger":
        """What stops its vCPUs at points."""
        if self._debugger is None:
            from vmexit.accel.kvm.debug import KvmDebugger

            self._debugger = KvmDebugger(
                self._system, self._memory, self._vcpus, hlt_exits=self._irqchip is None
            )
        return self._debugger

    @property
    def executors(self) -> list[KvmVcpu]:
        """Each vCPU has a thread of its own."""
        return self._vcpus

    def close(self) -> None:
        """Close the vCPUs, then the VM."""
        if self._rings is not None:
            self._rings.close()
        if self._access is not None:
            self._access.close()
        for vcpu in self._vcpus:
            vcpu.close()
        self._vcpus.clear()
        if self._irqchip is not None:
            self._irqchip.close()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            # With interrupt controllers it takes the kernel some milliseconds.
            if self.later is not None and self._irqchip is not None:
                self.later(partial(_close_meanwhile, fd))
            else:
                os.close(fd)

    def __enter__(self) -> "KvmVm":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _close_meanwhile(fd: int) -> None:
    """Close `fd`, whose number nobody gets before all is gone.

    KVM has a folder in debugfs for each VM, by the number, and complains where there is one yet.
    """
    try:
        other = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        os.close(fd)
        return
    os.dup2(other, fd, inheritable=False)
    os.close(other)
    os.close(fd)


def _cannot_map(vcpu: int, error: OSError) -> HostError:
    return HostError(f"cannot map vCPU {vcpu}: {error.strerror}; raise the limits (ulimit -n, -v)")


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _ioctl_value(fd: int, request: int, value: int) -> None:
    """An ioctl whose argument is a number, not a pointer, above what fcntl.ioctl takes."""
    if _libc().ioctl(fd, ctypes.c_ulong(request), ctypes.c_ulong(value)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
