"""Breakpoints, watchpoints and single steps by KVM_SET_GUEST_DEBUG (KVM API 4.87)."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vmexit.abi.kvm_caps import KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_SET_GUEST_DEBUG2
from vmexit.abi.kvm_state import (
    KVM_GUESTDBG_BLOCKIRQ,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
)
from vmexit.accel.base import (
    Exit,
    ExitReason,
    Point,
    PointKind,
    Way,
    WhereLinked,
    first_gpa,
    linear_rip,
    nowhere,
)
from vmexit.accel.kvm.vcpu import TRAP_PORT, KvmVcpu
from vmexit.arch.x86.code import code_bits, disassemble, linear_ip, read_linear
from vmexit.arch.x86.paging import translate
from vmexit.core.errors import GuestAddressError, HostError
from vmexit.core.memory import PAGE_SIZE, GuestMemory

if TYPE_CHECKING:
    from vmexit.accel.kvm.system import System

_INT3 = b"\xcc"
# out TRAP_PORT, al: an exit of ring 0 on every KVM, which others have only by mistake.
_OUT = bytes((0xE6, TRAP_PORT))
_HLT = b"\xf4"
_BREAKPOINT = 3  # the vector of #BP

# Debug registers (Intel SDM vol. 3, 18.2.3, 18.2.4).
_SLOTS = 4
_DR6_STEP = 1 << 14
_DR6_CAUSES = 0xE00F
_DR7_ALWAYS = 1 << 10
# A read alone cannot be watched for; whoever asks has to see whether the value has changed.
_DR7_KIND = {PointKind.EXECUTE: 0, PointKind.WRITE: 1, PointKind.READ: 3, PointKind.ACCESS: 3}
_DR7_LENGTH = {1: 0, 2: 1, 4: 3, 8: 2}


class KvmDebugger:
    """What stops the vCPUs of one VM. The INT3 are in memory only while the guest runs."""

    def __init__(
        self, system: "System", memory: GuestMemory, vcpus: Sequence[KvmVcpu], hlt_exits: bool
    ) -> None:
        """`hlt_exits`: there is no interrupt controller in the kernel, where HLT would wait."""
        self._hlt_exits = hlt_exits
        self._system = system
        self._memory = memory
        self._vcpus = vcpus
        self._armed = False
        # What is in memory for the point at a GPA, and what was there.
        self._replaced: dict[int, tuple[bytes, bytes]] = {}
        self._software: dict[int, list[Point]] = {}  # by GPA, which may have several addresses
        self._stepped: dict[int, Point] = {}  # by linear address
        self._slots: list[tuple[int, int, Point]] = []  # address, length
        self._step: int | None = None

    def arm(
        self,
        points: Collection[Point],
        step: int | None = None,
        only: int | None = None,
        linked: WhereLinked = nowhere,
    ) -> dict[Point, Way]:
        """See `vmexit.accel.base.Debugger`. Raises HostError."""
        self.disarm()
        if not self._system.check_extension(KVM_CAP_SET_GUEST_DEBUG):
            raise HostError("this KVM lacks KVM_CAP_SET_GUEST_DEBUG; use --accel soft")
        self._armed = True
        self._step = step
        skipped = linear_rip(self._vcpus[step]) if step is not None else None
        ways: dict[Point, Way] = {}
        try:
            for point in points:
                if point.kind is not PointKind.EXECUTE:
                    self._watch(point)
                    ways[point] = Way.HARDWARE
            for point in points:
                if point.kind is PointKind.EXECUTE and point.gva != skipped:
                    ways[point] = self._break(point, linked)
            for vcpu in self._vcpus:
                self._load(vcpu)
                vcpu.on_debug = partial(self._judge, vcpu)
                if Way.PORT in ways.values():
                    vcpu.is_trap = partial(self._is_trap, vcpu)
        except BaseException:
            self.disarm()
            raise
        return ways

    def _watch(self, point: Point) -> None:
        from vmexit.accel.kvm.probe import watches_memory

        if not watches_memory(self._system):
            raise HostError("this KVM does not watch the memory of ring 0; use --accel soft")
        for piece in _pieces(point.gva, point.length):
            if len(self._slots) == _SLOTS:
                raise HostError(
                    f"the processor has {_SLOTS} debug registers of 8 bytes, which are too few; "
                    "watch less at once"
                )
            self._slots.append((*piece, point))

    def _break(self, point: Point, linked: WhereLinked) -> Way:
        from vmexit.accel.kvm.probe import breaks_by_register, int3_exits

        gpa = first_gpa(self._memory, self._vcpus, point.gva)
        if gpa is None:
            gpa = linked(point.gva)
        if int3_exits(self._system) and self._replace(gpa, _INT3, point):
            return Way.SOFTWARE
        if breaks_by_register(self._system):
            if len(self._slots) < _SLOTS:
                self._slots.append((point.gva, 1, point))
                return Way.HARDWARE
        elif self._has_room_for_out(gpa, point) and self._replace(gpa, _OUT, point):
            return Way.PORT
        self._stepped[point.gva] = point
        return Way.STEPPING

    def _replace(self, gpa: int | None, code: bytes, point: Point) -> bool:
        """Put `code` where `point` is; False if there is no memory, or no room.

        That is another one's code, an instruction behind it at which a vCPU is, and the one that
        a vCPU is to step over, by whatever address.
        """
        if gpa is None or any(0 < abs(gpa - other) < len(code) for other in self._replaced):
            return False
        if len(code) > 1 and any(self._next(vcpu) == gpa + 1 for vcpu in self._vcpus):
            return False
        if self._step is not None and self._next(self._vcpus[self._step]) == gpa:
            return False
        try:
            place = self._memory.view(gpa, len(code))
        except GuestAddressError:
            return False
        if gpa not in self._replaced:
            self._replaced[gpa] = code, bytes(place)
            place[:] = code
        self._software.setdefault(gpa, []).append(point)
        return True

    def _has_room_for_out(self, gpa: int | None, point: Point) -> bool:
        """Whether the OUT covers no instruction but the one that is there, so no jump's target.

        It has one byte if its first byte alone is an instruction. Code above 4 GiB is 64-bit code;
        of other code the first vCPU tells what it is.
        """
        if gpa is None or gpa % PAGE_SIZE == PAGE_SIZE - 1:  # the next page may be elsewhere
            return False
        vcpu = self._vcpus[0]
        bits = 64 if point.gva >= 1 << 32 else code_bits(vcpu.registers(), vcpu.system_registers())
        try:
            return not disassemble(self._memory.read(gpa, 1), gpa, bits)
        except GuestAddressError:
            return False

    def _next(self, vcpu: KvmVcpu) -> int | None:
        """The GPA of its next instruction."""
        return translate(self._memory, vcpu.system_registers(), linear_rip(vcpu))

    def _load(self, vcpu: KvmVcpu, more: int = 0) -> None:
        """Give KVM what `arm()` wants of this vCPU, and `more`."""
        control = KVM_GUESTDBG_ENABLE | more
        registers = [0] * 8
        if self._software:
            control |= KVM_GUESTDBG_USE_SW_BP
        if self._slots:
            control |= KVM_GUESTDBG_USE_HW_BP
            registers[7] = _DR7_ALWAYS
            for number, (address, length, point) in enumerate(self._slots):
                registers[number] = address
                kind = _DR7_KIND[point.kind] | _DR7_LENGTH[length] << 2
                registers[7] |= 2 << 2 * number | kind << 16 + 4 * number
        if (self._stepped or vcpu.index == self._step) and (more or not self._will_halt(vcpu)):
            control |= KVM_GUESTDBG_SINGLESTEP
        if vcpu.index == self._step:
            control |= self._system.check_extension(KVM_CAP_SET_GUEST_DEBUG2) & (
                KVM_GUESTDBG_BLOCKIRQ
            )
        vcpu.set_guest_debug(control, registers)

    def _will_halt(self, vcpu: KvmVcpu) -> bool:
        """Whether a HLT is next that ends the run by itself.

        Stepped by KVM's emulator it would be a step as others, and halt a later run where none is.
        Outside ring 0 it is a #GP (Intel SDM vol. 2, HLT), whose handler is to be stepped.
        """
        if not self._hlt_exits:
            return False
        system = vcpu.system_registers()
        if system.ss.dpl:
            return False
        rip = linear_ip(vcpu.registers(), system)
        return read_linear(self._memory, system, rip, 1) == _HLT

    def _judge(self, vcpu: KvmVcpu, vector: int, rip: int, dr6: int) -> Exit | None:
        """What KVM_EXIT_DEBUG on `vcpu` means; None if it was the guest's own and has it now.

        Called on the vCPU's thread.
        """
        trapped, vcpu.trapped = vcpu.trapped, False
        if trapped and (point := self._software_at(vcpu, rip - len(_OUT))):
            registers = vcpu.registers()
            vcpu.set_registers(registers | {"rip": registers["rip"] - len(_OUT)})
            return Exit(ExitReason.DEBUG, vcpu=vcpu.index, point=point)
        if vector == _BREAKPOINT:
            point = self._software_at(vcpu, rip)
            if point is None:
                self._load(vcpu, KVM_GUESTDBG_INJECT_BP)
                return None
            return Exit(ExitReason.DEBUG, vcpu=vcpu.index, point=point)
        for number, (_, _, point) in enumerate(self._slots):
            if dr6 >> number & 1:
                return Exit(ExitReason.DEBUG, vcpu=vcpu.index, point=point)
        if dr6 & _DR6_STEP and vcpu.index == self._step:
            return Exit(ExitReason.DEBUG, vcpu=vcpu.index)
        if dr6 & _DR6_STEP and self._stepped:
            if (point := self._stepped.get(rip)) is not None:
                return Exit(ExitReason.DEBUG, vcpu=vcpu.index, point=point)
            self._load(vcpu)  # once more: what sets flags, as POPF, ends the stepping
            return None
        vcpu.add_to_dr6(dr6 & _DR6_CAUSES)
        self._load(vcpu, KVM_GUESTDBG_INJECT_DB)
        return None

    def _software_at(self, vcpu: KvmVcpu, rip: int) -> Point | None:
        """The point whose code is at `rip`; if none has that address, one with the same memory."""
        gpa = translate(self._memory, vcpu.system_registers(), rip)
        points = [] if gpa is None else self._software.get(gpa, [])
        return min(points, key=lambda point: point.gva != rip, default=None)

    def _is_trap(self, vcpu: KvmVcpu) -> bool:
        """Whether its OUT is ours. KVM steps over it before or after this, as it happens."""
        rip = linear_rip(vcpu)
        return any(self._software_at(vcpu, at) is not None for at in (rip, rip - len(_OUT)))

    def disarm(self) -> None:
        """See `vmexit.accel.base.Debugger`."""
        if not self._armed:
            return
        for gpa, (code, before) in self._replaced.items():
            place = self._memory.view(gpa, len(code))
            for at, byte in enumerate(code):
                if place[at] == byte:  # or the guest has written there since
                    place[at] = before[at]
        for vcpu in self._vcpus:
            vcpu.on_debug = vcpu.is_trap = None
            vcpu.set_guest_debug(0, [0] * 8)
        self._replaced.clear()
        self._software.clear()
        self._stepped.clear()
        self._slots.clear()
        self._step = None
        self._armed = False


def _pieces(address: int, length: int) -> Iterator[tuple[int, int]]:
    """Aligned pieces that a debug register can watch."""
    while length > 0:
        size = 8
        while address % size or size > length:
            size //= 2
        yield address, size
        address += size
        length -= size
