"""Exceptions, interrupts and system calls arrive as the manuals say (Intel SDM vol. 3, 6)."""

import struct
from pathlib import Path

import pytest

from guests import FOLDER
from vmexit import Machine, StopReason

pytestmark = pytest.mark.engine

DE, DB, NMI, BP, OF, BR, UD, DF, NP, SS, GP, PF = 0, 1, 2, 3, 4, 5, 6, 8, 11, 12, 13, 14

# The software CPU does not set RF in what it pushes.
RF = 1 << 16
CF, FIXED, TF, IF = 1 << 0, 1 << 1, 1 << 8, 1 << 9

LOG = 0x20000
KERNEL, USER = 0x08, 0x2B
STACK, RSP0, IST1, IST2, USER_STACK = 0x9000, 0xA000, 0xB000, 0xC000, 0xD000
ABSENT_PAGE, LEAVE = 0x80_0000_0000, 0x80_0000_1000

PVM = Path("/sys/module/kvm_pvm").exists()


def run(accel: str, name: str, mode: str, **more):
    machine = Machine("64M", accel, image=FOLDER / f"{name}.bin", mode=mode, **more)
    with machine as vm:
        stop = vm.run(timeout=30)
        if accel == "kvm" and stop.reason is StopReason.INTERNAL_ERROR:
            pytest.skip(f"this KVM cannot run it: {stop.detail}")
        assert stop.reason is StopReason.HALT, stop
        return vm.vcpus[0].regs.as_dict(), bytes(vm.memory[0:0x40000])


def records(memory: bytes, end: int, form: str) -> list[tuple[int, ...]]:
    return list(struct.iter_unpack(form, memory[LOG:end]))


def long_log(accel: str, name: str) -> list[tuple[int, ...]]:
    """Vector, error code, RIP as expected or not, CS, RFLAGS without RF, RSP, SS, CR2, frame."""
    registers, memory = run(accel, name, "long")
    log = records(memory, registers["r15"], "<10Q")
    return [(*r[:4], r[4] & ~RF, *r[5:9]) for r in log]


def test_exceptions_in_64_bit_mode(accel):
    log = long_log(accel, "exceptions-long")

    def in_ring_0(vector, error=0, *, cr2=0, stack=STACK, rsp=STACK):
        return vector, error, 0, KERNEL, rsp, 0x10, cr2, (stack & ~0xF) - 40

    def in_ring_3(vector, error=0, *, cr2=0, stack=RSP0):
        return vector, error, 0, USER, USER_STACK, 0x23, cr2, stack - 40

    expected = [
        in_ring_0(DE),
        in_ring_0(UD),
        in_ring_0(GP),  # an address that is not canonical
        in_ring_0(GP, 0x1230),
        in_ring_0(NP, 0x40),
        in_ring_0(SS, 0x40),
        in_ring_0(UD, stack=STACK - 4, rsp=STACK - 4),
        in_ring_0(PF, 0, cr2=ABSENT_PAGE + 0x123, stack=IST1),
        in_ring_0(PF, 2, cr2=ABSENT_PAGE + 0x123, stack=IST1),  # a write
        in_ring_0(PF, 3, cr2=0x600008, stack=IST1),  # to a page that is there
        in_ring_0(PF, 0x11, cr2=0x400000, stack=IST1),  # fetching code
        in_ring_0(DB),
        in_ring_0(DF, stack=IST2),
        in_ring_3(GP),
        in_ring_3(UD),
        in_ring_3(PF, 5, cr2=0x200040, stack=IST1),
        in_ring_3(PF, 7, cr2=0x200040, stack=IST1),
    ]
    assert [(*r[:4], *r[5:]) for r in log[:-1]] == expected
    assert log[-1][:2] == (PF, 4) and log[-1][7] == LEAVE
    flags = [r[4] for r in log]
    assert [f & CF for f in flags[2:4]] == [CF, 0]
    assert [f & TF for f in flags[10:13]] == [0, TF, 0]


def test_software_interrupts_in_64_bit_mode(accel):
    log = long_log(accel, "software-interrupts")
    behind = [(r[0], r[1], r[3], r[5], r[8]) for r in log[:-1]]
    ring_0, ring_3 = (KERNEL, STACK, STACK - 40), (USER, USER_STACK, RSP0 - 40)
    assert behind == [
        (BP, 0, *ring_0),
        (0x80, 0, *ring_0),
        (0x81, 0, *ring_0),
        (GP, 0x90 * 8 + 2, *ring_0),  # beyond the IDT
        (BP, 0, *ring_3),
        (0x80, 0, *ring_3),
        (GP, 0x81 * 8 + 2, *ring_3),  # a gate for ring 0
    ]
    assert [r[2] for r in log[:3]] == [0, 0, 0]
    assert [r[4] & IF for r in log[:3]] == [0, IF, IF]


