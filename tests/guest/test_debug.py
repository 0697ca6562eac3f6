"""Breakpoints, watchpoints and steps, on both accelerators."""

import pytest

from vmexit import ConfigError, HostError, Machine, Point, PointKind, StopReason, Way
from vmexit.accel.base import ExitReason
from vmexit.accel.kvm import probe
from vmexit.boot.entry import Linked

TIMEOUT = 30

# 16-bit: xor ax, ax; 2: inc ax; 3: mov [0x3000], ax; 6: mov bx, [0x3000]; a: out 0x10, al;
# c: cmp ax, 1000; f: jb 2; 11: hlt
COUNTER = bytes.fromhex("31c0 40 a30030 8b1e0030 e610 3de803 72f1 f4")
START = 0x1000


@pytest.fixture
def vm(accel):
    with Machine(memory="1M", accel=accel) as machine:
        machine.load_bytes(COUNTER, at=START)
        machine.on_pio(0x10, write=lambda access: None)
        yield machine


def rip(vm):
    registers = vm.vcpus[0].regs
    return registers.cs.base + registers.rip


def test_a_breakpoint_stops_before_the_instruction_each_time(vm):
    vm.add_breakpoint(Point(START + 6))
    for n in range(1, 4):
        stop = vm.run(TIMEOUT)
        assert (stop.reason, stop.point) == (StopReason.DEBUG, Point(START + 6))
        assert (rip(vm), vm.vcpus[0].regs.rax, vm.memory.read_u16(0x3000)) == (START + 6, n, n)
        assert vm.vcpus[0].regs.rbx == n - 1
    vm.remove_breakpoint(Point(START + 6))
    assert vm.run(TIMEOUT).reason is StopReason.HALT
    assert vm.vcpus[0].regs.rbx == 1000


def test_more_breakpoints_than_the_processor_has(vm):
    """Where INT3 is of no use, four are debug registers, and the rest is looked for by stepping."""
    places = (2, 3, 6, 0xA, 0xC, 0xF)
    for place in places:
        vm.add_breakpoint(Point(START + place))
    for place in places * 2:
        assert vm.run(TIMEOUT).point == Point(START + place)
        assert rip(vm) == START + place
    ways = set(vm.breakpoints.values())
    kvm = {Way.HARDWARE, Way.STEPPING}, {Way.SOFTWARE}, {Way.PORT, Way.STEPPING}
    assert ways in ([{Way.ENGINE}] if vm.accel == "soft" else kvm)
    assert bytes(vm.memory[START : START + len(COUNTER)]) == COUNTER


@pytest.fixture
def as_in_the_lab(monkeypatch):
    """KVM on an emulated processor, which tells nobody of INT3 and debug registers."""
    monkeypatch.setattr(probe, "int3_exits", lambda system: False)
    monkeypatch.setattr(probe, "breaks_by_register", lambda system: False)


@pytest.mark.kvm
def test_where_kvm_is_told_of_nothing_an_out_does_it(as_in_the_lab):
    with Machine(memory="1M", accel="kvm") as vm:
        vm.load_bytes(COUNTER, at=START)
        vm.on_pio(0x10, write=lambda access: None)
        seen = []
        vm.on_pio(0xEF, write=lambda access: seen.append(access.value))
        places = (2, 3, 6, 0xA, 0xC, 0xF)  # at 2 there is no room for one
        for place in places:
            vm.add_breakpoint(Point(START + place))
        for place in places * 2:
            assert vm.run(TIMEOUT).point == Point(START + place)
            assert rip(vm) == START + place
        assert vm.breakpoints == {
            Point(START + place): Way.STEPPING if place == 2 else Way.PORT for place in places
        }
        assert bytes(vm.memory[START : START + len(COUNTER)]) == COUNTER
        for place in places:
            vm.remove_breakpoint(Point(START + place))
        # The guest's own access to that port is its own: out 0xef, al; nop; jmp $
        vm.load_bytes(bytes.fromhex("e6ef 90 ebfe"), at=START)
        vm.vcpus[0].regs.rip = 0
        vm.vcpus[0].regs.rax = 5
        vm.add_breakpoint(Point(START + 3))
        assert vm.run(TIMEOUT).point == Point(START + 3)
        assert seen == [5]
        assert vm.breakpoints == {Point(START + 3): Way.PORT}


