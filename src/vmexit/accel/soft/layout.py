"""Where Unicorn keeps what in its CPU state, QEMU's CPUX86State; data without behaviour.

The offsets are those of the one release that vmexit is pinned to; `CpuState` proves them.
"""

# Byte offsets in CPUX86State. A segment cache is: selector (u32), base (u64 at 8), limit (u32 at
# 16), attributes (u32 at 20); the descriptor tables use the same form.
EIP = 0x80
EFLAGS = 0x88
HFLAGS = 0xB0
HFLAGS2 = 0xB4
SEGMENT = {
    "es": 0xB8, "cs": 0xD0, "ss": 0xE8, "ds": 0x100, "fs": 0x118, "gs": 0x130,
    "ldt": 0x148, "tr": 0x160,
}  # fmt: skip
TABLE = {"gdt": 0x178, "idt": 0x190}
CONTROL_OFFSET = {"cr0": 0x1A8, "cr2": 0x1B8, "cr3": 0x1C0, "cr4": 0x1C8, "efer": 0x250}
EFER = CONTROL_OFFSET["efer"]
# Model-specific registers: the offset, and the bits that the engine keeps of it.
MSR_OFFSET = {0xC000_0081: 0x12D8, 0xC000_0082: 0x12E8, 0xC000_0083: 0x12F0, 0xC000_0084: 0x12F8}
STAR, LSTAR, CSTAR, FMASK = MSR_OFFSET.values()
ERROR_CODE = 0x1508
EXCEPTION_IS_INT = 0x150C  # not zero: the exception is that of an INT instruction
OLD_EXCEPTION = 0x1578
TSC_OFFSET = 0x1588  # added to the host's
VMCB = 0x1580  # where the CPU reads the vector of a virtual interrupt (AMD APM vol. 2, 15.21.4)

# And in CPUState, QEMU's common part before it.
INTERRUPT_REQUEST = 0x1C
HALTED = 0x8198  # not zero behind a HLT
CLASS = 0x81B0  # the functions that QEMU has for a CPU of this kind
# Among them: debug_excp_handler, cpu_exec_enter, cpu_exec_interrupt.
CLASS_DEBUG, CLASS_ENTER, CLASS_INTERRUPT = 0x78, 0x80, 0x90
VIRTUAL_INTERRUPT, NMI = 0x100, 0x200  # CPU_INTERRUPT_VIRQ, CPU_INTERRUPT_NMI

# QEMU's register numbers are the processor's: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, …
ENCODED = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
GENERAL_OFFSET = {name: 8 * i for i, name in enumerate(ENCODED)} | {"rip": EIP}
# Indices of 64-bit words.
RAX, RCX, RDX, RBX, RSP, R11 = 0, 1, 2, 3, 4, 11

# hflags, bit by bit (QEMU target/i386/cpu.h calls them HF_…).
HF_CPL, HF_INHIBIT_IRQ = 3, 1 << 3
HF_CS32, HF_SS32, HF_ADDSEG, HF_PE = 1 << 4, 1 << 5, 1 << 6, 1 << 7
HF_MP_SHIFT = 9  # CR0.MP, EM, TS are bits 1 to 3 there, 9 to 11 here
HF_LMA, HF_CS64, HF_OSFXSR = 1 << 14, 1 << 15, 1 << 22
HF_SMAP = 1 << 23
HF2_NMI = 1 << 2  # in HFLAGS2: an NMI is in service, and another one waits for IRET

# Attributes of the segments that SYSCALL and SYSENTER load (SDM vol. 2): G, P, S, accessed; D, W, …
FLAT_CODE, FLAT_CODE_64, FLAT_DATA = 0xC0_9B00, 0xA0_9B00, 0xC0_9300

# SYSCALL and SYSENTER have two bytes each, and the engine steps over them after the hook.
SYSCALL_LENGTH = 2
