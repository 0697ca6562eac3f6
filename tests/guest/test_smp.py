"""Several vCPUs: they count together, and can be stopped at any moment, whatever each one does."""

import json
import random
import subprocess
import sys
import threading

import pytest

from guests import FOLDER
from vmexit import Access, Machine, StopReason, VmexitError

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


def test_an_access_does_not_wait_for_another_vcpu_that_runs(accel):
    """Its registers are for after the run; one's own can be read."""
    seen = []

    def look(access: Access) -> None:
        with pytest.raises(VmexitError, match=r"stop\(\) it first"):
            _ = vm.vcpus[1].regs.rip
        with pytest.raises(VmexitError, match=r"stop\(\) it first"):
            vm.dump(1)
        seen.append(vm.vcpus[0].regs.rip)
        vm.stop()

    with smp(accel, 2, 1) as vm:
        vm.load_bytes(b"\xe6\x10\xeb\xfe", at=0x9000)  # out 0x10, al; jmp .
        vm.vcpus[0].regs.rip = 0x9000
        vm.on_pio(0x10, write=look)
        assert vm.run(timeout=30).reason is StopReason.STOPPED
        assert seen and vm.vcpus[1].regs.rip == 0xFFF0


def test_traces_of_several_vcpus_are_whole_lines(accel, tmp_path):
    """Each of them makes accesses all the time."""
    trace = tmp_path / "trace"
    image = tmp_path / "image"
    code = bytearray((FOLDER / "smp.bin").read_bytes())
    image.write_bytes(code.ljust(0x7000, b"\0"))
    with image.open("r+b") as file:
        for at, value in ((STARTED, 3), (GO_ON, 2)):
            file.seek(at)
            file.write(value.to_bytes(4, "little"))
    command = ["run", "--accel", accel, "--machine", "microvm", "--mode", "protected", "--smp", "4"]
    command += ["--trace", str(trace), "--timeout", "2", "--serial", "null", str(image)]
    done = subprocess.run(
        [sys.executable, "-m", "vmexit", *command], capture_output=True, timeout=60
    )
    assert done.returncode == 124, done.stderr
    exits = [json.loads(line) for line in trace.read_text().splitlines()]
    assert len(exits) > 100 and {e["exit"] for e in exits} <= {"io", "mmio"}
