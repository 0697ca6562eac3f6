"""Several vCPUs: they count together, and can be stopped at any moment, whatever each one does."""

import random
import threading

import pytest

from guests import FOLDER
from vmexit import Machine, StopReason

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_left")]

# What guests/smp.S says.
STARTED, GO_ON, COUNT, ALIVE, ROUNDS = 0x6000, 0x6004, 0x6008, 0x6020, 2000


def smp(accel: str, vcpus: int, started: int, *, go_on: bool = False) -> Machine:
    image = FOLDER / "smp.bin"
    vm = Machine("1M", accel, machine="microvm", smp=vcpus, image=image, mode="protected")
    vm.memory.write_u32(STARTED, started)
    vm.memory.write_u32(GO_ON, go_on)
    return vm


@pytest.mark.parametrize("vcpus", [2, 4])
def test_each_adds_to_the_count(accel, vcpus):
    with smp(accel, vcpus, vcpus - 1) as vm:
        stop = vm.run(timeout=60)
        assert (stop.reason, stop.value) == (StopReason.DEBUG_EXIT, 0x21), stop
        assert vm.memory.read_u32(COUNT) == vcpus * ROUNDS


def alive(vm: Machine) -> list[int]:
    return [vm.memory.read_u32(ALIVE + 4 * i) for i in range(3)]


def test_stops_are_clean_in_any_state(accel):
    """One vCPU reads its LAPIC, one spins, one writes to a port, one halts, one never started."""
    chance = random.Random(5)
    with smp(accel, 5, 3, go_on=True) as vm:
        while not all(alive(vm)):
            assert vm.run(timeout=0.2).reason is StopReason.TIMEOUT
        begin = before = alive(vm)
        for _ in range(1000):
            timer = threading.Timer(chance.random() * 0.003, vm.stop)
            timer.start()
            stop = vm.run(timeout=0.005)
            timer.join()
            assert stop.reason in (StopReason.STOPPED, StopReason.TIMEOUT), stop
            still = alive(vm)
            assert still == alive(vm)
            assert all(vcpu.regs.rip < 1 << 16 for vcpu in vm.vcpus[:4])
            before = [max(pair) for pair in zip(before, still, strict=True)]
            assert before == still  # nobody went back
        assert all(new > old for new, old in zip(still, begin, strict=True))
