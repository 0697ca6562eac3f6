"""A vCPU's state goes to another machine as plain data, and the guest does not notice."""

import contextlib
import copy
import json
import random
import struct
from pathlib import Path

import pytest

from guests import FOLDER, GUESTS
from vmexit import ConfigError, Machine, StopReason
from vmexit.accel.kvm import cpuid, msrs
from vmexit.arch.x86.cpu_features import FEATURES
from vmexit.core.bus import State

pytestmark = pytest.mark.engine

SIZE = 2 << 20
# The TSC, and two of Hyper-V's: VP_RUNTIME and TIME_REF_COUNT.
CLOCKS = (0x10, 0x40000010, 0x40000020)
PVM = Path("/sys/module/kvm_pvm").exists()

# Each ends by itself, and what it does is to be seen in its memory and registers alone.
NAMES = [
    "compatibility", "exceptions-long", "exceptions-protected", "exceptions-real",
    "gates-protected", "int1", "modes", "nested-exceptions", "software-interrupts", "strings",
    "syscall-32", "sysenter", "sysenter-protected", "system-calls", "task-gate",
]  # fmt: skip


def through_json(state: State) -> State:
    """As it is once it was written and read: nothing but numbers, texts, bytes and their like."""
    text = json.dumps(state, default=lambda data: {"bytes": data.hex()})

    def pairs(found: dict[str, object]) -> object:
        only = found.get("bytes")
        return bytes.fromhex(only) if isinstance(only, str) else found

    result: State = json.loads(text, object_hook=pairs)
    return result


def move(vm: Machine, twin: Machine) -> None:
    """All of a machine without devices."""
    twin.memory.write(0, vm.memory.read(0, SIZE))
    (vcpu,), (other,) = vm._vcpus(), twin._vcpus()
    state = through_json(vcpu.state())
    other.restore(state)
    again = through_json(other.state())
    for one in (state, again):  # what goes on meanwhile
        if "msrs" in one:
            one["msrs"] = msrs.unpack(one["msrs"])
        for clock in CLOCKS if "msrs" in one else ():
            one["msrs"].pop(clock, None)
        if "cpu" in one:
            one["cpu"].pop("tsc")
    if "msrs" in again:
        found, expected = again.pop("msrs"), state.pop("msrs")
        assert {k: (v, expected.get(k)) for k, v in found.items() if v != expected.get(k)} == {}
        assert found.keys() == expected.keys()
    assert again == state


def end_of(vm: Machine):
    return vm.vcpus[0].regs.as_dict(), vm.memory.read(0, SIZE)


