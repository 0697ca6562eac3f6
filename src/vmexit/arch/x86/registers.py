"""The registers of an x86-64 vCPU as plain data, in the names of the Intel SDM."""

from typing import NamedTuple

# In the order of `struct kvm_regs` (KVM API 4.11).
GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip", "rflags",
)  # fmt: skip
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
TABLES = ("gdt", "idt")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
# Memory types, by range, fixed, and the default one (Intel SDM vol. 3, 12.11).
MTRRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)

# General registers by name, all of GENERAL; 64-bit values.
Registers = dict[str, int]

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR0_NW_CD = 0b11 << 29
CR4_PSE, CR4_PAE, CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
EFER_SCE, EFER_LME, EFER_LMA = 1 << 0, 1 << 8, 1 << 10
RFLAGS_FIXED = 1 << 1
RFLAGS_IF, RFLAGS_DF, RFLAGS_RF, RFLAGS_VM = 1 << 9, 1 << 10, 1 << 16, 1 << 17


class Segment(NamedTuple):
    """A segment register with its hidden part (Intel SDM vol. 3, 3.4.3). `limit` is in bytes."""

    selector: int
    base: int
    limit: int
    type: int
    s: int
    dpl: int
    present: int
    l: int  # noqa: E741 - the SDM's name of the bit
    db: int
    g: int
    avl: int = 0


class Table(NamedTuple):
    """GDTR or IDTR: linear base address, limit in bytes."""

    base: int
    limit: int


class SystemRegisters(NamedTuple):
    """Segments, descriptor tables, control registers and EFER."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Table
    idt: Table
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
