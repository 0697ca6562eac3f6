"""KVM and the software CPU agree on random programs: exits, registers, memory."""

from io import StringIO

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from programs import MMIO, RAM, Program, programs

from guests import trace_of
from vmexit import Access, JsonTrace, Machine, StopReason

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


@pytest.mark.soak
@given(st.sampled_from(["real", "protected", "long"]).flatmap(programs))
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.timeout(1800)
def test_many_random_programs(program):
    compare(program)
