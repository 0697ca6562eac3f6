"""Going back to a snapshot from within a callback, while the machine runs on."""

import itertools
import signal
import threading
import time

import pytest
from test_snapshot import COUNT, SMP, TIMEOUT, finish, stopped_at

from vmexit import ConfigError, Machine, Point, RunState, StopReason, VmexitError
from vmexit.machine.events import EventKind

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_left")]

# 16-bit: 0: mov ax, 0x2000; 3: mov es, ax; 5: out 0x10, al; 7: inc word [0x3000];
# b: in ax, 0x12; d: mov [0x3002], ax; 10: mov ax, es:[0]; 14: mov [0x3004], ax; 17: out 0x11, al;
# 19: jmp 5
ACCESSES = bytes.fromhex("b80020 8ec0 e610 ff060030 e512 a30230 26a10000 a30430 e611 ebea")
MEMORY, MMIO = 64 << 10, 0x2_0000


def test_the_run_goes_on_from_there(accel):
    """One run in which the guest counts from 100 to 110, again and again."""
    with stopped_at(accel, 100) as first, first.snapshot() as snap, snap.clone() as vm:
        seen = []
        events = []
        vm.subscribe(lambda event: events.append(event.kind))

        def write(access):
            seen.append((access.value, vm.memory.read_u16(COUNT)))
            if access.value == 110 and len(seen) < 500:
                vm.reset_to(snap)

        vm.on_pio(0x10, write=write)
        assert vm.run(TIMEOUT).reason is StopReason.HALT
        assert vm.vcpus[0].regs.rax == vm.memory.read_u16(COUNT) == 1000
        assert seen[:500] == [(n, n) for _ in range(50) for n in range(101, 111)]
        assert EventKind.RESET not in events  # a guest could flood who listens
        with snap.clone() as twin:
            assert finish(twin) == 1000


class Hooks:
    """What each access does, to be changed as one likes."""

    def __init__(self, vm):
        self.functions = {"pio read": lambda access: 0x1111, "mmio read": lambda access: 0x2222}
        vm.on_pio(0x10, write=lambda access: None)
        vm.on_pio(0x11, write=self._hook("pio write"))
        vm.on_pio(0x12, read=self._hook("pio read"))
        vm.on_mmio(MMIO, 8, read=self._hook("mmio read"))

    def _hook(self, name):
        return lambda access: self.functions[name](access)


@pytest.fixture
def accesses(accel):
    """A machine, the snapshot before its accesses, and what they do."""
    with Machine(MEMORY, accel) as first:
        first.load_bytes(ACCESSES, at=0x1000)
        first.on_pio(0x10, write=lambda access: first.stop())
        assert first.run(TIMEOUT).reason is StopReason.STOPPED
        with first.snapshot() as snap, snap.clone() as vm:
            yield vm, snap, Hooks(vm).functions


@pytest.mark.parametrize("where", ["pio read", "mmio read", "pio write"])
def test_the_access_is_the_last_thing_that_happens(accesses, where):
    vm, snap, on = accesses
    before = vm.vcpus[0].regs.as_dict(), vm.memory.read(0, MEMORY)
    rounds = itertools.count(1)

    def back(access):
        if next(rounds) % 10 == 0:
            vm.stop()
        vm.reset_to(snap)
        return 0xABCD

    on[where] = back
    for _ in range(3):
        assert vm.run(TIMEOUT).reason is StopReason.STOPPED
        assert (vm.vcpus[0].regs.as_dict(), vm.memory.read(0, MEMORY)) == before
    assert next(rounds) == 31


def test_a_run_that_was_left_in_a_hurry_is_over_before_anything_else(accesses):
    """Two interrupts end `run()` while a callback takes its time, and goes back in the end."""
    vm, first, on = accesses
    entered, release, interrupted = (threading.Event() for _ in range(3))

    def back(access):
        entered.set()
        assert release.wait(TIMEOUT)
        vm.reset_to(first)

    def interrupt(number, frame):
        interrupted.set()
        raise KeyboardInterrupt

    def interrupt_twice():
        assert entered.wait(TIMEOUT)
        for _ in range(2):
            interrupted.clear()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            assert interrupted.wait(TIMEOUT)

    vm.memory.write(0x5000, b"second")
    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=interrupt_twice)
    try:
        with vm.snapshot() as second:
            wanted = [vm.memory.read(0, MEMORY), vm.vcpus[0].regs.as_dict()]
            on["pio write"] = back
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                vm.run(TIMEOUT)
            thread.join()
            threading.Timer(0.3, release.set).start()
            vm.reset_to(second)
            assert release.is_set()
            time.sleep(0.1)  # for what may still be going on
            assert [vm.memory.read(0, MEMORY), vm.vcpus[0].regs.as_dict()] == wanted
    finally:
        release.set()
        signal.signal(signal.SIGUSR1, before)


