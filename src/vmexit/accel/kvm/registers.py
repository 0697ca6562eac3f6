"""What is in a vCPU: registers, MSRs, and the requests of KVM that tell and load them."""

import errno
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from ctypes import sizeof
from fcntl import ioctl
from itertools import islice
from typing import NamedTuple

from vmexit.abi.kvm import (
    KVM_GET_CPUID2,
    KVM_GET_MP_STATE,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_SET_CPUID2,
    KVM_SET_MP_STATE,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    KVM_SET_VCPU_EVENTS,
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
)
from vmexit.abi.kvm_run import kvm_run, kvm_sync_regs
from vmexit.abi.kvm_state import (
    KVM_GET_DEBUGREGS,
    KVM_GET_XSAVE,
    KVM_SET_DEBUGREGS,
    KVM_SET_XSAVE,
    kvm_debugregs,
    kvm_xsave,
)
from vmexit.abi.kvm_structs import kvm_regs, kvm_sregs
from vmexit.accel.kvm import msrs
from vmexit.arch.x86 import fxsave
from vmexit.arch.x86.registers import (
    CONTROL,
    GENERAL,
    SEGMENTS,
    TABLES,
    Registers,
    Segment,
    SystemRegisters,
    Table,
)
from vmexit.core.errors import HostError
from vmexit.core.steps import Steps

# In `struct kvm_run` (KVM API 5), for views of it.
_CR8 = 2  # u64 at 16
_DIRTY_REGS: int = kvm_run.kvm_dirty_regs.offset // 8  # u64
_SYNCED: int = kvm_run.s.offset
_SYNCED_END = _SYNCED + sizeof(kvm_sync_regs)

_GENERAL_FORMAT = struct.Struct(f"={len(GENERAL)}Q")
# The beginning of `struct kvm_sregs`, which a ctypes structure takes five times as long to fill in.
# Of a segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable.
_SEGMENT_FIELDS = 12
_SYSTEM_FORMAT = struct.Struct(
    "=" + "QIH9Bx" * len(SEGMENTS) + "QH6x" * len(TABLES) + f"{len(CONTROL)}Q"
)
_APIC_BASE_FORMAT = struct.Struct("=Q")
_MP_STATE = struct.Struct("=I")  # struct kvm_mp_state

_SYNCED_PARTS = (
    (KVM_SYNC_X86_SREGS, "system registers", KVM_SET_SREGS, kvm_sync_regs.sregs),
    (KVM_SYNC_X86_EVENTS, "events", KVM_SET_VCPU_EVENTS, kvm_sync_regs.events),
    (KVM_SYNC_X86_REGS, "general registers", KVM_SET_REGS, kvm_sync_regs.regs),
)


class Request(NamedTuple):
    """One that loads a part of the state: what it is called, KVM's number of it, its structure."""

    what: str
    number: int
    data: bytearray


class PowerOn(NamedTuple):
    """What each vCPU of this KVM has when KVM has just made it."""

    without_lapic: bytes
    """Its `struct kvm_sregs`, with an APIC base that says that there is no LAPIC."""
    tsc_khz: int


