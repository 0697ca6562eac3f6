"""The state of the engine's CPU as plain data, without anything of this process."""

from vmexit.accel.soft.cpu_state import CpuState
from vmexit.accel.soft.fpu import Fpu
from vmexit.accel.soft.layout import HF2_NMI, HF_INHIBIT_IRQ, HFLAGS, HFLAGS2
from vmexit.accel.soft.native import Engine, Library
from vmexit.arch.x86 import fxsave
from vmexit.arch.x86.registers import (
    CONTROL,
    GENERAL,
    MTRRS,
    SEGMENTS,
    TABLES,
    Segment,
    SystemRegisters,
    Table,
)
from vmexit.arch.x86.segments import TSS_BUSY_BIT
from vmexit.core.bus import State
from vmexit.core.saved import Saved

# The MSRs that the engine keeps, but for the bases of FS and GS, which are the segments', and EFER.
_SYSENTER = range(0x174, 0x177)
_SYSCALL = range(0xC000_0081, 0xC000_0085)
_OTHERS = (0x17A, 0x1A0, 0x277, 0xC000_0102, 0xC000_0103)  # MCG_STATUS, … PAT, … TSC_AUX
_MSRS = (*_SYSENTER, *_SYSCALL, *MTRRS, *_OTHERS)

_WORD = (1 << 64) - 1
# The most that a field of `Segment` can be, in its order.
_SEGMENT_TOPS = (0xFFFF, _WORD, 0xFFFF_FFFF, 0xF, 1, 3, 1, 1, 1, 1, 1)
_TSS_TYPES = (1, 9)  # available ones, of 16 and of 32 bits (SDM vol. 3, table 3-2)
_DEBUG = ("DR0", "DR1", "DR2", "DR3", "DR6", "DR7")
_DR7_AT_RESET = 1 << 10


class CpuSaving:
    """Saves and loads the CPU of one engine, which does not execute."""

    def __init__(self, library: Library, engine: Engine, state: CpuState, fpu: Fpu) -> None:
        from unicorn import x86_const

        self._library = library
        self._engine = engine
        self._state = state
        self._fpu = fpu
        self._debug = [getattr(x86_const, f"UC_X86_REG_{name}") for name in _DEBUG]

    def save(self) -> State:
        """All of it that a guest can tell."""
        state, engine = self._state, self._engine
        system = state.read_system()
        return {
            "general": [state.read_general()[name] for name in GENERAL],
            "segments": {name: list(getattr(system, name)) for name in SEGMENTS},
            "tables": {name: list(getattr(system, name)) for name in TABLES},
            "control": [getattr(system, name) for name in CONTROL],
            "fpu": self._fpu.read(),
            "msrs": [engine.msr_read(index) for index in _MSRS],
            "debug": [engine.reg_read(register) for register in self._debug],
            "tsc": state.tsc(self._library),
            "interrupt_shadow": bool(state.u32[HFLAGS // 4] & HF_INHIBIT_IRQ),
            "in_nmi": bool(state.u32[HFLAGS2 // 4] & HF2_NMI),
        }

    def load(self, saved: Saved) -> None:
        """Take that over. Raises ConfigError, with nothing changed."""
        segments, tables = saved.part("segments"), saved.part("tables")
        count = len(SEGMENTS) + len(TABLES)
        task = _segment(segments, "tr")
        if not task.present or task.type & ~TSS_BUSY_BIT not in _TSS_TYPES:
            raise saved.error()  # with any other the engine would end the process
        parts: list[Segment | Table | int] = [_segment(segments, name) for name in SEGMENTS]
        parts += [Table(*tables.numbers(name, _WORD, 2)) for name in TABLES]
        parts += saved.numbers("control", _WORD, len(CONTROL))
        general = saved.numbers("general", _WORD, len(GENERAL))
        fpu = saved.data("fpu", fxsave.SIZE, fxsave.SIZE)
        msrs = saved.numbers("msrs", _WORD, len(_MSRS))
        debug = saved.numbers("debug", _WORD, len(_DEBUG))
        tsc = saved.number("tsc", _WORD)
        shadow, in_nmi = saved.flag("interrupt_shadow"), saved.flag("in_nmi")
        if any(part.limit > 0xFFFF_FFFF for part in parts[:count] if isinstance(part, Table)):
            raise saved.error()

        state, engine = self._state, self._engine
        state.write_general(dict(zip(GENERAL, general, strict=True)))  # the flags come first:
        state.write_system(SystemRegisters._make(parts))  # VM counts for the mode
        self._fpu.write(fpu)
        for index, value in zip(_MSRS, msrs, strict=True):
            engine.msr_write(index, value)
        self._load_debug(debug)
        _set(state.u32, HFLAGS // 4, HF_INHIBIT_IRQ, shadow)
        _set(state.u32, HFLAGS2 // 4, HF2_NMI, in_nmi)
        self._library.flush_tlb(engine._uch.value or 0)
        state.set_tsc(self._library, tsc)

    def _load_debug(self, values: list[int]) -> None:
        """QEMU keeps a list of the breakpoints in DR7, which only its own function changes."""
        update = self._library.update_dr7
        update(self._state.base, _DR7_AT_RESET)  # none of those before is left
        for register, value in zip(self._debug[:-1], values, strict=False):
            self._engine.reg_write(register, value)
        update(self._state.base, values[-1] & 0xFFFF_FFFF)


def _segment(saved: Saved, name: str) -> Segment:
    values = saved.numbers(name, _WORD, len(_SEGMENT_TOPS))
    if any(value > top for value, top in zip(values, _SEGMENT_TOPS, strict=True)):
        raise saved.error()
    return Segment(*values)


def _set(words: memoryview, index: int, bit: int, wanted: bool) -> None:
    words[index] = words[index] & ~bit & 0xFFFF_FFFF | (bit if wanted else 0)
