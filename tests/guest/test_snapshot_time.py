"""Clocks that a guest can compare go on from one moment, however long the saving takes."""

import statistics
import threading
import time
from pathlib import Path

import pytest

from vmexit import Machine
from vmexit.core.bus import State
from vmexit.machine.machine_state import MachineState, put, take

PM_HZ = 3_579_545
PVM = Path("/sys/module/kvm_pvm").exists()
SLOW = 0.3  # seconds
NEAR = SLOW / 10


class Slow:
    """A device that takes its time."""

    def state(self) -> State:
        time.sleep(SLOW)
        return {}

    def restore(self, state: State) -> None:
        time.sleep(SLOW)


def machine(accel: str, slow: str) -> Machine:
    vm = Machine("4M", accel, machine="microvm", serial="null")
    devices = {slow: Slow(), **vm._parts.devices} if slow == "first" else vm._parts.devices
    devices.setdefault(slow, Slow())
    vm._parts = vm._parts._replace(devices=devices)
    return vm


def khz(vm: Machine) -> float:
    """Of its time stamp counter."""
    moment, begin = vm._parts.vm.moment(), time.monotonic_ns()
    time.sleep(0.5)
    passed = time.monotonic_ns() - begin
    if vm.accel == "soft":
        return (vm._parts.vm.moment() - moment) * 1_000_000 / passed
    frequency: int = vm._vcpus()[0].state()["tsc_khz"]
    return frequency


def tsc(vm: Machine, state: MachineState) -> int:
    found = state.vm["tsc"]
    if found is None:
        pytest.skip("this KVM does not tell the offset of a TSC")
    return found[0]


def apart(vm: Machine, state: MachineState, frequency: float) -> float:
    """Seconds that the time stamp counter is ahead of ACPI's timer."""
    elapsed = state.devices["acpi-pm"]["elapsed"]
    return tsc(vm, state) / (frequency * 1000) - elapsed / PM_HZ


@pytest.mark.parametrize("slow", ["first", "last"])
def test_they_are_saved_as_they_were_at_one_moment(accel, slow):
    with machine(accel, slow) as vm:
        frequency = khz(vm)
        state = take(vm._parts)
        fast = vm._parts._replace(
            devices={n: d for n, d in vm._parts.devices.items() if not isinstance(d, Slow)}
        )
        expected = apart(vm, take(fast), frequency)
        assert abs(apart(vm, state, frequency) - expected) < NEAR
        assert fast.devices.keys() < state.devices.keys()


@pytest.mark.parametrize("slow", ["first", "last"])
def test_they_go_on_from_one_moment(accel, slow):
    with machine(accel, slow) as vm:
        frequency = khz(vm)
        state = take(vm._parts)
        expected = apart(vm, state, frequency)
        for _ in range(2):
            put(vm._parts, state)
            again = take(vm._parts)
            if accel == "kvm" and PVM:
                pytest.skip("kvm_pvm shows its guests the host's counter")
            assert abs(apart(vm, again, frequency) - expected) < NEAR


def test_they_are_of_one_moment_while_other_threads_compute(accel):
    """Any of these may have Python's lock for milliseconds, between two readings of clocks."""
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            sum(range(1000))

    with Machine("4M", accel, machine="microvm", serial="null") as vm:
        frequency = khz(vm)
        threads = [threading.Thread(target=compute) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            states = [take(vm._parts) for _ in range(24)]
        finally:
            done.set()
            for thread in threads:
                thread.join()
        begin = [state.devices["acpi-pm"]["elapsed"] / PM_HZ for state in states]
        values = {"tsc": [tsc(vm, state) / (frequency * 1000) for state in states]}
        if accel == "kvm":
            values["clock"] = [state.vm["clock"] / 1e9 for state in states]
        for name, clock in values.items():
            ahead = [a - b for a, b in zip(clock, begin, strict=True)]
            quarters = statistics.quantiles(ahead, n=4)
            assert quarters[2] - quarters[0] < 0.001, name


def test_the_time_in_between_has_not_passed(accel):
    with Machine("4M", accel, machine="microvm", serial="null") as vm:
        frequency = khz(vm)
        with vm.snapshot() as snap:
            begin = take(vm._parts)
            time.sleep(SLOW)
            vm.reset_to(snap)
            end = take(vm._parts)
        for name in ("clock",) if accel == "kvm" else ():
            assert abs(end.vm[name] - begin.vm[name]) < SLOW / 2 * 1e9
        if accel == "kvm" and PVM:
            pytest.skip("kvm_pvm shows its guests the host's counter")
        assert abs(tsc(vm, end) - tsc(vm, begin)) < SLOW / 2 * frequency * 1000


def test_a_clone_may_catch_up_with_the_time(accel):
    with Machine("4M", accel, machine="microvm", serial="null") as vm:
        frequency = khz(vm)
        with vm.snapshot() as snap:
            time.sleep(SLOW)
            with snap.clone() as late, snap.clone(catch_up=True) as twin:
                then, now = take(late._parts), take(twin._parts)
                passed = time.time() - snap.taken

        def between(name: str) -> float:
            return (now.devices["acpi-pm"][name] - then.devices["acpi-pm"][name]) / PM_HZ

        def right(seconds: float) -> bool:
            """The other one's clocks have gone on only since it was made."""
            return SLOW - NEAR < seconds < passed + NEAR

        assert right(between("elapsed"))
        if accel == "kvm":
            assert right((now.vm["clock"] - then.vm["clock"]) / 1e9)
            if PVM:
                pytest.skip("kvm_pvm shows its guests the host's counter")
        assert right((tsc(twin, now) - tsc(late, then)) / (frequency * 1000))
