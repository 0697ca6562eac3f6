"""SYSCALL and SYSENTER, over which the engine only steps: what the stubs leave to Python."""

from collections.abc import Callable

from vmexit.accel.soft.cpu_state import CpuState
from vmexit.accel.soft.layout import (
    CONTROL_OFFSET,
    CSTAR,
    FMASK,
    R11,
    RCX,
    RSP,
    STAR,
    SYSCALL_LENGTH,
)
from vmexit.accel.soft.native import Engine
from vmexit.arch.x86.registers import (
    CR0_PE,
    EFER_LMA,
    EFER_SCE,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_VM,
)

# Model-specific registers.
_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP = 0x174, 0x175, 0x176

_UNDEFINED_OPCODE, _GENERAL_PROTECTION = 6, 13


class SystemCalls:
    """The hooks, which C calls: what goes wrong is for `fail`, an exception of the guest for
    `raise_exception(vector)`.
    """

    def __init__(
        self,
        state: CpuState,
        engine: Engine,
        raise_exception: Callable[[int], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._state = state
        self._engine = engine
        self._raise = raise_exception
        self._fail = fail

    def close(self) -> None:
        """Let go of the engine."""
        del self._engine

    def on_syscall(self, _uc: int, _data: int) -> None:
        """SYSCALL from other than 64-bit code; see `Stubs.syscall_hook()`."""
        try:
            state = self._state
            u64 = state.u64
            efer = u64[CONTROL_OFFSET["efer"] // 8]
            if not efer & EFER_SCE or not u64[CONTROL_OFFSET["cr0"] // 8] & CR0_PE:
                self._raise(_UNDEFINED_OPCODE)
                return
            flags = state.read_flags()
            long = bool(efer & EFER_LMA)  # compatibility mode then
            u64[RCX] = state.rip + SYSCALL_LENGTH
            star = u64[STAR // 8]
            if long:
                u64[R11] = flags & ~RFLAGS_RF
                flags &= ~u64[FMASK // 8] & 0xFFFF_FFFF
                target = u64[CSTAR // 8]
            else:
                flags &= ~(RFLAGS_IF | RFLAGS_VM)
                target = star & 0xFFFF_FFFF
            state.write_flags(flags & ~RFLAGS_RF)
            state.enter_kernel(star >> 32 & 0xFFFF, long=long)
            state.rip = target - SYSCALL_LENGTH
        except BaseException as error:
            self._fail(error)

    def on_sysenter(self, _uc: int, _data: int) -> None:
        """SYSENTER, likewise (SDM vol. 2)."""
        try:
            state, read = self._state, self._engine.msr_read
            selector = read(_SYSENTER_CS) & 0xFFFC
            if not selector or not state.u64[CONTROL_OFFSET["cr0"] // 8] & CR0_PE:
                self._raise(_GENERAL_PROTECTION)
                return
            long = bool(state.u64[CONTROL_OFFSET["efer"] // 8] & EFER_LMA)
            mask = 0xFFFF_FFFF_FFFF_FFFF if long else 0xFFFF_FFFF
            state.write_flags(state.read_flags() & ~(RFLAGS_IF | RFLAGS_VM | RFLAGS_RF))
            state.enter_kernel(selector, long=long)
            state.u64[RSP] = read(_SYSENTER_ESP) & mask
            state.rip = (read(_SYSENTER_EIP) & mask) - SYSCALL_LENGTH
        except BaseException as error:
            self._fail(error)
