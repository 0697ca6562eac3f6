"""A vCPU's file descriptor: registers, and the loop around KVM_RUN."""

import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from ctypes import sizeof
from fcntl import ioctl
from itertools import islice
from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple

from vmexit.abi.kvm import (
    KVM_EXIT_DEBUG,
    KVM_EXIT_DIRTY_RING_FULL,
    KVM_EXIT_HLT,
    KVM_EXIT_INTR,
    KVM_EXIT_IO,
    KVM_EXIT_IRQ_WINDOW_OPEN,
    KVM_EXIT_MMIO,
    KVM_EXIT_SET_TPR,
    KVM_GET_CPUID2,
    KVM_GET_MP_STATE,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_RUN,
    KVM_SET_CPUID2,
    KVM_SET_MP_STATE,
    KVM_SET_REGS,
    KVM_SET_SIGNAL_MASK,
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
    KVM_GUESTDBG_SINGLESTEP,
    KVM_SET_DEBUGREGS,
    KVM_SET_GUEST_DEBUG,
    KVM_SET_XSAVE,
    kvm_debugregs,
    kvm_xsave,
)
from vmexit.abi.kvm_structs import (
    kvm_regs,
    kvm_sregs,
)
from vmexit.accel.base import Exit, ExitReason, linear_rip
from vmexit.accel.kvm import msrs
from vmexit.accel.kvm.exits import explain
from vmexit.accel.kvm.kick import KickTarget
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
from vmexit.core.bus import Bus, Read, State, Write
from vmexit.core.errors import HostError
from vmexit.core.memory import GuestMemory
from vmexit.core.steps import Steps
from vmexit.core.trace import ExitObserver

if TYPE_CHECKING:
    from vmexit.accel.kvm.state import StateAccess

# Indices into 32-bit and 64-bit views of `struct kvm_run` for the loop (KVM API 5). A ctypes
# structure costs three times as much an exit.
_EXIT_REASON = 2  # u32 at 8
_IO_KEY = 8  # u32 at 32: direction (u8), size (u8) and port (u16) in one number
_IO_COUNT = 9  # u32 at 36
_IO_KEY_AND_COUNT = 4  # u64 at 32: both in one number
_IO_DATA_OFFSET = 5  # u64 at 40
_CR8 = 2  # u64 at 16
_MMIO_GPA = 4  # u64 at 32
_MMIO_DATA = 40  # bytes
_MMIO_LEN = 12  # u32 at 48
_MMIO_IS_WRITE = 52  # byte
_DIRTY_REGS: int = kvm_run.kvm_dirty_regs.offset // 8  # u64
_SYNCED: int = kvm_run.s.offset
_SYNCED_END = _SYNCED + sizeof(kvm_sync_regs)

TRAP_PORT = 0xEF
"""What the debugger's OUT goes to, where it has to use one."""

_IO_OUT = 1  # KVM_EXIT_IO_OUT, the low byte of the key

# What the loop does for an access it has seen before: the device's function, the offset to give
# it, the size, where in which view of kvm_run the data are, and whether it is an OUT. The key is
# the u64 of key and count: a string access, whose count is not 1, has none.
_Route = tuple[Read | Write, int, int, memoryview, int, bool]

# A hostile guest can touch any number of ports; what is remembered of them must not grow so.
_MAX_ROUTES = 4096

# An access comes in pieces of up to 8 bytes; XSAVE makes the largest ones.
_MAX_PIECES = 1024

_GENERAL_FORMAT = struct.Struct(f"={len(GENERAL)}Q")
# The beginning of `struct kvm_sregs`, which a ctypes structure takes five times as long to fill in.
# Of a segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable.
_SEGMENT_FIELDS = 12
_SYSTEM_FORMAT = struct.Struct(
    "=" + "QIH9Bx" * len(SEGMENTS) + "QH6x" * len(TABLES) + f"{len(CONTROL)}Q"
)
_APIC_BASE_FORMAT = struct.Struct("=Q")
_MP_STATE = struct.Struct("=I")  # struct kvm_mp_state
_GUEST_DEBUG = struct.Struct("=I4x8Q")  # struct kvm_guest_debug
_SIGNAL_MASK = struct.Struct("=IQ")  # struct kvm_signal_mask with a kernel sigset of 8 bytes

_SYNCED_PARTS = (
    (KVM_SYNC_X86_SREGS, "system registers", KVM_SET_SREGS, kvm_sync_regs.sregs),
    (KVM_SYNC_X86_EVENTS, "events", KVM_SET_VCPU_EVENTS, kvm_sync_regs.events),
    (KVM_SYNC_X86_REGS, "general registers", KVM_SET_REGS, kvm_sync_regs.regs),
)