class VcpuRegisters:
    """The part of a vCPU that does not run."""

    def __init__(self, fd: int, index: int, run_size: int) -> None:
        """`run_size` bytes of its descriptor are its `struct kvm_run`. Raises OSError."""
        self.fd = fd
        self.index = index
        self.cpuid = b""
        """What `set_cpuid()` was given last."""
        self.new = False
        """Whether nothing was loaded or run since `KvmVm.create_vcpu()`."""
        self._process = os.getpid()
        self._tsc_khz: int | None = None
        self._pages = mmap.mmap(fd, run_size)
        self._u8 = memoryview(self._pages)
        self._u64 = self._u8.cast("Q")

    def set_cpuid(self, cpuid: bytes) -> None:
        """KVM_SET_CPUID2 (KVM API 4.20); `cpuid` is a `struct kvm_cpuid2` with its entries."""
        # fcntl takes more than 1 KiB only if it may be written to.
        self.set("CPUID", KVM_SET_CPUID2, bytearray(cpuid))
        self.cpuid = cpuid

    def get_cpuid(self, buffer: bytearray) -> None:
        """KVM_GET_CPUID2: fill in `buffer`, a `struct kvm_cpuid2` with room for its entries."""
        self.get("CPUID", KVM_GET_CPUID2, buffer)

    def power_on(self) -> PowerOn:
        """What it has, and so each one, if nothing was done to it yet. Raises HostError."""
        buffer = self._sregs()
        _APIC_BASE_FORMAT.pack_into(buffer, kvm_sregs.apic_base.offset, 0)
        return PowerOn(bytes(buffer), self.tsc_khz())

    def begin(self, has: PowerOn, *, lapic: bool) -> None:
        """It was just made, and `has` that. Raises HostError.

        Without `lapic`, that the kernel has local APICs, there is none; KVM shows one to the guest
        as long as the APIC base says so.
        """
        self._tsc_khz = has.tsc_khz
        if not lapic:
            self.set("APIC base", KVM_SET_SREGS, has.without_lapic)

    def require_own(self) -> None:
        """Raises HostError in a fork: KVM does nothing there."""
        if os.getpid() != self._process:
            raise self._refusal("state", OSError(errno.EIO, os.strerror(errno.EIO)))

    def registers(self) -> Registers:
        buffer = bytearray(sizeof(kvm_regs))
        self.get("general registers", KVM_GET_REGS, buffer)
        return dict(zip(GENERAL, _GENERAL_FORMAT.unpack(buffer), strict=True))

    def set_registers(self, registers: Registers) -> None:
        packed = _GENERAL_FORMAT.pack(*[registers[name] for name in GENERAL])
        if self._halted() and registers["rip"] != self.registers()["rip"]:
            # It was told to execute something else, so that the HLT is over.
            self.set("state", KVM_SET_MP_STATE, _MP_STATE.pack(KVM_MP_STATE_RUNNABLE))
        self.set("general registers", KVM_SET_REGS, packed)

    def _halted(self) -> bool:
        """Whether it waits in HLT, which only KVM's own interrupt controllers have it do."""
        buffer = bytearray(_MP_STATE.size)
        self.get("state", KVM_GET_MP_STATE, buffer)
        state: int = _MP_STATE.unpack(buffer)[0]
        return state == KVM_MP_STATE_HALTED

    def _sregs(self) -> bytearray:
        buffer = bytearray(sizeof(kvm_sregs))
        self.get("system registers", KVM_GET_SREGS, buffer)
        return buffer

    def system_registers(self) -> SystemRegisters:
        values = iter(_SYSTEM_FORMAT.unpack_from(self._sregs()))
        segments = [_to_segment(list(islice(values, _SEGMENT_FIELDS))) for _ in SEGMENTS]
        tables = [Table(next(values), next(values)) for _ in TABLES]
        return SystemRegisters._make([*segments, *tables, *values])

    def set_system_registers(self, system: SystemRegisters) -> None:
        # APIC base and the pending interrupt are in the same structure, and stay as they are.
        buffer = self._sregs()
        values: list[int] = []
        for name in SEGMENTS:
            s: Segment = getattr(system, name)
            values += (s.base, s.limit, s.selector, s.type, s.present, s.dpl, s.db, s.s, s.l, s.g)
            values += (s.avl, not s.present)
        for name in TABLES:
            values += getattr(system, name)
        values += [getattr(system, name) for name in CONTROL]
        _SYSTEM_FORMAT.pack_into(buffer, 0, *values)
        self.set_cr8(system.cr8)
        self.set("system registers", KVM_SET_SREGS, buffer)

    def tsc_khz(self) -> int:
        """The frequency of its TSC (KVM API 4.56), 0 where KVM does not tell."""
        if self._tsc_khz is None:
            from vmexit.abi.kvm_irq import KVM_GET_TSC_KHZ

            try:
                self._tsc_khz = max(ioctl(self.fd, KVM_GET_TSC_KHZ), 0)
            except OSError:
                self._tsc_khz = 0
        return self._tsc_khz

    def set_tsc_khz(self, khz: int) -> None:
        """Have it count so fast (KVM API 4.55). Raises HostError where that cannot be."""
        from vmexit.abi.kvm_irq import KVM_SET_TSC_KHZ

        self._tsc_khz = None
        self.new = False
        try:
            ioctl(self.fd, KVM_SET_TSC_KHZ, khz)
        except OSError as error:
            raise HostError(
                f"the guest knows a time stamp counter of {khz} kHz, and this processor cannot "
                f"count so ({error.strerror}); restore it on a host like the one it was saved on"
            ) from error

    def set_cr8(self, value: int) -> None:
        """Without a LAPIC in the kernel KVM_RUN takes it from its own page (KVM API 5, cr8)."""
        self._u64[_CR8] = value

    def msrs(self, indices: Iterable[int]) -> dict[int, int]:
        wanted = list(indices)
        values = self.msrs_that_exist(wanted)
        for index in wanted:
            if index not in values:
                raise HostError(f"KVM cannot read MSR {index:#x} of vCPU {self.index}")
        return values

    def msrs_that_exist(self, indices: Iterable[int]) -> dict[int, int]:
        """As `msrs()`, without those that KVM cannot read."""
        if self._u64[_DIRTY_REGS]:
            self._load_synced()  # some are among the system registers
        return msrs.get(self.fd, indices)

    def fpu(self) -> bytes:
        """See `vmexit.accel.base.Vcpu`; the first part of KVM_GET_XSAVE."""
        buffer = bytearray(sizeof(kvm_xsave))
        self.get("FPU", KVM_GET_XSAVE, buffer)
        return bytes(buffer[: fxsave.SIZE])

    def set_fpu(self, image: bytes) -> None:
        """Load what `fpu()` gives."""
        buffer = bytearray(sizeof(kvm_xsave))
        self.get("FPU", KVM_GET_XSAVE, buffer)
        buffer[: len(image)] = image
        # x87 and SSE are not in their initial state any more (SDM vol. 1, 13.4.2: XSTATE_BV).
        buffer[fxsave.SIZE] |= 3
        self.set("FPU", KVM_SET_XSAVE, buffer)

    def set_msrs(self, values: Mapping[int, int]) -> list[int]:
        if not values:
            return []
        self.new = False
        if self._u64[_DIRTY_REGS]:
            self._load_synced()
        return msrs.put(self.fd, values)

    def add_to_dr6(self, bits: int) -> None:
        """The guest sees these causes of a debug exception, too. Raises HostError."""
        buffer = bytearray(sizeof(kvm_debugregs))
        self.get("debug registers", KVM_GET_DEBUGREGS, buffer)
        registers = kvm_debugregs.from_buffer(buffer)
        registers.dr6 |= bits
        self.set("debug registers", KVM_SET_DEBUGREGS, bytes(buffer))

    def enter_with(self, steps: Steps, registers: bytes, which: int, cr8: int) -> None:
        """Add the steps after which KVM_RUN takes these when it is entered (KVM API 5,
        kvm_dirty_regs): an ioctl less for each. Whoever asks for registers first has them loaded.

        A `struct kvm_sync_regs`, which KVM has taken before, and KVM_SYNC_X86_… flags.
        """
        steps.copy(self._u8, slice(_SYNCED, _SYNCED_END), registers)
        for at, word in ((_DIRTY_REGS, which), (_CR8, cr8)):
            steps.copy(self._u8, slice(at * 8, at * 8 + 8), word.to_bytes(8, "little"))

    def _load_synced(self) -> None:
        """What KVM_RUN was to take, in the order of `vmexit.accel.kvm.state`. Raises HostError.

        What is refused goes on to wait: a fork has this page, too, and can load nothing.
        """
        for flag, what, request, field in _SYNCED_PARTS:
            if self._u64[_DIRTY_REGS] & flag:
                start = _SYNCED + field.offset
                try:
                    ioctl(self.fd, request, bytes(self._u8[start : start + field.size]))
                except OSError as error:
                    raise self._refusal(what, error) from error
                self._u64[_DIRTY_REGS] &= ~flag

    def set(self, what: str, request: int, data: bytes | bytearray) -> None:
        """One of KVM's requests that load state. Raises HostError."""
        self.new = False
        if self._u64[_DIRTY_REGS]:
            self._load_synced()
        try:
            ioctl(self.fd, request, data)
        except OSError as error:
            raise self._refusal(what, error) from error

    def set_all(self, requests: "Iterable[Request]") -> None:
        """Such requests, in this order. Raises HostError."""
        if self._u64[_DIRTY_REGS]:
            self._load_synced()
        self.set_beside(requests)

    def set_beside(self, requests: "Iterable[Request]") -> None:
        """The same, for parts that do not depend on what KVM_RUN is to take. Raises HostError."""
        self.new = False
        fd = self.fd
        try:
            for request in requests:
                _, number, data = request
                ioctl(fd, number, data)
        except OSError as error:
            raise self._refusal(request.what, error) from error

    def get(self, what: str, request: int, buffer: bytearray) -> None:
        """One that fills in `buffer`. Raises HostError."""
        if self._u64[_DIRTY_REGS]:
            self._load_synced()
        try:
            ioctl(self.fd, request, buffer, True)
        except OSError as error:
            raise self._refusal(what, error) from error

    def _refusal(self, what: str, error: OSError) -> HostError:
        remedy = {
            errno.EINVAL: "set those that belong together at once, with regs.update()",
            errno.EIO: "a machine belongs to the process that made it: make one after the fork",
        }.get(error.errno or 0, "try --accel soft")
        return HostError(f"KVM refused the {what} of vCPU {self.index}: {error.strerror}; {remedy}")

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd < 0:
            return
        for view in (self._u64, self._u8):
            view.release()
        with suppress(BufferError):  # a kvm_run() is still held: the last one unmaps the pages
            self._pages.close()
        os.close(self.fd)
        self.fd = -1


def _to_segment(values: list[int]) -> Segment:
    base, limit, selector, type, present, dpl, db, s, l, g, avl, _ = values  # noqa: E741
    return Segment(selector, base, limit, type, s, dpl, present, l, db, g, avl)
