"""Pausing, resuming, resetting and stopping a machine that runs, from any thread."""

import random
import threading
import time

import pytest

from vmexit import (
    After,
    ConfigError,
    EventKind,
    Machine,
    Point,
    RunState,
    StopReason,
    VmexitError,
)

TIMEOUT = 60
START = 0x1000
# 0: inc dword [0x3000]; out 0x10, al; jmp 0
SPIN = bytes.fromhex("66ff060030 e610 ebf7")
# mov al, 1; out 0x10, al; hlt
HALTS = bytes.fromhex("b001 e610 f4")


@pytest.fixture
def spinning(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=START)
        vm.on_pio(0x10, write=lambda access: None)
        vm.start(TIMEOUT)
        yield vm
        vm.stop()
        vm.wait()


def moves(vm) -> bool:
    """Whether the guest does something."""
    before = vm.memory.read_u32(0x3000)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if vm.memory.read_u32(0x3000) != before:
            return True
    return False


def stands(vm) -> bool:
    before = vm.memory.read_u32(0x3000)
    threading.Event().wait(0.02)
    return vm.memory.read_u32(0x3000) == before


def test_pause_is_complete_and_resume_goes_on(spinning):
    vm = spinning
    for _ in range(20):
        vm.pause()
        assert vm.state is RunState.PAUSED and not vm.running
        assert stands(vm)
        assert START <= vm.vcpus[0].regs.cs.base + vm.vcpus[0].regs.rip < START + len(SPIN)
        assert vm.wait(0) is None  # run() has not returned
        vm.resume()
        assert moves(vm)


def test_within_a_pause_there_may_be_others(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=START)
        vm.start(TIMEOUT)
        assert moves(vm)
        with vm.paused():
            with vm.paused(), vm.snapshot() as snapshot:
                assert stands(vm)
                vm.reset_to(snapshot)
            assert stands(vm)
        assert moves(vm)
        assert vm.stop()
        assert vm.wait(TIMEOUT).reason is StopReason.STOPPED


def test_who_follows_it_is_told_of_a_stop_within_a_pause(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=START)
        events = []
        vm.subscribe(lambda event: events.append(event.kind))
        for _ in range(2):
            vm.start(TIMEOUT)
            assert moves(vm)
            with vm.paused():
                vm.stop()
            assert vm.wait(TIMEOUT).reason is StopReason.STOPPED
        assert events == [EventKind.RESUMED, EventKind.PAUSED] * 2


def test_a_run_may_begin_paused(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=START)
        vm.pause()
        vm.start(TIMEOUT)
        assert stands(vm) and vm.memory.read_u32(0x3000) == 0
        vm.resume()
        assert moves(vm)
        assert vm.stop()
        assert vm.wait(TIMEOUT).reason is StopReason.STOPPED


def test_stop_and_timeout_end_a_paused_run(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=START)
        vm.start(TIMEOUT)
        vm.pause()
        assert vm.stop()
        assert vm.wait(TIMEOUT).reason is StopReason.STOPPED
        vm.pause()
        assert vm.run(0.05).reason is StopReason.TIMEOUT
        assert vm.run(0.05).reason is StopReason.TIMEOUT
        assert moves_in_run(vm)


@pytest.mark.parametrize("timeout", [1e300, float("inf")])
def test_no_timeout_is_too_long(accel, timeout):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(HALTS, at=START)
        vm.start(timeout)
        assert vm.wait(timeout).reason is StopReason.HALT


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_that_cannot_be(spinning, timeout):
    for call in (spinning.run, spinning.wait):
        with pytest.raises(ConfigError, match="use 0 or more"):
            call(timeout)


def moves_in_run(vm) -> bool:
    before = vm.memory.read_u32(0x3000)
    vm.run(0.1)
    return vm.memory.read_u32(0x3000) != before


