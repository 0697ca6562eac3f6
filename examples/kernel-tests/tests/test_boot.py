"""How the processor and memory are once the kernel waits at its prompt."""

import struct

CR0_WP, CR0_PG = 1 << 16, 1 << 31
EFER_LMA = 1 << 10
RFLAGS_IF = 1 << 9


def test_the_processor_is_in_long_mode_with_paging_and_write_protection(booted):
    regs = booted.vcpus[0].regs
    assert regs.cr0 & (CR0_PG | CR0_WP) == CR0_PG | CR0_WP
    assert regs.efer & EFER_LMA
    assert regs.cs.selector == 8 and regs.cs.l


def test_the_first_gigabyte_is_mapped_to_itself_and_nothing_behind(booted):
    for address in (0, 0x10_0000, 0x1234_5678, (1 << 30) - 1):
        assert booted.translate(address) == address
    assert booted.translate(1 << 30) is None


def test_interrupts_are_on_and_have_a_gate_for_each_vector(kernel):
    regs = kernel.vm.vcpus[0].regs
    assert regs.rflags & RFLAGS_IF
    assert (regs.idt.base, regs.idt.limit) == (kernel.address("gates"), 48 * 16 - 1)
    for vector in range(48):
        gate = kernel.vm.memory.read(regs.idt.base + 16 * vector, 12)
        low, middle, high = struct.unpack("<H4xHI", gate)
        assert low | middle << 16 | high << 32 == kernel.variable("vectors", vector)


def test_the_kernel_waits_in_its_shell(booted):
    calls = [frame.name.partition("+")[0] for frame in booted.backtrace()]
    assert calls[-3:] == ["shell", "kernel_main", "start64"]