def test_what_a_callback_raises_counts(accesses):
    vm, snap, on = accesses

    def back(access):
        vm.reset_to(snap)
        raise ZeroDivisionError

    on["pio write"] = back
    for round in range(1, 4):
        with pytest.raises(ZeroDivisionError):
            vm.run(TIMEOUT)
        assert vm.memory.read_u16(COUNT) == round  # it has not gone back
    on["pio write"] = lambda access: vm.stop()
    assert vm.run(TIMEOUT).reason is StopReason.STOPPED
    assert vm.memory.read_u16(COUNT) == 4


def test_others_pause_it_meanwhile(accesses):
    vm, snap, on = accesses
    failed = []
    moved, done = threading.Event(), threading.Event()

    def back(access):
        moved.set()
        vm.reset_to(snap)
        if done.is_set():
            vm.stop()

    def others():
        try:
            for number in range(60):
                assert moved.wait(TIMEOUT)
                moved.clear()
                with vm.paused():
                    assert vm.memory.read_u16(COUNT) in (0, 1)
                    if number % 3 == 0:
                        with vm.snapshot() as one, one.clone() as twin:
                            assert twin.memory.read_u16(COUNT) in (0, 1)
                    if number % 7 == 0:
                        vm.reset_to(snap)
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    on["pio write"] = back
    thread = threading.Thread(target=others)
    thread.start()
    stop = vm.run(TIMEOUT)
    thread.join()
    assert not failed, failed
    assert stop.reason is StopReason.STOPPED
    assert vm.memory.read_u16(COUNT) == 0
    assert vm.state is RunState.PAUSED


def test_where_it_cannot_be(accesses):
    vm, snap, on = accesses
    on["pio write"] = lambda access: vm.reset_to(snap)
    vm.add_breakpoint(Point(0x1FFF))
    with pytest.raises(VmexitError, match="with breakpoints, and in steps, a callback cannot"):
        vm.run(TIMEOUT)
    vm.remove_breakpoint(Point(0x1FFF))
    other = vm.snapshot()
    other.close()
    on["pio write"] = lambda access: vm.reset_to(other)
    with pytest.raises(VmexitError, match="this snapshot is closed"):
        vm.run(TIMEOUT)


def test_a_snapshot_of_other_memory_is_refused_where_it_is_asked_for(accesses):
    vm, _, on = accesses
    refused = []

    def back(access):
        try:
            vm.reset_to(other)
        except ConfigError as error:
            refused.append(str(error))
        vm.stop()

    with Machine("2M", vm.accel) as larger, larger.snapshot() as other:
        on["pio write"] = back
        assert vm.run(TIMEOUT).reason is StopReason.STOPPED
        assert "laid out otherwise" in refused[0]
        with pytest.raises(ConfigError, match="laid out otherwise"):
            vm.reset_to(other)
        assert vm.run(TIMEOUT).reason is StopReason.STOPPED  # nothing has changed


def test_a_snapshot_that_is_closed_first_changes_nothing(accel):
    with stopped_at(accel, 100) as first, first.snapshot() as snap, snap.clone() as vm:

        def back(access):
            if vm.memory.read_u16(COUNT) == 110:
                vm.reset_to(snap)
                snap.close()

        vm.on_pio(0x10, write=back)
        with pytest.raises(VmexitError, match="this snapshot is closed"):
            vm.run(TIMEOUT)
        assert vm.run(TIMEOUT).reason is StopReason.HALT
        assert vm.memory.read_u16(COUNT) == 1000


def test_several_vcpus(accel):
    """On the software CPU they take turns; on KVM the others run meanwhile."""
    parts = {"machine": "microvm", "smp": 2, "debug_exit": None}
    with Machine("1M", accel, image=SMP, mode="protected", **parts) as vm:
        vm.memory.write_u32(0x6000, 1)
        with vm.snapshot() as snap:
            counts = []

            def back(access):
                counts.append(vm.memory.read_u32(0x6008))
                vm.reset_to(snap) if len(counts) < 4 else vm.stop()

            vm.on_pio(0xF4, write=back)
            if accel == "kvm":
                with pytest.raises(VmexitError, match="of one vCPU the others run"):
                    vm.run(TIMEOUT)
            else:
                assert vm.run(TIMEOUT).reason is StopReason.STOPPED
                assert counts == [4000] * 4
