"""Exceptions, interrupts and system calls arrive as the manuals say (Intel SDM vol. 3, 6).

What is expected was written down from there. Each guest's source says what its log holds.
"""

import struct
from pathlib import Path

import pytest

from guests import FOLDER, GUESTS
from vmexit import Machine, StopReason

pytestmark = pytest.mark.engine

DE, DB, NMI, BP, OF, BR, UD, DF, NP, SS, GP, PF = 0, 1, 2, 3, 4, 5, 6, 8, 11, 12, 13, 14

CF, FIXED, AF, SF, TF, IF, OVERFLOW = 1 << 0, 1 << 1, 1 << 4, 1 << 7, 1 << 8, 1 << 9, 1 << 11
IOPL_3, NT, VM = 3 << 12, 1 << 14, 1 << 17
# The software CPU does not set RF in what it pushes, nor EXT in an error code (SDM vol. 3, 6.13).
RF, EXT = 1 << 16, 1 << 0

LOG = 0x20000
# In 64-bit mode, from ring 0 or without an IST; the rest as in exceptions-long.inc.
KERNEL, KERNEL_DATA, USER32, USER_DATA, USER = 0x08, 0x10, 0x1B, 0x23, 0x2B
STACK, RSP0, IST1, IST2, USER_STACK = 0x9000, 0xA000, 0xB000, 0xC000, 0xD000
ABSENT_PAGE, LEAVE, NOT_CANONICAL = 0x80_0000_0000, 0x80_0000_1000, 0x8000_0000_0000
# In protected mode; the rest as in exceptions-protected.inc.
USER_STACK_32 = 0xB000

PVM = Path("/sys/module/kvm_pvm").exists()
CPU = Path("/proc/cpuinfo").read_text()
AMD = "AuthenticAMD" in CPU
# The processor below this KVM is QEMU's, which has some of the engine's errors, not mended.
TCG = "QEMU TCG CPU" in CPU


def lacks(accel: str, missing: bool, what: str) -> None:
    if accel == "kvm" and missing:
        pytest.skip(what)


def run(accel: str, name: str, ends=StopReason.HALT, **more):
    machine = Machine("64M", accel, image=FOLDER / f"{name}.bin", mode=GUESTS[name], **more)
    with machine as vm:
        stop = vm.run(timeout=30)
        if accel == "kvm" and stop.reason is StopReason.INTERNAL_ERROR:
            pytest.skip(f"this KVM cannot run it: {stop.detail}")
        assert stop.reason is ends, stop
        return vm.vcpus[0].regs.as_dict(), bytes(vm.memory[0:0x40000])


def records(memory: bytes, end: int, form: str) -> list[tuple[int, ...]]:
    return list(struct.iter_unpack(form, memory[LOG:end]))


def word(memory: bytes, before: int, form: str) -> int:
    """What a guest has left in front of its log."""
    return struct.unpack_from(form, memory, LOG - before)[0]


def long_log(accel: str, name: str) -> list[tuple[int, ...]]:
    """Vector, error code, RIP as expected or not, CS, RFLAGS without RF, RSP, SS, CR2, frame.

    And RFLAGS of the handler.
    """
    registers, memory = run(accel, name)
    log = records(memory, registers["r15"], "<10Q")
    if accel == "kvm" and TCG:  # makes error codes for gates from twice the vector
        log = [(r[0], r[1] >> 4 << 3 | 2 if r[1] & 2 and r[0] != PF else r[1], *r[2:]) for r in log]
    return [(*r[:4], r[4] & ~RF, *r[5:]) for r in log]


