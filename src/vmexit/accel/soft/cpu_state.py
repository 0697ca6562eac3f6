"""Unicorn's own CPU state (QEMU's CPUX86State), read and written in place.

The public register interface loads only the selector of a segment, and keeps what derives from it
(`hflags`, QEMU's summary of the CPU mode) for itself, so vmexit writes the state directly. The
offsets are those of the one Unicorn release that vmexit is pinned to; `CpuState` proves them on
the running library before the first use.
"""

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from vmexit.accel.soft.layout import (
    CLASS,
    CLASS_DEBUG,
    CLASS_ENTER,
    CLASS_INTERRUPT,
    CONTROL_OFFSET,
    EIP,
    ERROR_CODE,
    FLAT_CODE,
    FLAT_CODE_64,
    FLAT_DATA,
    GENERAL_OFFSET,
    HALTED,
    HF_ADDSEG,
    HF_CPL,
    HF_CS32,
    HF_CS64,
    HF_LMA,
    HF_MP_SHIFT,
    HF_OSFXSR,
    HF_PE,
    HF_SMAP,
    HF_SS32,
    HFLAGS,
    INTERRUPT_REQUEST,
    MSR_OFFSET,
    NMI,
    OLD_EXCEPTION,
    SEGMENT,
    TABLE,
    TSC_OFFSET,
    VIRTUAL_INTERRUPT,
)
from vmexit.accel.soft.native import Engine, Library
from vmexit.arch.x86.registers import (
    CONTROL,
    CR0_PE,
    EFER_LMA,
    GENERAL,
    RFLAGS_VM,
    SEGMENTS,
    TABLES,
    Registers,
    SystemRegisters,
    Table,
)
from vmexit.arch.x86.segments import TSS_BUSY_BIT, attributes, from_attributes
from vmexit.core.errors import HostError

_SIZE = 0x1600
_SEARCH = 0x10000  # CPUX86State begins within so many bytes of CPUState

_CR2 = CONTROL_OFFSET["cr2"] // 8
_CR4_OSFXSR, _CR4_SMAP = 1 << 9, 1 << 21