@pytest.mark.parametrize("accel", ["soft", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_system_calls(accel):
    if accel == "kvm" and PVM:
        pytest.skip("PVM does not take SYSCALL from ring 3 to ring 0 as a processor does")
    registers, memory = run(accel, "system-calls", "long")
    syscall, sysenter, leave, no_sce, no_cs = records(memory, registers["r15"], "<10Q")
    # RCX, R11, RSP, CS, SS, RFLAGS: RIP behind it, the flags, and those of FMASK cleared.
    r11, after = struct.unpack_from("<Q", memory, LOG - 8)[0], syscall[1]
    assert syscall == (0x100, after, CF | FIXED, USER_STACK, 0x08, 0x10, FIXED, 0, 0, 0)
    assert memory[after - 2 : after] == b"\x0f\x05"
    assert r11 == CF | FIXED  # SYSRET has brought them back
    assert sysenter[0] == 0x101
    assert (sysenter[3:6], sysenter[6] & IF) == ((0xE000, 0x08, 0x10), 0)
    assert struct.unpack_from("<Q", memory, LOG - 16)[0] == USER_STACK - 64  # RCX at SYSEXIT
    assert (leave[0], leave[3], leave[7]) == (PF, USER, LEAVE)
    assert (no_sce[:3], no_cs[:3]) == ((UD, 0, 0), (GP, 0, 0))


def test_exceptions_in_protected_mode(accel):
    if accel == "kvm" and PVM:
        pytest.skip("PVM does not emulate a 32-bit IRET")
    _, memory = run(accel, "exceptions-protected", "protected")
    end = struct.unpack_from("<I", memory, LOG - 4)[0]
    log = records(memory, end, "<8I")
    ring_0, ring_3 = (0x08, 0, 0), (0x1B, 0xB000, 0x23)

    def record(vector, error, ring, cr2=0):
        return vector, error, 0, ring[0], *ring[1:], cr2

    assert [(*r[:4], *r[5:]) for r in log] == [
        record(DE, 0, ring_0),
        record(UD, 0, ring_0),
        record(GP, 0x1230, ring_0),
        record(NP, 0x30, ring_0),
        record(SS, 0x30, ring_0),
        record(PF, 0, ring_0, 0x80005),
        record(PF, 3, ring_0, 0x81006),
        record(DB, 0, ring_0),
        record(DF, 0, ring_0),
        record(GP, 0, ring_3),
        record(PF, 7, ring_3, 0x82007),
        record(UD, 0, ring_3),
        record(GP, 0, ring_3),
    ]
    assert [r[4] & TF for r in log[6:9]] == [0, TF, 0]


def test_exceptions_in_real_mode(accel):
    if accel == "kvm" and PVM:
        pytest.skip("PVM does not emulate UD2 in real mode")
    registers, memory = run(accel, "exceptions-real", "real")
    log = records(memory, LOG + registers["rdi"], "<5H")
    assert [r[:3] for r in log] == [(v, 0, 0) for v in (DE, UD, 0x80, BP, OF, BR, DB)]
    assert [r[3] & IF for r in log] == [0, 0, IF, IF, 0, 0, 0]
    assert [r[3] & TF for r in log] == [0, 0, 0, 0, 0, 0, TF]
    assert [r[4] & (IF | TF) for r in log] == [0] * 7  # in the handler


def test_interrupts():
    """Behind the shadow of STI, by priority, from timers, NMIs, and to a second vCPU."""
    registers, memory = run("soft", "interrupts", "long", machine="microvm", smp=2)
    log = records(memory, registers["r15"], "<4Q")
    assert [(r[0], r[1]) for r in log] == [
        (vector, 0)
        for vector in (
            *(0x40, 0x41, 0x42),  # behind STI and one instruction, but not before CLI; behind POPF
            *(0x73, 0x53, 0x43),  # three at once
            *(0x65, 0x55),  # above the task priority; the other one once that is lower
            *(0x50, 0x51, 0x51, 0x51),  # the timer, once and periodic, out of HLT
            *(NMI, NMI),
            *(0x20, 0x60),  # the PIT through the PIC, and through the I/O APIC
        )
    ]
    assert [r[3] for r in log[:3]] == [0, 1, 1]  # the second waited for its window
    assert [r[3] for r in log[6:8]] == [1, 2]  # and 0x55 for a lower task priority
    assert not any(r[2] & IF for r in log[12:14])  # IF is nothing to an NMI
    assert log[13][3] & 0x1000  # nor does one come before the IRET of another
    assert registers["rbx"] == 0xA1  # said the second vCPU