def test_reset_begins_again(spinning):
    vm = spinning
    assert moves(vm)
    vm.pause()
    vm.memory.write_u32(0x3000, 0xFFFF_0000)
    vm.memory.write(START, b"\xf4")
    vm.reset()
    registers = vm.vcpus[0].regs
    assert (registers.rip, registers.cs.base) == (0, START)
    assert vm.memory.read_u32(0x3000) == 0
    assert stands(vm)
    vm.resume()
    assert moves(vm)
    vm.memory.write_u32(0x3000, 0xFFFF_0000)
    vm.reset()
    assert vm.state is RunState.RUNNING
    assert moves(vm)
    assert vm.memory.read_u32(0x3000) < 0xFFFF_0000


def test_a_reset_after_the_end(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(HALTS, at=START)
        seen = []
        vm.on_pio(0x10, write=lambda access: seen.append(access.value))
        for _ in range(3):
            assert vm.run(TIMEOUT).reason is StopReason.HALT
            assert vm.state is RunState.SHUTDOWN
            vm.reset()
            assert vm.state is RunState.PAUSED
        assert seen == [1, 1, 1]


def test_events_tell_what_happens(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(HALTS, at=START)
        seen = []
        end = vm.subscribe(lambda event: seen.append(event.kind))
        vm.pause()
        vm.start(TIMEOUT)
        vm.reset()
        vm.resume()
        assert vm.wait(TIMEOUT).reason is StopReason.HALT
        assert seen == [EventKind.RESET, EventKind.RESUMED, EventKind.SHUTDOWN]
        end()
        vm.reset()
        assert len(seen) == 3


def test_decisions_hold_or_reset_what_would_end(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(HALTS, at=START)
        answers = [After.RESET, After.RESET, After.HOLD]
        vm.decide(lambda stop: answers.pop(0))
        held = threading.Event()
        vm.subscribe(lambda event: event.kind is EventKind.SHUTDOWN and held.set())
        vm.start(TIMEOUT)
        assert held.wait(TIMEOUT)
        assert vm.state is RunState.SHUTDOWN
        assert not answers
        assert vm.wait(0) is None
        answers.append(After.END)
        vm.reset()
        vm.resume()
        assert vm.wait(TIMEOUT).reason is StopReason.HALT


def test_what_cannot_be_says_so(accel):
    with Machine(memory="1M", accel=accel) as vm:
        with pytest.raises(VmexitError, match="no run of this machine is under way"):
            vm.resume()
        with pytest.raises(VmexitError, match="nothing has started"):
            vm.wait()
        errors = []

        def within(access):
            for refused in (vm.pause, vm.reset):
                try:
                    refused()
                except VmexitError as error:
                    errors.append(str(error))

        vm.load_bytes(HALTS, at=START)
        vm.on_pio(0x10, write=within)
        vm.run(TIMEOUT)
        assert len(errors) == 2 and all("from within" in error for error in errors)


def test_anybody_at_any_time(spinning):
    """Three threads, random commands; it is of use afterwards."""
    vm = spinning
    errors = []

    def play(seed):
        dice = random.Random(seed)
        try:
            for _ in range(100):
                match dice.randrange(5):
                    case 0:
                        vm.pause()
                    case 1 | 2:
                        vm.resume()
                    case 3:
                        with vm.paused():
                            assert not vm.running
                            vm.vcpus[0].regs.as_dict()
                    case 4:
                        vm.reset()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=play, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    vm.resume()
    assert moves(vm)


def test_quit_has_status_0_and_waits_for_a_run(spinning):
    vm = spinning
    told = []
    vm.subscribe(lambda event: told.append((event.kind, event.stop)))
    assert vm.stop(StopReason.QUIT)
    stop = vm.wait(TIMEOUT)
    assert (stop.reason, stop.status) == (StopReason.QUIT, 0)
    assert [(kind, why.reason) for kind, why in told] == [(EventKind.SHUTDOWN, StopReason.QUIT)]
    assert not vm.stop(StopReason.QUIT)  # before a run: it is over at once
    assert vm.run(TIMEOUT).reason is StopReason.QUIT
    assert len(told) == 1  # nothing ran meanwhile
    assert vm.run(0.01).reason is StopReason.TIMEOUT
    assert not vm.stop(StopReason.QUIT)
    assert told[-1][0] is EventKind.SHUTDOWN
    told.clear()
    assert vm.run(TIMEOUT).reason is StopReason.QUIT and not told
    with pytest.raises(VmexitError, match="STOPPED or QUIT"):
        vm.stop(StopReason.HALT)


def test_nobody_is_told_of_a_brief_pause(spinning):
    vm = spinning
    assert moves(vm)
    told = []
    vm.subscribe(lambda event: told.append(event.kind))
    for _ in range(20):
        with vm.paused():
            assert stands(vm)
        assert moves(vm)
    assert told == []
    with vm.paused():
        vm.pause()  # this one stays
    assert told == [EventKind.PAUSED] and vm.state is RunState.PAUSED and stands(vm)
    vm.resume()
    assert moves(vm)
    assert told == [EventKind.PAUSED, EventKind.RESUMED]


def test_what_has_ended_by_itself_is_not_resumed(accel):
    """The guest halts for good while somebody wants it to stand still for a moment."""
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(HALTS, at=START)
        seen, halted = [], threading.Event()
        vm.on_pio(0x10, write=lambda access: seen.append(access.value))

        def decide(stop):
            halted.set()
            threading.Event().wait(0.2)  # within which the other thread wants it to stand
            return After.HOLD

        vm.decide(decide)
        vm.start(TIMEOUT)
        assert halted.wait(TIMEOUT)
        with vm.paused():
            assert vm.state is RunState.SHUTDOWN
        assert vm.state is RunState.SHUTDOWN and vm.wait(0.1) is None
        assert seen == [1]
        vm.stop()
        vm.wait()


def test_events_say_whether_the_machine_is_held(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(HALTS, at=START)
        answers = [After.RESET, After.HOLD]
        vm.decide(lambda stop: answers.pop(0))
        told, held = [], threading.Event()

        def tell(event):
            told.append((event.kind, event.held, event.stop and event.stop.reason))
            if event.held:
                held.set()

        vm.subscribe(tell)
        vm.start(TIMEOUT)
        assert held.wait(TIMEOUT)
        assert told == [
            (EventKind.RESUMED, False, None),
            (EventKind.RESET, False, StopReason.HALT),
            (EventKind.SHUTDOWN, True, StopReason.HALT),
        ]
        vm.stop()
        vm.wait()


def test_a_reset_that_fails_leaves_it_paused(accel, tmp_path):
    """The image has gone: what is left of the guest must not run on."""
    image = tmp_path / "image"
    image.write_bytes(SPIN)
    with Machine(memory="1M", accel=accel, image=image, load_address=START) as vm:
        vm.start(TIMEOUT)
        assert moves(vm)
        image.unlink()
        with pytest.raises(VmexitError, match="image"):
            vm.reset()
        assert vm.state is RunState.PAUSED and not vm.running
        image.write_bytes(SPIN)
        vm.reset()
        vm.resume()
        assert moves(vm)
        vm.stop()
        vm.wait()


def test_no_run_begins_while_somebody_looks(accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=START)
        with vm.paused(), pytest.raises(VmexitError, match="within its own paused"):
            vm.run(1)
        with vm.paused():
            vm.start(TIMEOUT)
            threading.Event().wait(0.05)
            assert not vm.running and vm.memory.read_u32(0x3000) == 0
        assert moves(vm)
        vm.stop()
        assert vm.wait(TIMEOUT).reason is StopReason.STOPPED


def test_closing_waits_for_whoever_looks_into_it(accel):
    looks, goes_on, seen = threading.Event(), threading.Event(), []

    def look(vm):
        with vm.paused():
            looks.set()
            goes_on.wait(TIMEOUT)
            seen.append((vm.state, vm.memory.read_u8(START)))

    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(HALTS, at=START)
        looking = threading.Thread(target=look, args=(vm,))
        looking.start()
        assert looks.wait(TIMEOUT)
        closing = threading.Thread(target=vm.close)
        closing.start()
        closing.join(0.1)  # it is not the wait that is tested: nothing is gone by then
        goes_on.set()
        looking.join(TIMEOUT)
        closing.join(TIMEOUT)
        assert seen == [(RunState.CREATED, HALTS[0])] and vm.state is RunState.CLOSED


def test_closing_meets_a_run_with_breakpoints_at_any_moment(accel):
    """What is armed for a run is disarmed before it is gone."""
    for _ in range(25):
        vm = Machine(memory="1M", accel=accel)
        vm.load_bytes(SPIN, at=START)
        vm.add_breakpoint(Point(0x5000))
        vm.start(TIMEOUT)
        vm.close()
        try:
            assert vm.wait(TIMEOUT).reason is StopReason.STOPPED
        except VmexitError as error:  # it came first
            assert "closed; make a new one" in str(error)
        for used in (vm.pause, vm.reset, lambda vm=vm: vm.add_breakpoint(Point(0))):
            with pytest.raises(VmexitError, match="closed; make a new one"):
                used()


def test_a_callback_that_may_not_pause_waits_for_nobody_who_does(spinning):
    """The machine's own callbacks, while another thread waits for the vCPUs to stand still."""
    vm, refused = spinning, []

    def decide(stop):
        for steer in (vm.paused().__enter__, vm.pause, vm.reset):
            with pytest.raises(VmexitError, match="from within its own run"):
                steer()
        vm.resume()  # it runs
        refused.append(stop)
        return After.RESET

    vm.decide(decide)
    vm.pause()
    vm.add_breakpoint(Point(START))
    vm.resume()
    for _ in range(50):
        with vm.paused():
            before = len(refused)
        end = time.monotonic() + TIMEOUT
        while len(refused) == before:
            assert time.monotonic() < end
    vm.pause()
    vm.remove_breakpoint(Point(START))


def test_what_a_subscriber_raises_comes_out_of_run_whoever_made_it_happen(accel):
    def fail(event):
        raise RuntimeError(f"at {event.kind.value}")

    told = []
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=START)
        vm.start(TIMEOUT)
        assert moves(vm)
        vm.subscribe(fail)
        vm.subscribe(lambda event: told.append(event.kind))
        vm.reset()
        assert EventKind.RESET in told
        with pytest.raises(RuntimeError, match="at reset"):
            vm.wait(TIMEOUT)


def test_after_a_failure_a_paused_machine_stays_paused(accel):
    """What has failed is told once, by the run that it was in."""
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=START)
        told, fails = [], []

        def tell(event):
            told.append(event.kind)
            if fails:
                raise RuntimeError(f"at {event.kind.value}")

        vm.subscribe(tell)
        vm.start(TIMEOUT)
        assert moves(vm)
        fails.append(True)
        vm.stop()
        with pytest.raises(RuntimeError, match="at paused"):
            vm.wait(TIMEOUT)
        fails.clear()
        vm.pause()
        vm.start(TIMEOUT)
        assert vm.state is RunState.PAUSED and stands(vm)
        vm.resume()
        assert moves(vm)
        vm.stop()
        vm.wait(TIMEOUT)
        with vm.paused():
            vm.start(TIMEOUT)
            assert stands(vm)
        assert moves(vm)


def test_who_follows_a_machine_is_told_that_a_failure_has_paused_it(accel):
    def fail(access):
        raise RuntimeError("a device")

    told = []
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=START)
        vm.on_pio(0x10, write=fail)
        vm.subscribe(lambda event: told.append(event.kind))
        with pytest.raises(RuntimeError, match="a device"):
            vm.run(TIMEOUT)
    assert told == [EventKind.RESUMED, EventKind.PAUSED]


def test_a_quit_for_the_next_run_is_not_forgotten(spinning):
    vm = spinning
    vm.stop()
    vm.wait(TIMEOUT)
    vm.stop(StopReason.QUIT)
    vm.stop()
    assert vm.run(TIMEOUT).reason is StopReason.QUIT


def test_a_closed_machine_stays_closed(accel):
    vm = Machine(memory="1M", accel=accel)
    vm.load_bytes(SPIN, at=START)
    vm.start(TIMEOUT)
    assert moves(vm)
    vm.close()
    vm.wait(TIMEOUT)
    assert vm.state is RunState.CLOSED
