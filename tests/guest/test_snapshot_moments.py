"""Guests of the software CPU go on from snapshots at instructions where interrupts are about."""

import random
import struct

import pytest

from guests import FOLDER, GUESTS
from vmexit import Machine, Point, StopReason

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_left")]

SPURIOUS, TIMER = 0xFF, 0x80
CODE = 0x600  # bytes, about


def log_of(vm: Machine) -> list[tuple[int, ...]]:
    """Vector, RIP as expected or not, RFLAGS, the guest's R11; without what time has a say in."""
    size = vm.vcpus[0].regs.r15
    found = struct.iter_unpack("<4Q", vm.memory.read(0x20000, size - size % 32))
    return [record for record in found if record[0] not in (SPURIOUS, TIMER)]


def break_at(vm: Machine, places: list[int]) -> None:
    """But not where it is: it has been there."""
    for place in places:
        if place != vm.vcpus[0].regs.rip:
            vm.add_breakpoint(Point(place))


@pytest.mark.parametrize("seed", range(4))
def test_interrupts_come_as_they_would_have(seed):
    """By clones, and by going back: a moment between STI and the next instruction is like any."""
    chance = random.Random(seed)
    image = FOLDER / "interrupts.bin"
    options = {"machine": "microvm", "serial": "null", "mode": GUESTS["interrupts"]}
    with Machine("4M", "soft", image=image, **options) as vm:
        assert vm.run(60).reason is not StopReason.TIMEOUT
        expected = log_of(vm)
    code = range(0x1000, 0x1000 + CODE)
    vm, moves = Machine("4M", "soft", image=image, **options), 0
    try:
        while True:
            near = range(vm.vcpus[0].regs.rip + 1, vm.vcpus[0].regs.rip + 24)
            break_at(vm, [*chance.sample(near, 8), *chance.sample(code, 8)])
            stop = vm.run(60)
            if stop.reason is not StopReason.DEBUG:
                break
            if moves >= 25:
                for point in vm.breakpoints:
                    vm.remove_breakpoint(point)
                stop = vm.run(60)
                break
            moves += 1
            with vm.snapshot() as snap:
                if moves % 2:
                    vm.run(timeout=0.001)
                    vm.reset_to(snap)
                clone = snap.clone()
            vm.close()
            vm = clone
        assert stop.reason is StopReason.HALT, stop
        assert log_of(vm) == expected
        assert moves > 3
    finally:
        vm.close()