_PLAIN_EXITS = {
    KVM_EXIT_HLT: ExitReason.HALT,
    KVM_EXIT_DEBUG: ExitReason.DEBUG,
    KVM_EXIT_IRQ_WINDOW_OPEN: ExitReason.IRQ_WINDOW,
}


class Request(NamedTuple):
    """One that loads a part of the state: what it is called, KVM's number of it, its structure."""

    what: str
    number: int
    data: bytearray


class KvmVcpu:
    """One vCPU; made by `KvmVm.create_vcpu()`."""

    def __init__(
        self,
        fd: int,
        index: int,
        run_size: int,
        memory: GuestMemory,
        pio: Bus,
        mmio: Bus,
        observer: ExitObserver | None,
        access: "Callable[[], StateAccess]",
    ) -> None:
        """`access` gives what saves and loads all of its state."""
        self._access = access
        self.fd = fd
        self.index = index
        self._memory = memory
        self._pio = pio
        self._mmio = mmio
        self._observer = observer
        self.cpuid = b""
        """What `set_cpuid()` was given last."""
        self._tsc_khz: int | None = None
        self._kicked = False
        self._interrupted = Exit(ExitReason.INTERRUPTED, vcpu=index)
        self.on_debug: Callable[[int, int, int], Exit | None] | None = None
        """What tells whose a debug exit is: by the exception's vector, linear RIP, and DR6."""
        self.on_ring_full: Callable[[], None] | None = None
        """What makes room in its dirty ring."""
        self.is_trap: Callable[[], bool] | None = None
        """Whether it is at an OUT of the debugger's, to port TRAP_PORT."""
        self.trapped = False
        """Whether it has just executed that."""
        self._stepping = False
        self._stepped = False  # over an instruction with an access, which is done or not quite
        self._kick_target = KickTarget(self._set_signal_mask)
        self._routes: dict[int, _Route] = {}
        pio.on_change(self._routes.clear)
        self._pages = mmap.mmap(fd, run_size)
        self._u8 = memoryview(self._pages)
        self._u16 = self._u8.cast("H")
        self._u32 = self._u8.cast("I")
        self._u64 = self._u8.cast("Q")
        self._by_size = {1: self._u8, 2: self._u16, 4: self._u32}

    # Running.

    def attach_thread(self) -> None:
        self._kick_target.attach()

    def detach_thread(self) -> None:
        self._kick_target.detach()

    def kick(self) -> None:
        self._kicked = True
        self._u8[_IMMEDIATE_EXIT] = 1
        if self._kick_target.thread != get_ident():
            self._kick_target.kick()

    def run(self) -> Exit:
        if self._kick_target.thread is not None:
            return self._run()
        self.attach_thread()
        try:
            return self._run()
        finally:
            self.detach_thread()

    def _run(self) -> Exit:
        fd, u32, u64, run = self.fd, self._u32, self._u64, KVM_RUN
        run_ioctl = ioctl if self._observer is None else self._observed_run(self._observer)
        route_of = self._routes.get
        while True:
            try:
                # The hot loop: an exit to a device seen before costs one look-up and one call.
                while True:
                    run_ioctl(fd, run)
                    reason = u32[_EXIT_REASON]
                    if reason == KVM_EXIT_IO:
                        route = route_of(u64[_IO_KEY_AND_COUNT])
                        if route is None:
                            self._io(u32[_IO_KEY])
                        else:
                            function, offset, size, view, data, out = route
                            if out:
                                function(offset, size, view[data])  # type: ignore[call-arg]
                            else:
                                view[data] = function(offset, size)  # type: ignore[call-arg, assignment]
                    elif reason == KVM_EXIT_MMIO:
                        self._access_mmio()
                    else:
                        break
            except OSError as error:
                if self._is_from_device(error):
                    self._complete()
                    raise
                # EAGAIN: a vCPU that waits for its SIPI was woken.
                if error.errno not in (errno.EINTR, errno.EAGAIN):
                    if self._u64[_DIRTY_REGS]:
                        self._load_synced()  # which tells what it is that KVM refuses
                    raise HostError(
                        f"KVM_RUN failed on vCPU {self.index}: {error.strerror}"
                    ) from error
                # A kick, or a signal that is none of our business.
                kicked = self._take_kick()
                stopped = self._debug_exit(reason) if self._stepped else None
                if stopped is not None:
                    return stopped
                if kicked:
                    return self._interrupted
                continue
            except BaseException:
                self._complete()
                raise
            if reason in (KVM_EXIT_INTR, KVM_EXIT_SET_TPR):
                continue  # CR8 was written, and there is no interrupt controller to tell
            if reason == KVM_EXIT_DIRTY_RING_FULL and self.on_ring_full is not None:
                self.on_ring_full()
                continue
            if reason == KVM_EXIT_DEBUG and self.on_debug is not None:
                stopped = self._debug_exit(reason)
                if stopped is None:
                    continue
                return stopped
            return self._exit(reason)

    def _debug_exit(self, reason: int) -> Exit | None:
        """KVM_EXIT_DEBUG, or the end of an access, while the debugger is armed.

        None if the guest can go on.
        """
        self._stepped = False
        if not self._kicked:
            self._u8[_IMMEDIATE_EXIT] = 0
        if reason == KVM_EXIT_DEBUG:
            arch = self.kvm_run().debug.arch
            seen = arch.exception, arch.pc, arch.dr6
            del arch
        else:
            seen = 1, linear_rip(self), 1 << 14
        exit = self.on_debug(*seen) if self.on_debug is not None else None
        if exit is not None and self._observer is not None:
            self._observer.other(self.index, exit.reason.value, exit.detail)
        return exit

    def _observed_run(self, observer: ExitObserver) -> Callable[[int, int], int]:
        """KVM_RUN with `observer` told of each entry and exit, for the loop in place of `ioctl`."""
        index = self.index

        def run(fd: int, request: int) -> int:
            observer.enters(index)
            try:
                return ioctl(fd, request)
            finally:
                observer.left(index)

        observer.left(index)
        return run

    def _is_from_device(self, error: OSError) -> bool:
        """Whether it is not KVM_RUN's error but one from some frames below the loop's."""
        frames = error.__traceback__
        if self._observer is not None and frames is not None and frames.tb_next is not None:
            frames = frames.tb_next  # that of `_observed_run()`
        return frames is not None and frames.tb_next is not None

    def _complete(self) -> None:
        """Finish the access whose device has failed, and execute nothing more (KVM API 5, io).

        A read gives all ones then, and what is still to come of the access goes nowhere.
        """
        self._u8[_IMMEDIATE_EXIT] = 1
        with suppress(OSError):  # EINTR, once it is finished; the device's error is what counts
            for _ in range(_MAX_PIECES):
                self._answer_ones()
                ioctl(self.fd, KVM_RUN)
        if not self._kicked:
            self._u8[_IMMEDIATE_EXIT] = 0

    def _answer_ones(self) -> None:
        reason = self._u32[_EXIT_REASON]
        if reason == KVM_EXIT_IO and not self._u32[_IO_KEY] & _IO_OUT:
            with self.io_data() as data:
                data[:] = b"\xff" * len(data)
        elif reason == KVM_EXIT_MMIO and not self._u8[_MMIO_IS_WRITE]:
            self._u64[_MMIO_DATA // 8] = (1 << 64) - 1

    def run_once(self) -> kvm_run:
        """KVM_RUN once, for learners: the raw exit, with nothing done about it.

        Returns the vCPU's own `struct kvm_run` (KVM API 5), live: an MMIO read is answered by
        writing to it, a port read by writing to `io_data()`. `exit_reason` is KVM_EXIT_INTR after
        a kick.
        """
        attached = self._kick_target.thread is not None
        if not attached:
            self.attach_thread()
        try:
            ioctl(self.fd, KVM_RUN)
        except InterruptedError:
            self._take_kick()
            self._u32[_EXIT_REASON] = KVM_EXIT_INTR
        finally:
            if not attached:
                self.detach_thread()
        return self.kvm_run()

    def kvm_run(self) -> kvm_run:
        """The vCPU's `struct kvm_run`, live."""
        return kvm_run.from_buffer(self._pages)

    def io_data(self) -> memoryview:
        """The bytes of the KVM_EXIT_IO under way, live: what goes out, or the answer to come."""
        start = self._u64[_IO_DATA_OFFSET]
        return self._u8[start : start + (self._u32[_IO_KEY] >> 8 & 0xFF) * self._u32[_IO_COUNT]]

    def _take_kick(self) -> bool:
        # Without a signal it was this thread that kicked, or a signal of others that is pending.
        if self._kick_target.sent or not self._kicked:
            self._kick_target.take()
        # In this order: a kick that comes in between is seen now, or ends the next KVM_RUN.
        self._u8[_IMMEDIATE_EXIT] = 0
        kicked, self._kicked = self._kicked, False
        return kicked

    def _exit(self, reason: int) -> Exit:
        plain = _PLAIN_EXITS.get(reason)
        if plain is not None:
            exit = Exit(plain, vcpu=self.index)
        else:
            registers, system = self.registers, self.system_registers
            exit = explain(reason, self.kvm_run(), self._memory, registers, system)
            exit = exit._replace(vcpu=self.index)
        if self._observer is not None:
            self._observer.other(self.index, exit.reason.value, exit.detail)
        return exit

    # An exception keeps the frames that it came through, and these their local names. A view of
    # the pages among those would keep the descriptor open, so the two below have none.

    def _io(self, key: int) -> None:
        """Port I/O that is new, a string, or observed (KVM API 5, KVM_EXIT_IO)."""
        write, size, port = key & 0xFF == _IO_OUT, key >> 8 & 0xFF, key >> 16
        count = self._u32[_IO_COUNT]
        start = self._u64[_IO_DATA_OFFSET]
        end = start + size * count
        observer = self._observer
        is_trap = self.is_trap if port == TRAP_PORT else None
        if is_trap is not None and is_trap():
            self.trapped = True
            self._end_step()
            return
        generation = self._pio.generation
        if write:
            data = bytes(self._u8[start:end])
            if observer is not None:
                observer.io(self.index, True, port, size, count, data)
            self._pio.write_string(port, size, data)
        else:
            data = self._pio.read_string(port, size, count)
            self._u8[start:end] = data
            if observer is not None:
                observer.io(self.index, False, port, size, count, data)
        if self._stepping:
            self._end_step()
        elif observer is None and count == 1 and is_trap is None:
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            route = self._pio.route_write if write else self._pio.route_read
            function, offset = route(port, size)
            view = self._by_size[size]
            self._routes[1 << 32 | key] = function, offset, size, view, start // size, write
            if self._pio.generation != generation:  # another vCPU's access has attached a device
                self._routes.clear()

    def _access_mmio(self) -> None:
        """A memory access that no slot answers (KVM API 5, KVM_EXIT_MMIO)."""
        gpa, size = self._u64[_MMIO_GPA], self._u32[_MMIO_LEN]
        end = _MMIO_DATA + size
        observer = self._observer
        if self._u8[_MMIO_IS_WRITE]:
            data = bytes(self._u8[_MMIO_DATA:end])
            if observer is not None:
                observer.mmio(self.index, True, gpa, data)
            self._mmio.write(gpa, size, int.from_bytes(data, "little"))
        else:
            data = self._mmio.read(gpa, size).to_bytes(size, "little")
            self._u8[_MMIO_DATA:end] = data
            if observer is not None:
                observer.mmio(self.index, False, gpa, data)
        if self._stepping:
            self._end_step()

    def _end_step(self) -> None:
        """Have KVM finish the access and no more: not every KVM counts that as a step."""
        self._stepped = True
        self._u8[_IMMEDIATE_EXIT] = 1

    def _set_signal_mask(self, blocked: int) -> None:
        self.set("signal mask", KVM_SET_SIGNAL_MASK, _SIGNAL_MASK.pack(8, blocked))

    # Registers.

    def set_cpuid(self, cpuid: bytes) -> None:
        """KVM_SET_CPUID2 (KVM API 4.20); `cpuid` is a `struct kvm_cpuid2` with its entries."""
        # fcntl takes more than 1 KiB only if it may be written to.
        self.set("CPUID", KVM_SET_CPUID2, bytearray(cpuid))
        self.cpuid = cpuid

    def get_cpuid(self, buffer: bytearray) -> None:
        """KVM_GET_CPUID2: fill in `buffer`, a `struct kvm_cpuid2` with room for its entries."""
        self.get("CPUID", KVM_GET_CPUID2, buffer)

    def switch_off_lapic(self) -> None:
        """There is none but in the kernel, and KVM shows one as long as the APIC base says so."""
        buffer = self._sregs()
        _APIC_BASE_FORMAT.pack_into(buffer, kvm_sregs.apic_base.offset, 0)
        self.set("APIC base", KVM_SET_SREGS, buffer)

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

    def state(self) -> State:
        return self._access().plain(self)

    def restore(self, state: State) -> None:
        self._access().restore(self, state)

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
        if self._u64[_DIRTY_REGS]:
            self._load_synced()
        return msrs.put(self.fd, values)

    def set_guest_debug(self, control: int, registers: Sequence[int]) -> None:
        """KVM_SET_GUEST_DEBUG: KVM_GUESTDBG_… flags, eight debug registers. Raises HostError."""
        self._stepping = bool(control & KVM_GUESTDBG_SINGLESTEP)
        self._stepped = False
        self._routes.clear()  # a step sees every access
        self.set("debug control", KVM_SET_GUEST_DEBUG, _GUEST_DEBUG.pack(control, *registers))

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
        if self.fd < 0:
            return
        for view in (self._u64, self._u32, self._u16, self._u8):
            view.release()
        with suppress(BufferError):  # a kvm_run() is still held: the last one unmaps the pages
            self._pages.close()
        os.close(self.fd)
        self.fd = -1


_IMMEDIATE_EXIT: int = kvm_run.immediate_exit.offset


def _to_segment(values: list[int]) -> Segment:
    base, limit, selector, type, present, dpl, db, s, l, g, avl, _ = values  # noqa: E741
    return Segment(selector, base, limit, type, s, dpl, present, l, db, g, avl)
