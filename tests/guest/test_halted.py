"""What wakes a vCPU that halts, what it is after reset, and what changes while it is paused."""

import struct

import pytest

from vmexit import Machine, StopReason

pytestmark = pytest.mark.engine

LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
EXIT = 0xF4


def store(address: int, value: int) -> bytes:
    """`mov dword [address], value`, in 32-bit code."""
    return b"\xc7\x05" + struct.pack("<II", address, value)


def microvm(code: bytes, smp: int = 1, accel: str = "soft") -> Machine:
    """32-bit code at 0x1000, a stack, the LAPIC on, and an IDT at 0x3000 with NMI to 0x2000."""
    vm = Machine("1M", accel, machine="microvm", mode="protected", serial="null", smp=smp)
    begin = bytes.fromhex("0f011d00400000 bc00800000") + store(LAPIC + 0xF0, 0x1FF)
    vm.load_bytes(begin + code, at=0x1000)
    vm.memory.write(0x3000 + 2 * 8, struct.pack("<HHBBH", 0x2000, 8, 0, 0x8E, 0))
    vm.memory.write(0x4000, struct.pack("<HI", 0x7FF, 0x3000))
    return vm


def test_an_nmi_from_a_device_ends_a_halt_with_interrupts_off():
    """The PIT comes through the I/O APIC as an NMI, every 55 ms; the second one ends the run."""
    code = b"\x31\xdb"  # xor ebx, ebx
    code += store(IOAPIC, 0x15) + store(IOAPIC + 0x10, 0)
    code += store(IOAPIC, 0x14) + store(IOAPIC + 0x10, 0x400)
    code += bytes.fromhex("b034e643 b0ffe640 b0ffe640")  # channel 0, mode 2, the longest
    code += bytes.fromhex("f4 ebfd")  # l: hlt; jmp l
    with microvm(code) as vm:
        # inc ebx; cmp ebx, 2; je +1; iret; mov al, 0x22; out 0xf4, al
        vm.load_bytes(bytes.fromhex("43 83fb02 7401 cf b022 e6f4"), at=0x2000)
        stop = vm.run(timeout=30)
        assert (stop.reason, stop.value) == (StopReason.DEBUG_EXIT, 0x22)


def test_an_nmi_that_is_blocked_does_not_end_a_halt():
    """Within the handler of one, another is sent: HLT stays, and nothing can come any more."""
    code = store(LAPIC + 0x300, 0x4_4400) + bytes.fromhex("90 ebfd")  # NMI to itself
    with microvm(code) as vm:
        handler = store(LAPIC + 0x300, 0x4_4400) + bytes.fromhex("eb00 f4 b077 e6f4")
        vm.load_bytes(handler, at=0x2000)
        assert vm.run(timeout=30).reason is StopReason.HALT


@pytest.mark.parametrize("register", ["rax", "rsp"])
def test_writing_a_register_of_a_halted_vcpu_leaves_it_halted(accel, register):
    code = bytes.fromhex("fb f4 b011 e6f4")  # sti; hlt; mov al, 0x11; out 0xf4, al
    with microvm(code, accel=accel) as vm:
        assert vm.run(timeout=0.2).reason is StopReason.TIMEOUT
        setattr(vm.vcpus[0].regs, register, 0x7000)
        assert vm.run(timeout=0.2).reason is StopReason.TIMEOUT
        vm.vcpus[0].regs.rip += 0  # where it is: nothing changes either
        assert vm.run(timeout=0.2).reason is StopReason.TIMEOUT
        vm.vcpus[0].regs.rip += 1  # from another place it goes on
        vm.load_bytes(code[2:], at=vm.vcpus[0].regs.rip)
        stop = vm.run(timeout=30)
        assert (stop.reason, stop.value) == (StopReason.DEBUG_EXIT, 0x11)


def test_a_processor_that_waits_for_its_start_is_as_after_reset():
    with microvm(b"\xf4", smp=2) as vm:
        regs = vm.vcpus[1].regs
        assert (regs.rip, regs.cs.base, regs.cs.selector) == (0xFFF0, 0xFFFF_0000, 0xF000)
        assert regs.efer == 0
        assert regs.cr0 & 1 == 0


def test_a_pic_alone_gives_its_own_spurious_interrupt():
    """IRQ 0 comes while interrupts are off; it is masked, then they are switched on."""
    code = bytes.fromhex(
        "31c0 8ed8 8ec0 bc0080 fa"  # ds = es = 0, a stack, cli
        "b011e620 b008e621 b004e621 b001e621 b0fee621"  # master PIC: vectors from 8, IRQ 0
        "fb 9c fa b034e643 b0a9e640 b004e640"  # flags with IF; PIT, mode 2, 1 ms
        "b90000 e2fe b90000 e2fe b90000 e2fe b90000 e2fe b90000 e2fe"  # a while
        "b0ffe621 9d 9090 b055 e6f4"  # mask all; popf; no interrupt: 0x55
    )
    with Machine("1M", "soft", machine="microvm", serial="null") as vm:
        vm.load_bytes(code, at=0x1000)
        for vector in range(256):  # each says which it is
            vm.memory.write(0x2000 + 8 * vector, bytes((0xB0, vector, 0xE6, EXIT)))
            vm.memory.write(4 * vector, (0x2000 + 8 * vector).to_bytes(4, "little"))
        stop = vm.run(timeout=30)
    assert (stop.reason, stop.value) == (StopReason.DEBUG_EXIT, 8 + 7)