class CpuState:
    """A view of one engine's CPUX86State."""

    def __init__(self, library: Library, engine: Engine, cpu: int, ids: dict[str, int]) -> None:
        """`cpu` is the engine's CPUState; `ids` the engine's register numbers by name.

        Raises HostError if this Unicorn does not keep its state where vmexit expects it.
        """
        self._engine = engine
        self._flags = ids["rflags"]
        self.base = _find(engine, cpu, ids)
        """Address of CPUX86State."""
        self._memory = (ctypes.c_char * _SIZE).from_address(self.base)
        view = memoryview(self._memory).cast("B")
        self.u8, self.u32, self.u64 = view, view.cast("I"), view.cast("Q")
        self._request = ctypes.c_uint32.from_address(cpu + INTERRUPT_REQUEST)
        self._halted = ctypes.c_uint32.from_address(cpu + HALTED)
        functions = ctypes.c_uint64.from_address(cpu + CLASS).value
        self._entry = ctypes.c_uint64.from_address(functions + CLASS_ENTER)
        self._interrupt = ctypes.c_uint64.from_address(functions + CLASS_INTERRUPT)
        self._debug = ctypes.c_uint64.from_address(functions + CLASS_DEBUG)
        _prove_request(library, cpu, self._request)
        _prove(self, engine, ids)
        if self._entry.value != library.address("x86_cpu_exec_enter_x86_64"):
            raise _unknown_layout("cpu_exec_enter")
        if self._interrupt.value != library.address("x86_cpu_exec_interrupt_x86_64"):
            raise _unknown_layout("cpu_exec_interrupt")
        if self._debug.value != library.address("breakpoint_handler_x86_64"):
            raise _unknown_layout("debug_excp_handler")
        if not library.resume_clears(HALTED):
            raise _unknown_layout("halted")

    def close(self) -> None:
        """Let go of the memory; nothing may be read from here afterwards."""
        for view in (self.u64, self.u32, self.u8):
            view.release()
        del self._engine

    @property
    def rip(self) -> int:
        """EIP or RIP, relative to CS."""
        return self.u64[EIP // 8]

    @rip.setter
    def rip(self, value: int) -> None:
        self.u64[EIP // 8] = value & 0xFFFF_FFFF_FFFF_FFFF

    def tsc(self, library: Library) -> int:
        """The TSC now: the host's, and the offset."""
        host: int = library.get_tsc(self.base)
        return host + self.u64[TSC_OFFSET // 8] & 0xFFFF_FFFF_FFFF_FFFF

    def set_tsc(self, library: Library, value: int) -> None:
        """Have the TSC be `value` now; it goes on as the host's does."""
        self.u64[TSC_OFFSET // 8] = value - library.get_tsc(self.base) & 0xFFFF_FFFF_FFFF_FFFF

    def request(self, interrupts: int) -> None:
        """What the CPU is to take as soon as its flags allow: VIRTUAL_INTERRUPT, NMI, or 0."""
        self._request.value = interrupts

    @property
    def requested(self) -> int:
        """What of that it has not taken yet."""
        return self._request.value

    @property
    def halted(self) -> bool:
        """Whether the engine ended behind a HLT."""
        return bool(self._halted.value)

    @halted.setter
    def halted(self, value: bool) -> None:
        self._halted.value = value

    @contextmanager
    def exceptions_kept(self) -> Iterator[None]:
        """What the engine notes of exceptions within is forgotten."""
        cr2, error, old = self.u64[_CR2], self.u32[ERROR_CODE // 4], self.u32[OLD_EXCEPTION // 4]
        try:
            yield
        finally:
            self.u64[_CR2], self.u32[ERROR_CODE // 4] = cr2, error
            self.u32[OLD_EXCEPTION // 4] = old

    def replace(self, entry: int, interrupt: int, debug: int) -> None:
        """Have the engine call these in place of QEMU's functions that layout.py names."""
        self._entry.value = entry
        self._interrupt.value = interrupt
        self._debug.value = debug

    def read_general(self) -> Registers:
        """General registers, RIP and RFLAGS; the flags come from the engine, which is lazy."""
        values = {name: self.u64[offset // 8] for name, offset in GENERAL_OFFSET.items()}
        values["rflags"] = self._engine.reg_read(self._flags)
        return {name: values[name] for name in GENERAL}

    def write_general(self, registers: Registers) -> None:
        """Load all of what `read_general()` gives."""
        for name, offset in GENERAL_OFFSET.items():
            self.u64[offset // 8] = registers[name]
        self._engine.reg_write(self._flags, registers["rflags"] | 2)

    def read_system(self) -> SystemRegisters:
        """Segments, descriptor tables, control registers and EFER."""
        u32, u64 = self.u32, self.u64
        segments = [
            from_attributes(
                u32[at // 4] & 0xFFFF, u64[(at + 8) // 8], u32[(at + 16) // 4], u32[(at + 20) // 4]
            )
            for at in (SEGMENT[name] for name in SEGMENTS)
        ]
        # LTR makes the TSS busy (SDM vol. 2), which QEMU notes in memory only.
        task = SEGMENTS.index("tr")
        segments[task] = segments[task]._replace(type=segments[task].type | TSS_BUSY_BIT)
        tables = [
            Table(u64[(at + 8) // 8], u32[(at + 16) // 4])
            for at in (TABLE[name] for name in TABLES)
        ]
        # CR8 is the LAPIC's, which this accelerator has none of.
        control = [u64[CONTROL_OFFSET[n] // 8] if n in CONTROL_OFFSET else 0 for n in CONTROL]
        return SystemRegisters._make([*segments, *tables, *control])

    def write_system(self, system: SystemRegisters) -> None:
        """Load all of what `read_system()` gives, and what QEMU derives from it."""
        u32, u64 = self.u32, self.u64
        for name, at in SEGMENT.items():
            segment = getattr(system, name)
            if name == "tr":  # a busy one is none that QEMU knows: it would end the process
                segment = segment._replace(type=segment.type & ~TSS_BUSY_BIT)
            u32[at // 4] = segment.selector
            u64[(at + 8) // 8] = segment.base
            u32[(at + 16) // 4] = segment.limit
            u32[(at + 20) // 4] = attributes(segment)
        for name, at in TABLE.items():
            table = getattr(system, name)
            u64[(at + 8) // 8] = table.base
            u32[(at + 16) // 4] = table.limit
        for name in CONTROL:
            if name in CONTROL_OFFSET:
                u64[CONTROL_OFFSET[name] // 8] = getattr(system, name)
        self.u32[HFLAGS // 4] = hflags(system, self._engine.reg_read(self._flags))

    def read_flags(self) -> int:
        """RFLAGS, which the engine keeps in pieces."""
        return self._engine.reg_read(self._flags)

    def write_flags(self, value: int) -> None:
        """Load RFLAGS."""
        self._engine.reg_write(self._flags, value | 2)

    def enter_kernel(self, selector: int, *, long: bool) -> None:
        """Flat ring 0 segments, as SYSCALL and SYSENTER load them: CS, and SS behind it."""
        u32, u64 = self.u32, self.u64
        for name, number, kind in (
            ("cs", selector & 0xFFFC, FLAT_CODE_64 if long else FLAT_CODE),
            ("ss", (selector & 0xFFFC) + 8, FLAT_DATA),
        ):
            at = SEGMENT[name]
            u32[at // 4] = number & 0xFFFF
            u64[(at + 8) // 8] = 0
            u32[(at + 16) // 4] = 0xFFFF_FFFF
            u32[(at + 20) // 4] = kind
        flags = u32[HFLAGS // 4] & ~(HF_CPL | HF_CS64 | HF_ADDSEG) | HF_CS32 | HF_SS32
        if long:
            flags |= HF_CS64
        elif any(u64[(SEGMENT[name] + 8) // 8] for name in ("ds", "es")):
            flags |= HF_ADDSEG
        u32[HFLAGS // 4] = flags


def hflags(system: SystemRegisters, rflags: int) -> int:
    """QEMU's summary of the CPU mode: what translated code depends on."""
    protected = bool(system.cr0 & CR0_PE)
    flags = (system.cr0 >> 1 & 7) << HF_MP_SHIFT
    if system.cr4 & _CR4_OSFXSR:
        flags |= HF_OSFXSR
    if system.cr4 & _CR4_SMAP:
        flags |= HF_SMAP
    if not protected or rflags & RFLAGS_VM:
        flags |= HF_ADDSEG
        return flags | (HF_PE | 3 if protected else 0)
    flags |= HF_PE | system.ss.dpl
    if system.efer & EFER_LMA:
        flags |= HF_LMA
        if system.cs.l:
            return flags | HF_CS64 | HF_CS32 | HF_SS32
    if system.cs.db:
        flags |= HF_CS32
    if system.ss.db:
        flags |= HF_SS32
    if not system.cs.db or system.ds.base or system.es.base or system.ss.base:
        flags |= HF_ADDSEG
    return flags


def _find(engine: Engine, cpu: int, ids: dict[str, int]) -> int:
    """Where CPUX86State is: it begins with the general registers, rax, rcx, rdx, …"""
    names = ("rax", "rcx", "rdx")
    marks = [0x1122_3344_5566_7788 + i for i in range(len(names))]
    for name, mark in zip(names, marks, strict=True):
        engine.reg_write(ids[name], mark)
    offset = ctypes.string_at(cpu, _SEARCH).find(struct.pack("<3Q", *marks))
    for name in names:
        engine.reg_write(ids[name], 0)
    if offset < 0:
        raise _unknown_layout("the general registers")
    return cpu + offset


def _prove(state: CpuState, engine: Engine, ids: dict[str, int]) -> None:
    """Write through the public interface, and see it arrive where it is expected."""
    u32, u64 = state.u32, state.u64
    probes = [(name, offset, 0x1234_5678_0000 + offset) for name, offset in GENERAL_OFFSET.items()]
    probes += [("cr2", CONTROL_OFFSET["cr2"], 0x5678_0000), ("cr3", CONTROL_OFFSET["cr3"], 0x7000)]
    for name, offset, value in probes:
        engine.reg_write(ids[name], value)
        if u64[offset // 8] != value:
            raise _unknown_layout(name)
        engine.reg_write(ids[name], 0)
    for name, at in TABLE.items():
        engine.reg_write(ids[name], (0, 0x1000 + at, 0x80 + at, 0))
        if (u64[(at + 8) // 8], u32[(at + 16) // 4]) != (0x1000 + at, 0x80 + at):
            raise _unknown_layout(name)
    for name in ("fs", "gs"):
        engine.reg_write(ids[f"{name}_base"], 0xABC0_0000)
        if u64[(SEGMENT[name] + 8) // 8] != 0xABC0_0000:
            raise _unknown_layout(name)
    for name, bits in (("cr4", 1 << 5 | 1 << 9), ("cr0", 1 << 4 | 1)):
        engine.reg_write(ids[name], bits)
        if u64[CONTROL_OFFSET[name] // 8] != bits:
            raise _unknown_layout(name)
    if not u32[HFLAGS // 4] & HF_PE or not u32[HFLAGS // 4] & HF_OSFXSR:
        raise _unknown_layout("hflags")
    if u32[OLD_EXCEPTION // 4] != 0xFFFF_FFFF:
        raise _unknown_layout("old_exception")
    for index, offset in MSR_OFFSET.items():
        engine.msr_write(index, 0x1234_0000 + offset)
        if u64[offset // 8] != 0x1234_0000 + offset:
            raise _unknown_layout(f"MSR {index:#x}")
        engine.msr_write(index, 0)


def _prove_request(library: Library, cpu: int, request: "ctypes.c_uint32") -> None:
    """Have the library clear a bit, and see it cleared."""
    if request.value:
        raise _unknown_layout("interrupt_request")
    request.value = VIRTUAL_INTERRUPT | NMI
    library.reset_interrupt(cpu, NMI)
    if request.value != VIRTUAL_INTERRUPT:
        raise _unknown_layout("interrupt_request")
    request.value = 0


def _unknown_layout(what: str) -> HostError:
    return HostError(
        f"this Unicorn keeps {what} elsewhere than release 2.1.4 does; "
        "install unicorn==2.1.4, or use --accel kvm"
    )
