"""`vm.run_until()`: an access or an address, on both accelerators."""

import pytest

from vmexit import ConfigError, Machine, RunState, StopReason

pytestmark = pytest.mark.usefixtures("nothing_left")

TIMEOUT = 30
START = 0x1000
HOLE = 0xD000_0000
# 32-bit: 0: inc eax; 1: out 0x10, al; 3: in al, 0x11; 5: mov [0xd0000004], eax;
# a: mov ebx, [0xd0000008]; 10: inc dword [0x3000]; 16: jmp 0
LOOP = bytes.fromhex("40 e610 e411 a3040000d0 8b1d080000d0 ff0500300000 ebe8")


@pytest.fixture
def vm(accel):
    with Machine(memory="1M", accel=accel) as machine:
        machine.load_bytes(LOOP, at=START, mode="protected")
        yield machine


def at(vm):
    return vm.vcpus[0].regs.rip - START


@pytest.mark.parametrize(
    ("what", "behind"),
    [
        ({"pio": 0x10}, 3),
        ({"pio": 0x11}, 5),
        ({"mmio": HOLE + 4}, 0xA),
        ({"mmio": HOLE + 7}, 0xA),  # a part of it
        ({"mmio": HOLE + 8}, 0x10),
        ({"address": START + 0x10}, 0x10),
    ],
)
def test_it_stops_behind_the_access_or_before_the_instruction_each_time(vm, what, behind):
    for n in range(4):
        stop = vm.run_until(**what, timeout=TIMEOUT)
        assert (stop.reason, stop.vcpu, at(vm)) == (StopReason.UNTIL, 0, behind)
        assert vm.memory.read_u32(0x3000) == n
        assert vm.state is RunState.PAUSED
    assert not vm.breakpoints
    assert vm.run(0.01).reason is StopReason.TIMEOUT  # and nothing is left of it


def test_the_device_has_its_access_first(vm):
    seen = []
    vm.on_pio(0x10, write=lambda access: seen.append(access.value))
    vm.on_pio(0x11, read=lambda access: 0x55)
    for _ in range(2):
        assert vm.run_until(pio=0x10, timeout=TIMEOUT).reason is StopReason.UNTIL
    assert len(seen) == 2
    vm.run_until(pio=0x11, timeout=TIMEOUT)
    vm.step(timeout=TIMEOUT)
    assert vm.vcpus[0].regs.rax & 0xFF == 0x55


def test_what_comes_before_is_told(vm):
    assert vm.run_until(pio=0x12, timeout=0.05).reason is StopReason.TIMEOUT
    assert vm.run_until(pio=0x11, timeout=TIMEOUT).reason is StopReason.UNTIL
    vm.on_pio(0x10, write=lambda access: vm.stop())
    assert vm.run_until(pio=0x11, timeout=TIMEOUT).reason is StopReason.STOPPED


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({}, "waits for one thing"),
        ({"pio": 1, "mmio": 2}, "waits for one thing"),
        ({"pio": 0x10000}, "no port 0x10000"),
        ({"mmio": -1}, "no guest physical address"),
        ({"symbol": "start_kernel"}, "symbols"),
    ],
)
def test_what_nobody_can_wait_for(vm, what, words):
    with pytest.raises(ConfigError, match=words):
        vm.run_until(**what, timeout=TIMEOUT)
