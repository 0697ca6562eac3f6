"""A 64-bit ELF guest of nested calls that ends at the innermost, with frame pointers or without."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = """
asm(".globl _start; _start: mov $stack_end, %rsp; xor %ebp, %ebp; call outermost; hlt");
char stack[16384] __attribute__((aligned(16384)));
asm(".globl stack_end; .set stack_end, stack + 16384");

static struct { unsigned short limit; unsigned long base; } __attribute__((packed)) no_idt;

__attribute__((noinline)) int innermost(int how)
{
    if (how != 2)
        asm volatile("lidt %0" : : "m"(no_idt));
    if (how == 1)
        asm volatile("ud2");
    else if (how == 2)
        asm volatile("out %%al, $0xf4" : : "a"(7));
    else
        ((int (*)(void))0xdead0000000)();
    return how + 1;
}
__attribute__((noinline)) int inner(int how) { return innermost(how) + 1; }
__attribute__((noinline)) int outer(int how) { int (*volatile f)(int) = inner; return f(how) + 1; }
__attribute__((noinline)) int outermost(void) { return outer(HOW) + 1; }
"""
TRIPLE_FAULT, DEBUG_EXIT, CALL_NOTHING = 1, 2, 3


def build(folder: Path, how: int, *options: str) -> Path:
    """The guest, which ends by `how`."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc on this machine")
    source, path = folder / "nested.c", folder / "nested.elf"
    source.write_text(SOURCE)
    flags = ["-O1", "-ffreestanding", "-fno-pie", "-fno-stack-protector", "-mno-red-zone"]
    flags += ["-fcf-protection=none", "-fno-asynchronous-unwind-tables", f"-DHOW={how}"]
    flags += ["-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x1000000,--build-id=none"]
    subprocess.run(
        ["gcc", *flags, "-fno-omit-frame-pointer", *options, source, "-o", path], check=True
    )
    return path
