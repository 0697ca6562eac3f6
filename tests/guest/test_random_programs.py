"""KVM and the software CPU agree on random programs: exits, registers, memory."""

from io import StringIO

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from programs import MMIO, RAM, Program, programs

from guests import trace_of
from vmexit import Access, JsonTrace, Machine, StopReason
from vmexit.arch.x86.registers import RFLAGS_RF

# OF, SF, ZF, AF, PF: undefined after MUL, and some of them after shifts and logic.
UNDEFINED = 1 << 11 | 1 << 7 | 1 << 6 | 1 << 4 | 1 << 2

pytestmark = [pytest.mark.kvm, pytest.mark.engine]


class Answers:
    """A device whose answers depend on the address and on how often it was read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, access: Access) -> int:
        self.reads += 1
        return (self.reads * 0x9E37_79B9_7F4A_7C15 ^ access.address) & (1 << 8 * access.size) - 1


def run(accel: str, program: Program):
    trace = StringIO()
    with Machine("1M", accel, mode=program.mode, observer=JsonTrace(trace)) as vm:
        vm.load_bytes(program.code, at=0x1000)
        answers = Answers()
        vm.on_pio(0x10, count=4, read=answers)
        vm.on_mmio(MMIO, 0x1000, read=answers)
        stop = vm.run(timeout=20)
        registers = vm.vcpus[0].regs.as_dict()
        memory = bytes(vm.memory[RAM : RAM + 0x4000])
    return stop, trace_of(trace.getvalue()), registers, memory


def compare(program: Program) -> None:
    note(f"{program.mode}: {program.code.hex()}")
    kvm, soft = run("kvm", program), run("soft", program)
    assert kvm[0].reason is StopReason.HALT, kvm[0]
    assert soft[1] == kvm[1]
    assert soft[2] == kvm[2]
    assert soft[3] == kvm[3]
    assert soft[0].reason is StopReason.HALT


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_random_programs(mode):
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(programs(mode))
    def check(program: Program) -> None:
        compare(program)

    check()


def run_with_stops(accel: str, program: Program, stops: list[bool]):
    """Stop at those accesses; what the machine looks like at each stop, and at the end."""
    seen: list[object] = []
    states = []
    ask = iter(stops)

    def access(access: Access) -> int:
        seen.append(access)
        if next(ask, False):
            vm.stop()
        return 0xA5A5_5A5A_C3C3_3C3C & (1 << 8 * access.size) - 1

    with Machine("1M", accel, mode=program.mode) as vm:
        vm.load_bytes(program.code, at=0x1000)
        vm.on_pio(0x10, count=4, read=access, write=access)
        vm.on_mmio(MMIO, 0x1000, read=access, write=access)
        reason = None
        while reason is not StopReason.HALT:
            reason = vm.run(timeout=20).reason
            assert reason in (StopReason.HALT, StopReason.STOPPED)
            memory = bytes(vm.memory[RAM : RAM + 0x4000])
            registers = vm.vcpus[0].regs.as_dict()
            if reason is StopReason.STOPPED:
                # The programs have undefined flags before their end. And between two elements of
                # a REP, KVM shows RF as an interrupt would save it.
                registers["rflags"] &= ~(UNDEFINED | RFLAGS_RF)
            states.append((len(seen), registers, memory))
    return seen, states


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_a_run_that_is_stopped_at_an_access_ends_right_behind_it(mode):
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(programs(mode), st.lists(st.booleans(), max_size=40))
    def check(program: Program, stops: list[bool]) -> None:
        note(f"{program.mode}: {program.code.hex()}")
        assert run_with_stops("soft", program, stops) == run_with_stops("kvm", program, stops)

    check()


@pytest.mark.soak
@given(st.sampled_from(["real", "protected", "long"]).flatmap(programs))
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.timeout(1800)
def test_many_random_programs(program):
    compare(program)


@pytest.mark.soak
@given(
    st.sampled_from(["real", "protected", "long"]).flatmap(programs),
    st.lists(st.booleans(), max_size=60),
)
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.timeout(1800)
def test_many_random_programs_with_stops(program, stops):
    assert run_with_stops("soft", program, stops) == run_with_stops("kvm", program, stops)
