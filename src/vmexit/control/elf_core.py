"""A guest's memory and registers as an ELF core file, which debuggers read.

As QEMU's dump-guest-memory has it without paging: RAM by physical addresses, and a note with the
registers of each vCPU (System V ABI, ELF-64; Linux, include/linux/elfcore.h).
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from vmexit.arch.x86.registers import Registers, Segment, SystemRegisters
from vmexit.control.sink import Sink
from vmexit.core.memory import PAGE_SIZE, Region
from vmexit.machine.machine import Machine

_HEADER = struct.Struct("<4sBBBB8xHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_ELFCLASS64, _ELFDATA2LSB, _EV_CURRENT, _ET_CORE, _EM_X86_64 = 2, 1, 1, 4, 62
_PT_LOAD, _PT_NOTE = 1, 4
_PN_XNUM = 0xFFFF

_NOTE = struct.Struct("<III")
_NT_PRSTATUS = 1
# struct elf_prstatus of x86-64: signal, process, times, then the registers of user_regs_struct.
_PRSTATUS = struct.Struct("<12xhxx16xI76x27Qi4x")
_PRSTATUS_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
    "rsi", "rdi",
)  # fmt: skip

# QEMU's own note, which has what a process has not: control registers and segments
# (QEMU, target/i386/arch_dump.c, QEMUCPUState). `crash` finds a kernel moved by KASLR by them.
_QEMU_HEAD = struct.Struct("<II18Q")
_QEMU_SEGMENT = struct.Struct("<IIIIQ")
_QEMU_CONTROL = struct.Struct("<5Q")
_QEMU_GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip


class Range(NamedTuple):
    """So many bytes from a GPA on."""

    gpa: int
    size: int


_PIECE = 1 << 20  # bytes, copied at once


def write_core(vm: Machine, sink: Sink, only: Range | None = None) -> int:
    """All RAM, or what of it is in `only`, from one moment; returns how many bytes of it.

    Raises VmexitError.
    """
    with vm.paused():
        parts = [part for region in vm.memory.regions if (part := _part(region, only)) is not None]
        states = [(vcpu.regs.general(), vcpu.regs.system()) for vcpu in vm.vcpus]
        notes = b"".join(_prstatus(number, *state) for number, state in enumerate(states))
        notes += b"".join(_qemu_note(*state) for state in states)
        sink.write(_head(parts, notes))
        for gpa, size in parts:
            for at in range(0, size, _PIECE):
                sink.write(vm.memory.read(gpa + at, min(_PIECE, size - at)))
    return sum(size for _, size in parts)


def _part(region: Region, only: Range | None) -> Range | None:
    if region.readonly:
        return None
    start, end = region.gpa, region.end
    if only is not None:
        start, end = max(start, only.gpa), min(end, only.gpa + only.size)
    return Range(start, end - start) if start < end else None


def _head(parts: Sequence[Range], notes: bytes) -> bytes:
    """Everything before the memory, which begins at a page of its own."""
    count = 1 + len(parts)
    assert count < _PN_XNUM
    notes_at = _HEADER.size + count * _PROGRAM.size
    at = -(-(notes_at + len(notes)) // PAGE_SIZE) * PAGE_SIZE
    header = _HEADER.pack(
        b"\x7fELF", _ELFCLASS64, _ELFDATA2LSB, _EV_CURRENT, 0,
        _ET_CORE, _EM_X86_64, _EV_CURRENT, 0, _HEADER.size, 0, 0,
        _HEADER.size, _PROGRAM.size, count, 0, 0, 0,
    )  # fmt: skip
    programs = [_PROGRAM.pack(_PT_NOTE, 0, notes_at, 0, 0, len(notes), len(notes), 4)]
    end = at
    for gpa, size in parts:
        programs.append(_PROGRAM.pack(_PT_LOAD, 0, end, gpa, gpa, size, size, 0))
        end += size
    return b"".join((header, *programs, notes)).ljust(at, b"\0")


def _note(name: bytes, kind: int, data: bytes) -> bytes:
    def padded(part: bytes) -> bytes:
        return part + bytes(-len(part) % 4)

    return _NOTE.pack(len(name) + 1, len(data), kind) + padded(name + b"\0") + padded(data)


def _prstatus(vcpu: int, registers: Registers, system: SystemRegisters) -> bytes:
    r, s = registers, system
    numbers = [r[name] for name in _PRSTATUS_REGISTERS]
    numbers += [0, r["rip"], s.cs.selector, r["rflags"], r["rsp"], s.ss.selector]
    numbers += [s.fs.base, s.gs.base]
    numbers += [s.ds.selector, s.es.selector, s.fs.selector, s.gs.selector]
    return _note(b"CORE", _NT_PRSTATUS, _PRSTATUS.pack(0, vcpu + 1, *numbers, 0))


def _qemu_note(registers: Registers, system: SystemRegisters) -> bytes:
    s = system
    size = _QEMU_HEAD.size + 10 * _QEMU_SEGMENT.size + _QEMU_CONTROL.size
    data = _QEMU_HEAD.pack(1, size, *(registers[name] for name in _QEMU_GENERAL))
    for segment in (s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.ldt, s.tr):
        flags = _flags(segment)
        data += _QEMU_SEGMENT.pack(segment.selector, segment.limit, flags, 0, segment.base)
    for table in (s.gdt, s.idt):
        data += _QEMU_SEGMENT.pack(0, table.limit, 0, 0, table.base)
    return _note(b"QEMU", 0, data + _QEMU_CONTROL.pack(s.cr0, 0, s.cr2, s.cr3, s.cr4))


def _flags(segment: Segment) -> int:
    """The second word of a descriptor, without base and limit (Intel SDM vol. 3, figure 3-8)."""
    s = segment
    low = s.type << 8 | s.s << 12 | s.dpl << 13 | s.present << 15
    return low | s.avl << 20 | s.l << 21 | s.db << 22 | s.g << 23