def without_flags(log: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [(*r[:4], *r[5:-1]) for r in log]


def in_handler(log: list[tuple[int, ...]], flags: int) -> list[int]:
    return [r[-1] & flags for r in log]


def in_ring_0(vector, error=0, *, cr2=0, stack=STACK, rsp=STACK):
    """A record of 64-bit mode, without RFLAGS; `stack` is where the frame goes, aligned."""
    return vector, error, 0, KERNEL, rsp, KERNEL_DATA, cr2, (stack & ~0xF) - 40


def in_ring_3(vector, error=0, *, cr2=0, stack=RSP0, cs=USER):
    return vector, error, 0, cs, USER_STACK, USER_DATA, cr2, stack - 40


def left_ring_3(record) -> bool:
    """Whether it is the last one of a guest's ring 3: a page fault that the guest makes."""
    return record[:2] == (PF, 4) and record[3] == USER and record[7] == LEAVE


def test_exceptions_in_64_bit_mode(accel):
    log = long_log(accel, "exceptions-long")
    assert without_flags(log[:-1]) == [
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
        in_ring_0(DF, stack=IST2),  # no gate for #NP
        in_ring_0(DF, stack=IST2, rsp=NOT_CANONICAL + 0x800),  # no stack
        in_ring_0(DF, stack=IST2),  # nor one for #PF
        in_ring_3(GP),
        in_ring_3(UD),
        in_ring_3(PF, 5, cr2=0x200040, stack=IST1),
        in_ring_3(PF, 7, cr2=0x200040, stack=IST1),
        in_ring_3(PF, 6, cr2=ABSENT_PAGE + 0x456, stack=IST1),
    ]
    assert left_ring_3(log[-1])
    flags = [r[4] for r in log]
    assert [f & CF for f in flags[2:4]] == [CF, 0]
    assert [f & TF for f in flags[10:13]] == [0, TF, 0]
    assert not any(in_handler(log, IF | TF | NT | RF))


def test_exceptions_that_make_others_in_64_bit_mode(accel):
    lacks(accel, PVM, "PVM makes #DF of each exception that it cannot deliver")
    lacks(accel, TCG, "QEMU's TCG, below this KVM, makes #NP of #PF without a gate")
    log = long_log(accel, "nested-exceptions")
    top = ABSENT_PAGE + 0x800
    cr2 = [r[7] for r in log]
    assert [(*r[:4], *r[5:7], r[8]) for r in log] == [
        (*r[:-2], r[-1])
        for r in (
            in_ring_0(NP, 6 * 8 + 2 + (log[0][1] & EXT)),  # no gate for #UD
            in_ring_0(PF, 2, stack=IST1, rsp=top),  # no stack for #DE
            in_ring_0(DF, stack=IST2),  # no gate for #PF: not #NP
            in_ring_0(NP, 0x82 * 8 + 2),  # no gate for INT, which is not external
            in_ring_0(PF, 2, stack=IST1, rsp=top),  # no stack for INT
            in_ring_0(PF, 2, stack=IST1, rsp=top),  # nor for INT3
        )
    ]
    # A processor need not begin with any particular word of the frame.
    assert all(top - 40 <= cr2[i] < top for i in (1, 4, 5))


def test_a_double_fault_has_a_handler_and_the_next_one_ends_it(accel):
    registers, memory = run(accel, "double-fault", StopReason.SHUTDOWN)
    assert struct.unpack_from("<4I", memory, LOG) == (0, 0, 0x08, STACK - 16)
    if accel == "soft" or not AMD:  # AMD's KVM has reset the vCPU
        assert memory[registers["rip"] :][:2] == b"\x0f\x0b"


def test_a_triple_fault_names_its_exceptions_and_the_int_that_began_them():
    with Machine("4M", "soft", mode="protected") as vm:
        vm.load_bytes(b"\x90\xcd\x80", at=0x1000, entry=0x1000)
        stop = vm.run(timeout=20)
    assert stop.reason is StopReason.SHUTDOWN
    assert "interrupt 0x80, #GP (error code 0x402), #DF at rip 0x1001: `int 0x80`" in stop.detail


def test_software_interrupts_in_64_bit_mode(accel):
    log = long_log(accel, "software-interrupts")
    ring_0, ring_3 = (0, KERNEL, STACK, STACK - 40), (0, USER, USER_STACK, RSP0 - 40)
    # RIP is behind the instruction, but at it for a fault.
    assert [(*r[:4], r[5], r[8]) for r in log[:-1]] == [
        (BP, 0, *ring_0),
        (0x80, 0, *ring_0),
        (0x81, 0, *ring_0),
        (GP, 0x90 * 8 + 2, *ring_0),  # beyond the IDT
        (GP, 2 * 8 + 2, *ring_0),  # an empty gate
        (BP, 0, *ring_3),
        (0x80, 0, *ring_3),
        (GP, 0x81 * 8 + 2, *ring_3),  # a gate for ring 0
    ]
    assert left_ring_3(log[-1])
    assert [r[4] & IF for r in log[:3]] == [0, IF, IF]
    assert in_handler(log, IF)[:3] == [0, 0, IF]  # only an interrupt gate clears it


def test_int1(accel):
    lacks(accel, TCG, "QEMU's TCG, below this KVM, has no INT1")
    log = long_log(accel, "int1")
    assert without_flags(log[:-1]) == [in_ring_0(DB), in_ring_3(DB)]
    assert left_ring_3(log[-1])
    assert [r[4] & TF for r in log] == [0, 0, 0]


def test_exceptions_in_compatibility_mode(accel):
    lacks(accel, PVM, "PVM emulates 32-bit code of ring 3, without INT and INTO")
    log = long_log(accel, "compatibility")
    assert without_flags(log[:-1]) == [
        in_ring_3(UD, cs=USER32),
        in_ring_3(0x80, cs=USER32),
        in_ring_3(GP, 0x81 * 8 + 2, cs=USER32),
        in_ring_3(OF, cs=USER32),
        in_ring_3(PF, 7, cr2=0x200040, stack=IST1, cs=USER32),
    ]
    assert left_ring_3(log[-1])
    assert log[3][4] & OVERFLOW


NO_SYSTEM_CALLS = "PVM does not take system calls from ring 3 to ring 0 as a processor does"


def test_syscall(accel):
    lacks(accel, PVM, NO_SYSTEM_CALLS)
    registers, memory = run(accel, "system-calls")
    syscall, leave, no_sce, no_sce_either = records(memory, registers["r15"], "<10Q")
    # RCX, R11, RSP, CS, SS, RFLAGS: RIP behind it, the flags, and those of FMASK cleared.
    after, kept = syscall[1], OVERFLOW | SF | AF | FIXED
    entered = FIXED if accel == "kvm" and TCG else kept  # QEMU's SYSCALL clears them all
    assert syscall == (0x100, after, CF | kept, USER_STACK, KERNEL, 0x10, entered, 0, 0, 0)
    assert memory[after - 2 : after] == b"\x0f\x05"
    assert word(memory, 8, "<Q") == CF | kept  # R11 and
    assert word(memory, 16, "<Q") == CF | kept  # the flags that SYSRET has brought back
    assert word(memory, 24, "<Q") == USER_STACK
    assert (word(memory, 32, "<H"), word(memory, 28, "<H")) == (USER, USER_DATA)
    assert left_ring_3(leave)
    # Ring 0 goes on as the handler of the page fault, for which SS is null (SDM vol. 3, 6.14.2).
    for record in (no_sce, no_sce_either):
        assert (*record[:4], record[6]) == (UD, 0, 0, KERNEL, 0)


def test_syscall_in_compatibility_mode(accel):
    lacks(accel, PVM, NO_SYSTEM_CALLS)
    lacks(accel, not AMD, "Intel processors have no SYSCALL in compatibility mode")
    registers, memory = run(accel, "syscall-32")
    syscall, leave = records(memory, registers["r15"], "<10Q")
    after = syscall[1]
    assert syscall == (0x100, after, CF | FIXED, USER_STACK, KERNEL, 0x10, FIXED, 0, 0, 0)
    assert memory[after - 2 : after] == b"\x0f\x05"
    assert (word(memory, 4, "<H"), word(memory, 2, "<H")) == (USER32, USER_DATA)
    assert word(memory, 8, "<I") == CF | FIXED
    assert left_ring_3(leave)


def test_sysenter(accel):
    lacks(accel, PVM, NO_SYSTEM_CALLS)
    lacks(accel, AMD, "AMD processors have no SYSENTER in long mode")
    registers, memory = run(accel, "sysenter")
    from_64, from_32, leave, *no_cs = records(memory, registers["r15"], "<10Q")
    for record, mark, rsp, carry in (
        (from_64, 64, USER_STACK - 64, CF),
        (from_32, 32, USER_STACK - 128, 0),
    ):
        assert (record[0], record[1]) == (mark, rsp)  # RCX is as it was: SYSEXIT takes RSP from it
        assert record[3:6] == (0xE000, KERNEL, 0x10)
        assert record[6] & (CF | FIXED | IF) == carry | FIXED
    # CS and SS are those of the MSR and 32, 40, or 16, 24 (SDM vol. 2, SYSEXIT).
    assert struct.unpack_from("<IHH", memory, LOG - 8) == (USER_STACK - 64, 0x2B, 0x33)
    assert struct.unpack_from("<IHH", memory, LOG - 16) == (USER_STACK - 128, 0x1B, 0x23)
    assert left_ring_3(leave)
    assert [r[:4] for r in no_cs] == [(GP, 0, 0, KERNEL)] * 2


NO_PAGING = "PVM makes #GP of turning on 32-bit paging, and does not emulate a 32-bit IRET"


def protected_log(accel: str, name: str) -> tuple[list[tuple[int, ...]], bytes]:
    """Vector, error code, EIP as expected or not, CS, EFLAGS without RF, ESP, SS, CR2, frame, DS.

    And EFLAGS of the handler.
    """
    lacks(accel, PVM, NO_PAGING)
    _, memory = run(accel, name)
    log = records(memory, word(memory, 4, "<I"), "<11I")
    return [(*r[:4], r[4] & ~RF, *r[5:]) for r in log], memory


def kernel_32(vector, error=0, *, cr2=0):
    """A record without EFLAGS: three words, and no ESP, SS."""
    return vector, error, 0, 0x08, 0, 0, cr2, STACK - 12, 0x10


def user_32(vector, error=0, *, cr2=0):
    """From ring 3: five words on the stack of the TSS."""
    return vector, error, 0, 0x1B, USER_STACK_32, 0x23, cr2, RSP0 - 20, 0x23


def virtual_8086(vector, error=0):
    """Nine words; the data segments are null."""
    return vector, error, 0, 0x100, 0x800, 0xB00, 0, RSP0 - 36, 0


def test_exceptions_in_protected_mode(accel):
    log, _ = protected_log(accel, "exceptions-protected")
    assert without_flags(log) == [
        kernel_32(DE),
        kernel_32(UD),
        kernel_32(GP, 0x1230),
        kernel_32(NP, 0x30),
        kernel_32(SS, 0x30),
        kernel_32(PF, 0, cr2=0x80005),
        kernel_32(PF, 3, cr2=0x81006),
        kernel_32(DB),
        kernel_32(DB),  # not between MOV SS or POP SS and the instruction behind it
        kernel_32(DB),
        kernel_32(DF),
        user_32(GP),
        user_32(PF, 5, cr2=0x82007),
        user_32(PF, 7, cr2=0x82007),
        user_32(PF, 4, cr2=0x80000),
        user_32(UD),
        user_32(GP),
    ]
    assert [r[4] & TF for r in log[6:11]] == [0, TF, TF, TF, 0]
    assert not any(in_handler(log, IF | TF | NT | VM | RF))


def test_sysenter_in_protected_mode(accel):
    log, memory = protected_log(accel, "sysenter-protected")
    esp, cs, ss, flags = struct.unpack_from("<4I", memory, LOG - 64)
    assert (esp, cs & 0xFFFF, ss & 0xFFFF) == (0xE000, 0x08, 0x10)
    assert flags & (CF | FIXED | IF) == CF | FIXED
    esp, cs, ss = struct.unpack_from("<3I", memory, LOG - 32)
    assert (esp, cs & 0xFFFF, ss & 0xFFFF) == (USER_STACK_32 - 64, 0x1B, 0x23)
    from_ring_3, no_cs = log
    assert (*from_ring_3[:4], from_ring_3[5]) == (GP, 0, 0, 0x1B, USER_STACK_32 - 64)
    assert no_cs[:4] == (GP, 0, 0, 0x08)


def test_gates_in_protected_mode(accel):
    log, memory = protected_log(accel, "gates-protected")
    assert without_flags(log) == [
        kernel_32(BP),
        kernel_32(OF),
        kernel_32(0x80),
        kernel_32(0x81),
        kernel_32(0x82),  # the guest has moved the frame of 6 bytes down by as many
        kernel_32(0x83, 0x08 + 0x30),  # CS in the handler, for want of an error code: ring 0
        kernel_32(GP, 0x90 * 8 + 2),
        kernel_32(GP, 0x0F * 8 + 2),
        kernel_32(NP, 0x84 * 8 + 2),
        user_32(BP),
        user_32(0x80),
        # A conforming segment is run in ring 3, and on its stack.
        (0x83, 0x38 + 3, 0, 0x1B, 0, 0, 0, USER_STACK_32 - 12, 0x23),
        user_32(GP, 0x81 * 8 + 2),
        user_32(GP, PF * 8 + 2),
        user_32(GP),
        virtual_8086(GP),
        virtual_8086(0x80),
        virtual_8086(UD),
    ]
    assert [r[4] for r in log[2:5]] == [IF | FIXED] * 3
    assert in_handler(log, IF | VM) == [*[0] * 3, IF, *[0] * 14]  # only a trap gate leaves IF
    assert word(memory, 8, "<I") == IF | FIXED  # behind IRET
    assert [r[4] for r in log[-3:]] == [VM | FIXED, *[VM | IOPL_3 | FIXED] * 2]
    # SS, ES, DS, FS and GS of virtual-8086 mode.
    assert struct.unpack_from("<5I", memory, RSP0 - 20) == (0xB00, 0x111, 0x222, 0x333, 0x444)


def test_a_double_fault_switches_to_a_task(accel):
    lacks(accel, PVM, NO_PAGING)
    lacks(accel, TCG, "KVM on QEMU's TCG injects the page fault into the new task once more")
    _, memory = run(accel, "task-gate")
    log = struct.unpack_from("<10I", memory, LOG)
    assert log[:3] == (0, 0, 0x08) and not log[3] & NT
    assert log[4:8] == (0x80800, 0x10, 0x28, 0x40)  # ESP and SS then; the link; TR now
    assert log[8] & NT and log[9] == 1 << 3  # CR0.TS
    # Back in the first task.
    assert (word(memory, 8, "<I"), word(memory, 12, "<H")) == (0x1234, 0x28)
    assert 0x80800 - 12 <= word(memory, 16, "<I") < 0x80800  # CR2


def test_exceptions_in_real_mode(accel):
    registers, memory = run(accel, "exceptions-real")
    log = records(memory, LOG + registers["rdi"], "<5H")
    assert [r[:3] for r in log] == [(v, 0, 0) for v in (DE, UD, 0x80, BP, OF, BR, DB)]
    assert [r[3] & IF for r in log] == [0, 0, IF, IF, 0, 0, 0]
    assert [r[3] & TF for r in log] == [0, 0, 0, 0, 0, 0, TF]
    assert [r[4] & (IF | TF) for r in log] == [0] * 7  # in the handler
    before, restored = log[2][3], struct.unpack_from("<H", memory, 0x7000)[0]
    assert before == restored == 0xAD7  # the handler has changed many of them


def interrupts_log(name: str, serial: str = "null", smp: int = 1):
    """Vector, RIP as expected or not, RFLAGS, the guest's R11; and the registers in the end."""
    registers, memory = run("soft", name, machine="microvm", smp=smp, serial=serial)
    return records(memory, registers["r15"], "<4Q"), registers, memory


def test_interrupts_come_when_they_may_and_in_their_order():
    log, _, _ = interrupts_log("interrupts")
    # A spurious one is possible where the task priority is raised over one that is pending.
    log = [r for r in log if r[0] != 0xFF]
    expected = [
        (0x40, 0),  # behind STI and one instruction
        (0x41, 1),  # not between STI and CLI
        (0x42, 1),  # at once behind POPF
        (0x73, 1),  # three at once
        (0x53, 1),
        (0x43, 1),
        (0x65, 1),  # above the task priority
        (0x55, 2),  # once that is lower
        (0x56, 3),  # likewise, and it had been pending before it was raised
        (0x63, 3),
        (0x70, 4),  # in the handler of 0x63
        (0x64, 5),  # behind its EOI
        (0x33, 5),
        (NMI, 7),
        (NMI, 8),  # behind the IRET of the first
    ]
    assert [(r[0], r[3]) for r in log[:15]] == expected
    assert [r[1] for r in log[:15]] == [0] * 15
    assert [r[2] & IF for r in log[:15]] == [IF] * 13 + [0, 0]
    timer = log[15:]
    assert len(timer) >= 48 and {r[0] for r in timer} == {0x80}
    assert all(r[1] != 0 for r in timer)  # not between MOV SS and what is behind it


def test_interrupts_from_timers_and_lines(tmp_path):
    log, registers, _ = interrupts_log("interrupt-sources", f"file:{tmp_path / 'serial'}")
    assert [(r[0], r[1], r[3]) for r in log] == [
        (0x50, 0, 0),  # the timer, once
        (0x51, 0, 0),  # and periodic, out of HLT
        (0x51, 0, 0),
        (0x51, 0, 0),
        (0x20, 0, 0),  # the PIT through the PIC
        (0x60, 0, 1),  # and through the I/O APIC; none while that was masked
        (0x61, 0, 2),  # a level, once unmasked
        (0x61, 0, 3),  # and again
    ]
    assert all(r[2] & IF for r in log)
    assert registers["r14"] == 0  # the count of the timer, when it had fired


def test_a_second_processor_is_started_once_and_answers():
    log, registers, _ = interrupts_log("processors", smp=2)
    assert [r[:2] for r in log] == [(0x62, 0), (0x66, 0)]
    assert (registers["rbx"], registers["rax"]) == (0, 1 << 24)  # each one's own LAPIC id
    assert registers["r14"] == 1  # neither a SIPI before INIT nor one to a running vCPU counts


@pytest.mark.kvm
@pytest.mark.parametrize(
    "name", ["exceptions-long", "exceptions-protected", "gates-protected", "software-interrupts"]
)
def test_both_accelerators_log_the_same(name):
    """What the tests above do not look at: each flag, say, and unused words."""
    if name.endswith("-protected"):
        lacks("kvm", PVM, NO_PAGING)
        kvm, soft = (protected_log(accel, name)[0] for accel in ("kvm", "soft"))
    else:
        kvm, soft = (long_log(accel, name) for accel in ("kvm", "soft"))
    assert soft == kvm
