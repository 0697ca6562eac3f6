"""A vCPU's file descriptor: the loop around KVM_RUN."""

import errno
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from fcntl import ioctl
from threading import get_ident
from typing import TYPE_CHECKING

from vmexit.abi.kvm import (
    KVM_EXIT_DEBUG,
    KVM_EXIT_DIRTY_RING_FULL,
    KVM_EXIT_HLT,
    KVM_EXIT_INTR,
    KVM_EXIT_IO,
    KVM_EXIT_IRQ_WINDOW_OPEN,
    KVM_EXIT_MMIO,
    KVM_EXIT_SET_TPR,
    KVM_RUN,
    KVM_SET_SIGNAL_MASK,
)
from vmexit.abi.kvm_run import kvm_run
from vmexit.abi.kvm_state import (
    KVM_GUESTDBG_SINGLESTEP,
    KVM_SET_GUEST_DEBUG,
)
from vmexit.accel.base import Exit, ExitReason, linear_rip
from vmexit.accel.kvm.exits import explain
from vmexit.accel.kvm.kick import KickTarget
from vmexit.accel.kvm.registers import VcpuRegisters
from vmexit.core.bus import Bus, Read, State, Write
from vmexit.core.errors import HostError
from vmexit.core.memory import GuestMemory
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
_MMIO_GPA = 4  # u64 at 32
_MMIO_DATA = 40  # bytes
_MMIO_LEN = 12  # u32 at 48
_MMIO_IS_WRITE = 52  # byte

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

_GUEST_DEBUG = struct.Struct("=I4x8Q")  # struct kvm_guest_debug
_SIGNAL_MASK = struct.Struct("=IQ")  # struct kvm_signal_mask with a kernel sigset of 8 bytes

_PLAIN_EXITS = {
    KVM_EXIT_HLT: ExitReason.HALT,
    KVM_EXIT_DEBUG: ExitReason.DEBUG,
    KVM_EXIT_IRQ_WINDOW_OPEN: ExitReason.IRQ_WINDOW,
}


class KvmVcpu(VcpuRegisters):
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
        super().__init__(fd, index, run_size)
        self._access = access
        self._memory = memory
        self._pio = pio
        self._mmio = mmio
        self._observer = observer
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
        self._u16 = self._u8.cast("H")
        self._u32 = self._u8.cast("I")
        self._by_size = {1: self._u8, 2: self._u16, 4: self._u32}

    # Running.

    def attach_thread(self) -> None:
        self.new = False  # it is to run
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
                if self._observer is not None:
                    self._observer.other(self.index, "dirty_ring_full", "")
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
        if self._u32[_EXIT_REASON] == KVM_EXIT_DIRTY_RING_FULL and self.on_ring_full is not None:
            self.on_ring_full()  # or there would be no other exit any more
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
        # Which has nothing to do with registers: those that KVM_RUN is to take wait on.
        try:
            ioctl(self.fd, KVM_SET_SIGNAL_MASK, _SIGNAL_MASK.pack(8, blocked))
        except OSError as error:
            raise self._refusal("signal mask", error) from error

    # Its state.

    def state(self) -> State:
        return self._access().plain(self)

    def restore(self, state: State) -> None:
        self._access().restore(self, state)

    def set_guest_debug(self, control: int, registers: Sequence[int]) -> None:
        """KVM_SET_GUEST_DEBUG: KVM_GUESTDBG_… flags, eight debug registers. Raises HostError."""
        self._stepping = bool(control & KVM_GUESTDBG_SINGLESTEP)
        self._stepped = False
        self._routes.clear()  # a step sees every access
        self.set("debug control", KVM_SET_GUEST_DEBUG, _GUEST_DEBUG.pack(control, *registers))

    def close(self) -> None:
        if self.fd >= 0:
            self._u32.release()
            self._u16.release()
        super().close()


_IMMEDIATE_EXIT: int = kvm_run.immediate_exit.offset