@pytest.mark.kvm
def test_an_out_covers_no_more_than_one_instruction(as_in_the_lab):
    """It has two bytes, and the guest may go to the second one without the first."""
    with Machine(memory="1M", accel="kvm") as vm:
        # jmp 3; 2: nop; 3: inc bx; 4: cmp bx, 3; 7: jne 3; 9: hlt
        vm.load_bytes(bytes.fromhex("eb01 90 43 83fb03 75fa f4"), at=START)
        vm.add_breakpoint(Point(START + 2))
        vm.add_breakpoint(Point(START + 9))
        stop = vm.run(TIMEOUT)
        assert (stop.point, vm.vcpus[0].regs.rbx) == (Point(START + 9), 3)
        assert set(vm.breakpoints.values()) == {Way.STEPPING}


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("mode", "code", "way"),
    [
        ("real", "48 90", Way.STEPPING),  # dec ax; nop
        ("protected", "48 90", Way.STEPPING),
        ("long", "48 90", Way.PORT),  # one instruction with a REX prefix
        ("long", "55 90", Way.STEPPING),  # push rbp
    ],
)
def test_how_long_an_instruction_is_depends_on_the_mode(as_in_the_lab, mode, code, way):
    with Machine(memory="4M", accel="kvm") as vm:
        vm.load_bytes(bytes.fromhex(code), at=START, mode=mode)
        vm.memory.write(2 * START - 1, b"\xeb")  # a jump that ends on the next page
        last = Point(2 * START - 1)
        debugger, point = vm._parts.vm.debugger, Point(START)
        assert debugger.arm([point, last]) == {point: way, last: Way.STEPPING}
        debugger.disarm()


def test_steps_stop_behind_each_instruction_once(vm):
    seen = []
    for _ in range(8):
        stop = vm.step(timeout=TIMEOUT)
        assert (stop.reason, stop.point) == (StopReason.DEBUG, None)
        seen.append(rip(vm) - START)
    assert seen == [2, 3, 6, 0xA, 0xC, 0xF, 2, 3]


# 16-bit: mov al, 1; 2: out 0x10, al; 4: hlt; 5: inc ax; 6: out 0x10, al; 8: hlt
TWO_HALTS = bytes.fromhex("b001 e610 f4 40 e610 f4")


