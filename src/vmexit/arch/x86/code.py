"""Looking at guest code: its bytes, and what they mean."""

from vmexit.arch.x86.paging import translate
from vmexit.arch.x86.registers import CR0_PE, EFER_LMA, RFLAGS_VM, Registers, SystemRegisters
from vmexit.core.errors import GuestAddressError
from vmexit.core.memory import PAGE_SIZE, GuestMemory

MAX_INSTRUCTION = 15  # Intel SDM vol. 2, 2.3.11


def code_bits(registers: Registers, system: SystemRegisters) -> int:
    """16, 32 or 64: how the vCPU decodes the code it is in."""
    if not system.cr0 & CR0_PE or registers["rflags"] & RFLAGS_VM:
        return 16
    if system.efer & EFER_LMA and system.cs.l:
        return 64
    return 32 if system.cs.db else 16


def linear_ip(registers: Registers, system: SystemRegisters) -> int:
    """The linear address of the next instruction; CS has no base in 64-bit mode."""
    if code_bits(registers, system) == 64:
        return registers["rip"]
    return system.cs.base + registers["rip"] & 0xFFFF_FFFF


def read_linear(memory: GuestMemory, system: SystemRegisters, address: int, size: int) -> bytes:
    """Up to `size` bytes at a linear address, from the last of which the first follows.

    Fewer where memory ends.
    """
    data = b""
    while len(data) < size:
        gva = address + len(data) & (1 << 64) - 1
        gpa = translate(memory, system, gva)
        if gpa is None:
            break
        piece = min(size - len(data), PAGE_SIZE - gpa % PAGE_SIZE)
        try:
            data += memory.read(gpa, piece)
        except GuestAddressError:
            break
    return data


def disassemble(
    code: bytes, address: int, bits: int, count: int = 1
) -> list[tuple[int, bytes, str]]:
    """The first `count` instructions of `code` as `(address, bytes, text)`; fewer if bad."""
    import capstone  # 30 ms that only a crash or `inspect` has to spend

    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    decoder = capstone.Cs(capstone.CS_ARCH_X86, modes[bits])
    return [
        (at, code[at - address : at - address + size], f"{mnemonic} {operands}".rstrip())
        for at, size, mnemonic, operands in decoder.disasm_lite(code, address, count)
    ]


def describe_instruction(code: bytes, address: int, bits: int) -> str:
    """The instruction at the start of `code` in words and hex; says so where it is none."""
    if not code:
        return "no guest memory there"
    found = disassemble(code, address, bits)
    if not found:
        return f"undefined ({code[:MAX_INSTRUCTION].hex(' ')})"
    _, raw, text = found[0]
    return f"`{text}` ({raw.hex(' ')})"


def next_instruction(
    memory: GuestMemory, registers: Registers, system: SystemRegisters
) -> tuple[bytes, str]:
    """The bytes at CS:RIP and `describe_instruction()` of them."""
    address = linear_ip(registers, system)
    code = read_linear(memory, system, address, MAX_INSTRUCTION)
    return code, describe_instruction(code, address, code_bits(registers, system))


def dump(registers: Registers, system: SystemRegisters, instruction: str) -> str:
    """All registers and the next instruction, for the report of a crash."""
    r = registers
    rows = [
        " ".join(f"{name:>3}={r[name]:016x}" for name in names)
        for names in (
            ("rax", "rbx", "rcx", "rdx"),
            ("rsi", "rdi", "rsp", "rbp"),
            ("r8", "r9", "r10", "r11"),
            ("r12", "r13", "r14", "r15"),
        )
    ]
    rows.append(f"rip={r['rip']:016x} rflags={r['rflags']:08x}  {instruction}")
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt"):
        s = getattr(system, name)
        kind = f"type={s.type:x} s={s.s} dpl={s.dpl} p={s.present} l={s.l} db={s.db} g={s.g}"
        rows.append(f"{name:>3}={s.selector:04x} base={s.base:016x} limit={s.limit:08x} {kind}")
    rows.append(
        f"gdt={system.gdt.base:016x}+{system.gdt.limit:04x} "
        f"idt={system.idt.base:016x}+{system.idt.limit:04x}"
    )
    rows.append(
        f"cr0={system.cr0:08x} cr2={system.cr2:016x} cr3={system.cr3:016x} "
        f"cr4={system.cr4:08x} efer={system.efer:08x}"
    )
    return "\n".join(rows)