def guest(accel: str, name: str) -> Machine:
    return Machine(SIZE, accel, image=FOLDER / f"{name}.bin", mode=GUESTS[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_guest_does_not_notice(name):
    """After random numbers of instructions: within handlers, shadows of STI, loops of REP."""
    with guest("soft", name) as vm:
        assert vm.run(timeout=60).reason in (StopReason.HALT, StopReason.DEBUG_EXIT)
        expected = end_of(vm)
    chance = random.Random(name)
    vm, moves = guest("soft", name), 0
    try:
        while True:
            for _ in range(chance.randint(1, 60 if moves else 5)):
                stop = vm.step(timeout=60)
                if stop.reason is not StopReason.DEBUG:
                    assert moves
                    assert end_of(vm) == expected
                    return
            if moves < 12:
                twin = guest("soft", name)
                move(vm, twin)
                vm.close()
                vm, moves = twin, moves + 1
            else:
                vm.run(timeout=60)
                assert end_of(vm) == expected
                return
    finally:
        vm.close()


# 64-bit: SSE and x87 with another rounding and precision, an MSR, debug registers, and a port
# write between any two of them.
PROGRAM = bytes.fromhex(
    "b868240000"  # mov eax, 0x2468
    "f30f2ac0"  # cvtsi2ss xmm0, eax
    "e610"  # out 0x10, al
    "660f6fc8"  # movdqa xmm1, xmm0
    "f30f58c8"  # addss xmm1, xmm0
    "e610"
    "9bdbe3"  # finit
    "d9eb"  # fldpi
    "d9ee"  # fldz
    "e610"
    "d9c9"  # fxch st(1)
    "d9fe"  # fsin
    "e610"
    "dd1c2500300000"  # fstp qword [0x3000]
    "b9020100c0"  # mov ecx, 0xc0000102
    "b844332211"  # mov eax, 0x11223344
    "31d2"  # xor edx, edx
    "0f30"  # wrmsr: KERNEL_GS_BASE
    "e610"
    "0f32"  # rdmsr
    "89042508300000"  # mov [0x3008], eax
    "f30f110c2510300000"  # movss [0x3010], xmm1
    "e610"
    "d93c2518300000"  # fnstcw [0x3018]
    "f4"  # hlt
)


def with_stops(accel: str) -> Machine:
    vm = Machine(SIZE, accel, mode="long")
    vm.load_bytes(PROGRAM, at=0x1000)
    vm.on_pio(0x10, write=lambda access: vm.stop())
    regs = vm.vcpus[0].regs
    regs.cr4 |= 1 << 9 | 1 << 10  # OSFXSR, OSXMMEXCPT: SSE
    return vm


def test_between_any_two_accesses(accel):
    if accel == "kvm" and PVM:
        pytest.skip("kvm_pvm knows no SSE in ring 0")
    vm, stops = with_stops(accel), 0
    while (stop := vm.run(timeout=30)).reason is StopReason.STOPPED:
        stops += 1
        twin = with_stops(accel)
        move(vm, twin)
        vm.close()
        vm = twin
    with vm:
        assert (stop.reason, stops) == (StopReason.HALT, 6)
        assert abs(struct.unpack("<d", vm.memory.read(0x3000, 8))[0]) < 1e-15  # sin(pi)
        assert vm.memory.read_u32(0x3008) == 0x1122_3344
        assert struct.unpack("<f", vm.memory.read(0x3010, 4)) == (2.0 * 0x2468,)
        assert vm.memory.read_u16(0x3018) == 0x37F


RDTSC = bytes.fromhex("0f31 f4")


def tsc_of(vm: Machine) -> int:
    vm.load_bytes(RDTSC, at=0x1000, entry=0x1000)
    assert vm.run(timeout=30).reason is StopReason.HALT
    regs = vm.vcpus[0].regs
    return regs.rdx << 32 | regs.rax


def test_setting_tr_to_what_it_is_changes_nothing():
    """A task that is busy is none to the engine, which ended the process at the next exception."""
    with guest("soft", "exceptions-protected") as vm:
        for _ in range(60):
            vm.step(timeout=30)
        regs = vm.vcpus[0].regs
        regs.tr = regs.tr
        assert vm.run(timeout=60).reason is StopReason.HALT


def test_the_time_stamp_counter_goes_on_from_where_it_was(accel):
    with Machine("1M", accel) as vm, Machine("1M", accel) as twin:
        (vcpu,), (other,) = vm._vcpus(), twin._vcpus()
        state = vcpu.state()
        if accel == "soft":
            state["cpu"]["tsc"] = 1 << 50
        else:
            state["msrs"] = msrs.pack(msrs.unpack(state["msrs"]) | {0x10: 1 << 50})
        other.restore(state)
        tsc = other.state()["cpu"]["tsc"] if accel == "soft" else other.msrs([0x10])[0x10]
        if accel == "kvm" and tsc < 1 << 50:
            pytest.skip("this KVM shows its guests the host's counter")
        assert 1 << 50 <= tsc < (1 << 50) + (1 << 40)
        assert tsc < tsc_of(twin) < (1 << 50) + (1 << 40)


def test_the_time_stamp_counter_begins_anew_with_a_reset():
    with Machine("1M", "soft") as vm:
        before = tsc_of(vm)
        vm.reset()
        assert 0 < tsc_of(vm) < before + (1 << 36)


def with_less(state: State) -> tuple[str, State]:
    """A feature, and as if the guest had not been shown it."""
    table = cpuid.parse(state["cpuid"])
    name = next(n for n in ("rdrand", "popcnt", "cx16", "cmov") if FEATURES[n].is_in(table))
    FEATURES[name].put_into(table, False)
    return name, {**state, "cpuid": cpuid.pack(table)}


@pytest.mark.kvm
def test_the_guest_goes_on_to_see_the_processor_that_it_has_seen():
    with Machine("1M", "kvm") as vm, Machine("1M", "kvm") as twin:
        (vcpu,), (other,) = vm._vcpus(), twin._vcpus()
        name, less = with_less(vcpu.state())
        state = through_json(less)
        other.restore(state)
        assert other.state()["cpuid"] == state["cpuid"] != vcpu.state()["cpuid"]
        with pytest.raises(ConfigError, match=f"was shown {name}, which this machine has not"):
            other.restore(vcpu.state())
        assert other.state()["cpuid"] == state["cpuid"]


@pytest.mark.kvm
def test_a_guest_that_runs_is_shown_no_other_processor():
    with Machine("1M", "kvm") as vm:
        vm.load_bytes(b"\xf4", at=0x1000)
        vm.run(timeout=30)
        (vcpu,) = vm._vcpus()
        vcpu.restore(vcpu.state())
        with pytest.raises(ConfigError, match="this machine has run already; use a new one"):
            vcpu.restore(with_less(vcpu.state())[1])


# 16-bit: mov eax, 0x1234; mov dr0, eax; out 0x10, al; hlt
LOADS_DR0 = bytes.fromhex("66b834120000 0f23c0 e610 f4")


def test_debug_registers_of_the_guest(accel):
    with Machine("1M", accel) as vm, Machine("1M", accel) as twin:
        vm.load_bytes(LOADS_DR0, at=0x1000)
        vm.on_pio(0x10, write=lambda access: vm.stop())
        assert vm.run(timeout=30).reason is StopReason.STOPPED
        (vcpu,), (other,) = vm._vcpus(), twin._vcpus()
        state = vcpu.state()
        if accel == "kvm":
            other.restore(through_json(state))
            assert other.state()["parts"]["debugregs"] == state["parts"]["debugregs"]
            return
        assert state["cpu"]["debug"][0] == 0x1234
        for dr7 in (0x401, 0xF0401, 0x400):  # at an instruction, at accesses of 4 bytes, nowhere
            state["cpu"]["debug"][5] = dr7
            other.restore(through_json(state))
            assert other.state()["cpu"]["debug"] == state["cpu"]["debug"]


def test_the_shadow_of_sti(accel):
    """An interrupt that is pending comes behind the next instruction, not before it."""
    with Machine("1M", accel) as vm, Machine("1M", accel) as twin:
        vm.load_bytes(b"\xfb\x90\xf4", at=0x1000)  # sti; nop; hlt
        vm.step(timeout=30)
        (vcpu,), (other,) = vm._vcpus(), twin._vcpus()
        other.restore(through_json(vcpu.state()))
        if accel == "soft":
            assert vcpu.state()["cpu"]["interrupt_shadow"]
            assert other.state()["cpu"]["interrupt_shadow"]
        else:
            assert other.state()["parts"]["events"] == vcpu.state()["parts"]["events"]


def broken(state: State):
    """What nobody has saved."""
    yield {}
    yield {**state, "version": 3}
    yield {**state, "accel": "other"}
    yield {**state, "cpu": 5, "parts": 5}
    yield {**state, "cpu": {}, "parts": {}}
    yield {**state, "halted": 2, "msrs": {"x": 1}}
    if "cpu" in state:
        for name in state["cpu"]:
            yield {**state, "cpu": {**state["cpu"], name: -1}}
        for name in ("fpu", "msrs", "general"):
            yield {**state, "cpu": {**state["cpu"], name: state["cpu"][name][:-1]}}
        yield {**state, "cpu": {**state["cpu"], "general": [1 << 64] * 18}}
        segments = state["cpu"]["segments"]
        yield {**state, "cpu": {**state["cpu"], "segments": {**segments, "cs": [1 << 16] * 11}}}
        for field, value in ((3, 2), (3, 0), (6, 0)):  # no task, no task, one that is not present
            task = segments["tr"].copy()
            task[field] = value
            yield {**state, "cpu": {**state["cpu"], "segments": {**segments, "tr": task}}}
        yield {**state, "waits_for_sipi": True}
    else:
        yield {**state, "msrs": state["msrs"][1:]}
        yield {**state, "msrs": bytes(16 * 4097)}
        yield {**state, "msrs": [0x10]}
        yield {**state, "cpuid": state["cpuid"][:-1]}
        yield {**state, "cpuid": b""}
        for name in state["parts"]:
            yield {**state, "parts": {**state["parts"], name: b"x"}}


def anything(chance: random.Random, bits: int) -> int:
    return chance.choice([0, 1, (1 << bits) - 1, 1 << bits - 1, chance.getrandbits(bits)])


def change(chance: random.Random, cpu: State) -> None:
    part = chance.choice(["general", "segments", "tables", "control", "fpu", "msrs", "debug"])
    if part == "segments":
        segment, field = chance.choice(list(cpu[part])), chance.randrange(11)
        top = (16, 64, 32, 4, 1, 2, 1, 1, 1, 1, 1)[field]
        cpu[part][segment][field] = anything(chance, top) & (1 << top) - 1
    elif part == "tables":
        cpu[part][chance.choice(["gdt", "idt"])] = [anything(chance, 64), anything(chance, 32)]
    elif part == "fpu":
        cpu[part] = chance.randbytes(512)
    elif part == "control":
        cpu[part][chance.randrange(len(cpu[part]))] ^= 1 << chance.randrange(40)
    else:
        cpu[part][chance.randrange(len(cpu[part]))] = anything(chance, 64)


@pytest.mark.parametrize("name", ["exceptions-long", "exceptions-protected", "task-gate"])
def test_a_hostile_state_harms_its_guest_only(name):
    """It is refused, or the guest does something; this process goes on."""
    chance = random.Random(name)
    with guest("soft", name) as vm:
        for _ in range(60):
            vm.step(timeout=30)
        (vcpu,) = vm._vcpus()
        saved, restored = vcpu.state(), 0
        memory = vm.memory.read(0, SIZE)
        for _ in range(60):
            state = copy.deepcopy(saved)
            for _ in range(chance.randint(1, 4)):
                change(chance, state["cpu"])
            with contextlib.suppress(ConfigError):
                vcpu.restore(state)
                restored += 1
                vm.run(timeout=0.01)
        assert restored > 10
        vm.memory.write(0, memory)  # which a guest may have harmed that ran somewhere else
        vcpu.restore(saved)
        assert vm.run(timeout=60).reason in (StopReason.HALT, StopReason.SHUTDOWN)


def test_what_is_no_state_is_refused_and_changes_nothing(accel):
    with Machine("1M", accel) as vm:
        vcpu = vm._vcpus()[0]
        before = vm.vcpus[0].regs.as_dict()
        for state in broken(vcpu.state()):
            with pytest.raises(ConfigError, match=r"vCPU .*version [12]; save it anew"):
                vcpu.restore(state)
        assert vm.vcpus[0].regs.as_dict() == before