@pytest.fixture
def halting(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(TWO_HALTS, at=START)
        vm.on_pio(0x10, write=lambda access: None)
        yield vm


def test_a_step_over_hlt_is_a_halt(halting):
    for place, reason in ((2, StopReason.DEBUG), (4, StopReason.DEBUG), (5, StopReason.HALT)):
        assert halting.step(timeout=TIMEOUT).reason is reason
        assert rip(halting) == START + place
    assert halting.step(timeout=TIMEOUT).reason is StopReason.DEBUG
    assert halting.run(TIMEOUT).reason is StopReason.HALT
    assert (rip(halting), halting.vcpus[0].regs.rax) == (START + 9, 2)


def test_a_guest_halts_while_breakpoints_are_looked_for_by_stepping(halting):
    for place in range(5):  # one more than there are debug registers
        halting.add_breakpoint(Point(2 * START + place))
    for place in (5, 9):
        assert halting.run(TIMEOUT).reason is StopReason.HALT
        assert rip(halting) == START + place


def test_a_breakpoint_at_a_hlt(halting):
    halting.add_breakpoint(Point(START + 4))
    assert halting.run(TIMEOUT).point == Point(START + 4)
    for place in (5, 9):
        assert halting.run(TIMEOUT).reason is StopReason.HALT
        assert rip(halting) == START + place


def test_a_step_with_an_access_makes_it_once(accel):
    with Machine(memory="1M", accel=accel) as vm:
        # mov al, 7; out 0x10, al; in al, 0x11; mov dx, 0x12; mov cx, 3; rep outsb; hlt
        vm.load_bytes(bytes.fromhex("b007 e610 e411 ba1200 b90300 f36e f4"), at=START)
        seen = []
        vm.on_pio(0x10, write=lambda access: seen.append(access.value))
        vm.on_pio(0x11, read=lambda access: seen.append("in") or 0x55)
        vm.on_pio(0x12, write=lambda access: seen.append("outs"))
        for place in (2, 4, 6, 9, 0xC):
            assert vm.step(timeout=TIMEOUT).reason is StopReason.DEBUG
            assert rip(vm) == START + place
        assert seen == [7, "in"]
        assert vm.vcpus[0].regs.rax == 0x55
        while rip(vm) == START + 0xC:
            vm.step(timeout=TIMEOUT)
        assert seen == [7, "in", "outs", "outs", "outs"]


def test_watchpoints_stop_behind_the_access(vm):
    """Not on each KVM: one that emulates ring 0 knows no data breakpoints, and says so."""
    write = Point(0x3000, PointKind.WRITE, 2)
    try:
        vm.add_breakpoint(write)
    except HostError as error:
        assert vm.accel == "kvm" and "does not watch" in str(error)
        assert not vm.breakpoints
        pytest.skip(str(error))
    for n in (1, 2):
        stop = vm.run(TIMEOUT)
        assert (stop.reason, stop.point, rip(vm)) == (StopReason.DEBUG, write, START + 6)
        assert vm.memory.read_u16(0x3000) == n
    vm.remove_breakpoint(write)
    access = Point(0x3001, PointKind.ACCESS)  # the second byte of both
    vm.add_breakpoint(access)
    assert (vm.run(TIMEOUT).point, rip(vm)) == (access, START + 0xA)
    assert (vm.run(TIMEOUT).point, rip(vm)) == (access, START + 6)
    vm.remove_breakpoint(access)
    for beside in (Point(0x2FFF, PointKind.ACCESS), Point(0x3002, PointKind.ACCESS, 8)):
        vm.add_breakpoint(beside)
    assert vm.run(TIMEOUT).reason is StopReason.HALT


def test_a_breakpoint_behind_a_watched_access_comes_second(vm):
    write, behind = Point(0x3000, PointKind.WRITE, 2), Point(START + 6)
    try:
        vm.add_breakpoint(write)
    except HostError as error:
        assert vm.accel == "kvm"
        pytest.skip(str(error))
    vm.add_breakpoint(behind)
    for n in (1, 2):
        for point in (write, behind):
            assert (vm.run(TIMEOUT).point, rip(vm)) == (point, START + 6)
            assert vm.memory.read_u16(0x3000) == n
    vm.remove_breakpoint(behind)
    assert vm.run(TIMEOUT).point == write
    assert vm.memory.read_u16(0x3000) == 3


def test_a_breakpoint_where_nothing_is_mapped_waits(accel):
    """It is a linear address, and need not have memory behind it when it is set."""
    with Machine(memory="2M", accel=accel) as vm:
        vm.load_bytes(COUNTER, at=START)
        vm.on_pio(0x10, write=lambda access: None)
        vm.add_breakpoint(Point(0xFFFF_FFFF_8100_0000))
        assert vm.run(TIMEOUT).reason is StopReason.HALT


HIGH = 0xFFFF_FFFF_8100_0000  # where kernels are linked; its lower half is no RAM here


def test_an_address_above_4_gib_is_nowhere_outside_long_mode(vm):
    """And not at what its lower half is the address of."""
    vm.add_breakpoint(Point((1 << 32) + START + 6))
    assert vm.run(TIMEOUT).reason is StopReason.HALT
    assert vm.vcpus[0].regs.rbx == 1000


@pytest.mark.kvm
@pytest.mark.parametrize("high", [HIGH, (1 << 32) + START])
def test_code_that_is_not_mapped_yet_gets_its_out_where_it_lies(as_in_the_lab, high):
    """As a kernel before it has turned paging on."""
    with Machine(memory="1M", accel="kvm") as vm:
        vm.load_bytes(COUNTER, at=START)
        debugger, point = vm._parts.vm.debugger, Point(high + 6)
        assert debugger.arm([point], linked=lambda gva: gva - high + START) == {point: Way.PORT}
        assert bytes(vm.memory[START + 6 : START + 8]) != COUNTER[6:8]
        debugger.disarm()
        assert bytes(vm.memory[START : START + len(COUNTER)]) == COUNTER


ALIAS = 3 << 30  # where the same memory has other linear addresses


def check_aliases(accel):
    """A breakpoint is a linear address, though it may stand in memory that has two."""
    # 64-bit: inc ebx; 2: inc ecx; 4: cmp ebx, 3; 7: jne 0; hlt
    code = bytes.fromhex("ffc3 ffc1 83fb03 75f7 f4")
    for places, stops in (
        ([START], []),
        ([ALIAS + START], [ALIAS + START] * 3),
        ([ALIAS + START, START], [ALIAS + START] * 3),
        ([START, ALIAS + START], [ALIAS + START] * 3),
        ([START, ALIAS + START + 2], [ALIAS + START + 2] * 3),  # stepped on to
    ):
        with Machine(memory="4M", accel=accel) as vm:
            vm.load_bytes(code, at=START, mode="long")
            tables = vm.memory.read_u64(vm.vcpus[0].regs.cr3) & ~0xFFF
            vm.memory.write_u64(tables + 8 * (ALIAS >> 30), vm.memory.read_u64(tables))
            vm.vcpus[0].regs.rip = ALIAS + START
            for place in places:
                vm.add_breakpoint(Point(place))
            for place in stops:
                assert (vm.run(TIMEOUT).point, rip(vm)) == (Point(place), place)
            assert vm.run(TIMEOUT).reason is StopReason.HALT
            assert vm.vcpus[0].regs.rbx == vm.vcpus[0].regs.rcx == 3
            assert bytes(vm.memory[START : START + len(code)]) == code


def test_the_same_code_at_another_address_has_no_breakpoint(accel):
    check_aliases(accel)


@pytest.mark.kvm
def test_nor_has_it_where_an_out_does_it(as_in_the_lab):
    check_aliases("kvm")


@pytest.mark.kvm
def test_code_that_runs_before_it_is_mapped_has_no_breakpoint_there(as_in_the_lab):
    """As that of a kernel that is linked high and starts low."""
    with Machine(memory="1M", accel="kvm") as vm:
        vm.load_bytes(COUNTER, at=START)
        vm.on_pio(0x10, write=lambda access: None)
        vm._debug._linked = [Linked(HIGH, START, len(COUNTER))]
        point = Point(HIGH + 0xF)
        vm.add_breakpoint(point)
        assert vm.run(TIMEOUT).reason is StopReason.HALT
        assert vm.vcpus[0].regs.rbx == 1000
        assert vm.breakpoints == {point: Way.PORT}


def test_two_want_the_same_point(vm):
    for _ in range(2):
        vm.add_breakpoint(Point(START + 2))
    vm.remove_breakpoint(Point(START + 2))
    assert vm.run(TIMEOUT).point == Point(START + 2)
    vm.remove_breakpoint(Point(START + 2))
    assert vm.run(TIMEOUT).reason is StopReason.HALT


def test_the_guests_own_breakpoints_are_its_own():
    """Its INT3 works beside ours. On KVM that is Linux's to show: test_gdb_linux.py."""
    with Machine(memory="1M", accel="soft") as vm:
        # The vector of INT3 leads to 0x2000: mov cx, 1; iret.
        vm.memory.write(3 * 4, bytes.fromhex("00200000"))
        vm.memory.write(0x2000, bytes.fromhex("b90100 cf"))
        # int3; nop; hlt, below a stack
        vm.load_bytes(bytes.fromhex("bc0080 cc 90 f4"), at=START)
        vm.add_breakpoint(Point(START + 4))
        assert vm.run(TIMEOUT).point == Point(START + 4)
        assert vm.vcpus[0].regs.rcx == 1
        assert vm.run(TIMEOUT).reason is StopReason.HALT


def test_the_guest_steps_itself_beside_our_breakpoints(accel):
    """And is told so by DR6, as Intel SDM vol. 3, 18.2.3 has it."""
    with Machine(memory="1M", accel=accel) as vm:
        # #DB leads to 0x2000: mov eax, dr6; mov [0x3000], eax; inc word [0x3004];
        # mov bp, sp; and word [bp+4], ~TF; iret.
        vm.memory.write(1 * 4, bytes.fromhex("00200000"))
        vm.memory.write(0x2000, bytes.fromhex("0f21f0 66a30030 ff060430 89e5 816604fffe cf"))
        # mov sp, 0x8000; push 0x102; popf; nop; nop; hlt
        vm.load_bytes(bytes.fromhex("bc0080 680201 9d 90 90 f4"), at=START)
        vm.add_breakpoint(Point(START + 0x100))
        assert vm.run(TIMEOUT).reason is StopReason.HALT
        assert vm.memory.read_u16(0x3004) == 1
        assert vm.memory.read_u32(0x3000) >> 14 & 1


@pytest.mark.kvm
def test_a_debug_exception_that_kvm_reports_goes_on_to_the_guest_with_its_cause():
    """Processors tell KVM of the guest's own steps while it has our debug registers."""
    with Machine(memory="1M", accel="kvm") as vm:
        # #DB leads to 0x2000: mov eax, dr6; mov [0x3000], eax; hlt
        vm.memory.write(1 * 4, bytes.fromhex("00200000"))
        vm.memory.write(0x2000, bytes.fromhex("0f21f0 66a30030 f4"))
        vm.load_bytes(bytes.fromhex("bc0080 90 90 f4"), at=START)
        debugger, (vcpu,) = vm._parts.vm.debugger, vm._parts.vcpus
        debugger.arm([Point(START + 0x100)])
        assert vcpu.on_debug(1, START + 3, 1 << 14) is None
        assert vcpu.run().reason is ExitReason.HALT
        assert vm.memory.read_u32(0x3000) >> 14 & 1
        debugger.disarm()


def test_a_step_leaves_an_nmi_waiting():
    """Steps take no interrupts, and lose none."""
    with Machine(memory="1M", accel="soft", machine="microvm") as vm:
        vm.memory.write(2 * 4, bytes.fromhex("00200000"))  # the vector of an NMI leads to 0x2000
        vm.memory.write(0x2000, bytes.fromhex("b92a00 f4"))  # mov cx, 42; hlt
        vm.load_bytes(bytes.fromhex("bc0080 90 90 90 ebfe"), at=START)
        vm.step(timeout=TIMEOUT)
        vm.inject_nmi()
        for _ in range(2):
            vm.step(timeout=TIMEOUT)
        assert rip(vm) == START + 5 and vm.vcpus[0].regs.rcx == 0
        assert vm.run(TIMEOUT).reason is StopReason.HALT
        assert vm.vcpus[0].regs.rcx == 42


@pytest.mark.parametrize(
    "point",
    [0x1003, Point(0x1003, "write"), Point("start"), Point(-1), Point(1 << 64), Point(0, length=0)],
)
def test_what_is_no_breakpoint_is_refused(vm, point):
    with pytest.raises(ConfigError, match=r"breakpoint|cannot be watched|no address"):
        vm.add_breakpoint(point)
    assert not vm.breakpoints
