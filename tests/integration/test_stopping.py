"""Ending a run: by a stop, a timeout, a signal, another thread, at any moment."""

import os
import random
import signal
import subprocess
import sys
import threading

import pytest

from vmexit import (
    Access,
    Machine,
    Stop,
    StopReason,
    VmexitError,
)

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_left")]

ENDLESS = b"\xeb\xfe"
HALT = b"\xf4"


def run_in_a_thread(vm: Machine) -> tuple[threading.Thread, list[Stop]]:
    """An endless guest in a thread; returns once it runs."""
    started, stops = threading.Event(), []
    vm.on_pio(0x80, write=lambda a: started.set())
    vm.load_bytes(b"\xe6\x80" + ENDLESS)
    thread = threading.Thread(target=lambda: stops.append(vm.run(timeout=60)))
    thread.start()
    assert started.wait(60)
    return thread, stops


def test_a_callback_reads_registers_memory_and_stops_the_run(machine):
    machine.load_bytes(b"\xc6\x06\x00\x50\x2a\xb0\x07\xe6\x10\xb0\x08\xf4")
    seen = {}

    def look(access: Access) -> None:
        seen["rax"] = machine.vcpus[0].regs.rax
        seen["memory"] = machine.memory.read_u8(0x5000)
        machine.stop()

    machine.on_pio(0x10, write=look)
    assert machine.run(timeout=60).reason is StopReason.STOPPED
    assert seen == {"rax": 7, "memory": 42}
    # The access is complete, and nothing behind it has happened.
    assert machine.vcpus[0].regs.rax == 7
    assert machine.run(timeout=60).reason is StopReason.HALT
    assert machine.vcpus[0].regs.rax == 8


def test_a_stop_within_a_read_completes_the_read(machine):
    machine.load_bytes(b"\xb8\x11\x11\xe4\x10\xb4\x22\xf4")

    def answer(access: Access) -> int:
        machine.stop()
        return 0x5A

    machine.on_pio(0x10, read=answer)
    assert machine.run(timeout=60).reason is StopReason.STOPPED
    assert machine.vcpus[0].regs.rax == 0x115A
    assert machine.vcpus[0].regs.rip == 5
    machine.run(timeout=60)
    assert machine.vcpus[0].regs.rax == 0x225A


def test_a_stop_at_mmio_keeps_every_flag_and_comes_before_what_is_behind(accel):
    code = bytes.fromhex(
        "b877000000" "83f878" "a300000020"  # mov eax, 0x77; cmp eax, 0x78; mov [mmio], eax
        "0f92c3" "83f801" "a104000020"  # setb bl; cmp eax, 1; mov eax, [mmio + 4]
        "0f97c7" "b90f000000" "010d08000020"  # seta bh; mov ecx, 15; add [mmio + 8], ecx
        "0f9ac1" "870d0c000020" "41f4"  # setp cl; xchg [mmio + 12], ecx; inc ecx; hlt
    )  # fmt: skip
    seen: list[Access] = []
    states = []

    def access(access: Access) -> int:
        seen.append(access)
        vm.stop()
        return 0x1234

    with Machine("1M", accel, mode="protected") as vm:
        vm.load_bytes(code)
        vm.on_mmio(0x2000_0000, 16, read=access, write=access)
        while vm.run(timeout=20).reason is StopReason.STOPPED:
            regs = vm.vcpus[0].regs
            states.append((len(seen), regs.rip, regs.rax, regs.rbx, regs.rcx, regs.rflags))
        assert regs.rcx == 0x1235
    assert states == [
        (1, 0x100D, 0x77, 0, 0, 0x97),
        (2, 0x1018, 0x1234, 1, 0, 0x02),
        (4, 0x1026, 0x1234, 0x101, 15, 0x12),  # the instruction reads and writes
        (6, 0x102F, 0x1234, 0x101, 0x1234, 0x12),
    ]
    assert [a.value for a in seen if a.is_write] == [0x77, 0x1243, 0]


def test_timeout_and_going_on(machine):
    machine.load_bytes(ENDLESS)
    for _ in range(3):
        assert machine.run(timeout=0.02).reason is StopReason.TIMEOUT
    machine.memory.write(0x1000, HALT)
    assert machine.run(timeout=60).reason is StopReason.HALT


def test_a_loop_is_left_between_two_instructions_wherever_it_is(machine):
    """inc ax; mov [0x5000], ax; jmp: what is in memory is never more than one behind."""
    machine.load_bytes(b"\x40\xa3\x00\x50\xeb\xfa")
    for _ in range(30):
        machine.run(timeout=0.003)
        ax = machine.vcpus[0].regs.rax & 0xFFFF
        stored = machine.memory.read_u16(0x5000)
        at = machine.vcpus[0].regs.rip
        assert (ax - stored) % 0x10000 == (1 if at == 1 else 0), (ax, stored, at)


def test_stop_from_another_thread(machine):
    assert machine.stop() is False  # nothing runs yet
    thread, stops = run_in_a_thread(machine)
    assert machine.running
    assert machine.stop() is True
    thread.join()
    assert stops[0].reason is StopReason.STOPPED
    assert not machine.running


def test_stops_from_many_threads_at_any_moment(machine):
    machine.load_bytes(b"\xe6\x10\xeb\xfc")  # an exit, then again
    machine.on_pio(0x10, write=lambda a: None)
    end = threading.Event()

    def disturb() -> None:
        while not end.is_set():
            machine.stop()

    threads = [threading.Thread(target=disturb) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            assert machine.run(timeout=30).reason is StopReason.STOPPED
    finally:
        end.set()
        for thread in threads:
            thread.join()


def test_a_machine_that_runs_may_be_neither_run_nor_looked_into(machine):
    thread, _ = run_in_a_thread(machine)
    try:
        with pytest.raises(VmexitError, match="runs already"):
            machine.run(timeout=1)
        with pytest.raises(VmexitError, match=r"runs; pause\(\) or stop\(\) it first"):
            _ = machine.vcpus[0].regs.rax
        with pytest.raises(VmexitError, match="runs"):
            machine.load_bytes(HALT)
        with pytest.raises(VmexitError, match="runs"):
            machine.on_pio(0x10)
    finally:
        machine.stop()
        thread.join()


def test_close_ends_a_run_in_another_thread(accel):
    vm = Machine("1M", accel)
    thread, stops = run_in_a_thread(vm)
    vm.close()
    thread.join()
    assert [stop.reason for stop in stops] == [StopReason.STOPPED]
    vm.close()  # twice is fine
    for use in (vm.run, lambda: vm.load_bytes(HALT), vm.dump):
        with pytest.raises(VmexitError, match="closed"):
            use()


def test_close_ends_a_run_that_just_begins(accel):
    for _ in range(20):
        vm = Machine("1M", accel)
        vm.load_bytes(ENDLESS)
        stops: list[Stop] = []

        def run(vm: Machine = vm, stops: list[Stop] = stops) -> None:
            try:
                stops.append(vm.run(timeout=60))
            except VmexitError as error:
                assert "closed" in str(error)

        thread = threading.Thread(target=run)
        thread.start()
        vm.close()
        thread.join()
        assert all(stop.reason is StopReason.STOPPED for stop in stops)


def test_a_machine_cannot_be_closed_or_run_from_within(machine):
    machine.load_bytes(b"\xe6\x10\xf4")
    machine.on_pio(0x10, write=lambda a: machine.close())
    with pytest.raises(VmexitError, match="within its own access"):
        machine.run(timeout=60)
    machine.vcpus[0].regs.rip = 0
    nested = []

    def again(access: Access) -> None:
        try:
            machine.run(timeout=1)
        except VmexitError as error:
            nested.append(str(error))

    machine._parts.pio.detach(0x10)
    machine.on_pio(0x10, write=again)
    assert machine.run(timeout=60).reason is StopReason.HALT
    assert len(nested) == 1


def test_ctrl_c_in_the_main_thread_raises_and_the_machine_goes_on(machine):
    machine.on_pio(0x80, write=lambda a: os.kill(os.getpid(), signal.SIGINT))
    machine.load_bytes(b"\xe6\x80" + ENDLESS)
    with pytest.raises(KeyboardInterrupt):
        machine.run(timeout=60)
    assert not machine.running
    assert machine.run(timeout=0.01).reason is StopReason.TIMEOUT


def test_whatever_a_signal_handler_raises_ends_the_run(machine):
    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    machine.on_pio(0x80, write=lambda a: os.kill(os.getpid(), signal.SIGUSR1))
    machine.load_bytes(b"\xe6\x80" + ENDLESS)
    before = signal.signal(signal.SIGUSR1, ring)
    try:
        with pytest.raises(Alarm):
            machine.run(timeout=60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert machine.run(timeout=0.01).reason is StopReason.TIMEOUT


def test_a_signal_that_returns_does_not_end_the_run(machine):
    machine.on_pio(0x80, write=lambda a: os.kill(os.getpid(), signal.SIGUSR1))
    machine.load_bytes(b"\xe6\x80\xf4")
    rung = []
    before = signal.signal(signal.SIGUSR1, lambda *_: rung.append(1))
    try:
        assert machine.run(timeout=60).reason is StopReason.HALT
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert rung == [1]


def test_stop_from_a_signal_handler_at_any_moment(machine):
    machine.load_bytes(ENDLESS)
    # Not SIGALRM, which pytest-timeout waits for.
    before = signal.signal(signal.SIGVTALRM, lambda *_: machine.stop())
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005, 0.0005)
    try:
        for _ in range(300):
            assert machine.run(timeout=0.001).reason in (StopReason.TIMEOUT, StopReason.STOPPED)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_close_from_a_signal_handler_within_run_is_refused(machine):
    machine.on_pio(0x80, write=lambda a: os.kill(os.getpid(), signal.SIGUSR1))
    machine.load_bytes(b"\xe6\x80" + ENDLESS)
    before = signal.signal(signal.SIGUSR1, lambda *_: machine.close())
    try:
        with pytest.raises(VmexitError, match=r"within its own run\(\)"):
            machine.run(timeout=60)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_fork_cannot_run_the_machine_of_its_parent(machine):
    machine.load_bytes(HALT)
    machine.run(timeout=60)
    child = os.fork()
    if child == 0:
        try:
            machine.run(timeout=60)
        except VmexitError as error:
            os._exit(7 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    machine.vcpus[0].regs.rip = 0
    assert machine.run(timeout=60).reason is StopReason.HALT


def test_a_program_may_end_while_a_machine_runs(accel):
    program = (
        "import threading, vmexit\n"
        f"vm = vmexit.Machine('1M', {accel!r})\n"
        "started = threading.Event()\n"
        "vm.on_pio(0x80, write=lambda a: started.set())\n"
        "vm.load_bytes(b'\\xe6\\x80\\xeb\\xfe')\n"
        "threading.Thread(target=vm.run, daemon=True).start()\n"
        "started.wait()\n"
    )
    for _ in range(5):
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    "code",
    [
        "a300000020 ebf9",  # l: mov [mmio], eax; jmp l
        "ff0500000020 ebf8",  # l: inc dword [mmio]; jmp l
        "bf00000020 6c ebf8",  # l: mov edi, mmio; insb; jmp l
        "be00000020 6e ebf8",  # l: mov esi, mmio; outsb; jmp l
    ],
)
def test_kicks_at_any_moment_make_no_access_happen_twice_or_never(accel, code):
    """Each kind of access must come as often as the others, and in turn."""
    seen: list[str] = []

    def access(access: Access) -> int:
        seen.append("write" if access.is_write else "read")
        if len(seen) % 3 == 0:
            vm.stop()
        return 0

    end = threading.Event()

    def disturb() -> None:
        # Now and then only, or every run would end before it has begun.
        while not end.wait(random.random() * 0.0005):
            vm.stop()

    with Machine("1M", accel, mode="protected") as vm:
        vm.load_bytes(bytes.fromhex(code))
        vm.vcpus[0].regs.rdx = 0x10
        vm.on_mmio(0x2000_0000, 0x1000, read=access, write=access)
        vm.on_pio(0x10, read=access, write=access)
        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            while len(seen) < 3000:
                vm.run(timeout=60)
        finally:
            end.set()
            thread.join()
    # All that one round of the loop does, over and over; a round may be cut off at the end.
    turn = seen[: len(set(seen))]
    if accel == "soft" and " 6c " in code:
        turn = ["write", "read", "write"]  # the first is a zero; see docs/devices.md
    rounds = -(-len(seen) // len(turn))
    assert (turn * rounds)[: len(seen)] == seen


def test_a_program_loaded_anew_sees_nothing_of_what_the_old_one_had_read(machine):
    """rep insb is left in the middle by a stop from another thread, or as it ends."""
    code = b"\xbf\x00\x50\xb9\x10\x00\xba\x10\x00\xf3\x6c\xf4"
    numbers = iter(range(1, 10**9))
    machine.on_pio(0x10, read=lambda access: next(numbers) & 0xFF)
    for _ in range(50):
        machine.load_bytes(code, entry=0x1000)
        timer = threading.Timer(0.0001, machine.stop)
        timer.start()
        machine.run(timeout=20)
        timer.join()
    machine.load_bytes(code, entry=0x1000)
    first = next(numbers) + 1
    assert machine.run(timeout=20).reason is StopReason.HALT
    assert machine.memory.read_u8(0x5000) == first & 0xFF


def test_machines_run_side_by_side_in_threads(accel):
    totals = []

    def work(n: int) -> None:
        with Machine("1M", accel) as vm:
            seen = []
            vm.on_pio(0x10, write=lambda a: seen.append(a.value))
            vm.load_bytes(bytes((0xB0, n, 0xE6, 0x10, 0xF4)))
            for _ in range(20):
                vm.vcpus[0].regs.rip = 0
                assert vm.run(timeout=30).reason is StopReason.HALT
            totals.append((n, seen))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(totals) == [(n, [n] * 20) for n in range(6)]


@pytest.mark.parametrize("rounds", [30, pytest.param(3000, marks=pytest.mark.soak)])
@pytest.mark.timeout(900)
def test_machines_leave_nothing_behind(accel, rounds):
    """`nothing_left` counts descriptors, threads and mappings; here resident memory, too."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def once() -> None:
        with Machine("8M", accel) as vm:
            vm.load_bytes(b"\xe6\x10\xf4")
            vm.on_pio(0x10, write=lambda a: vm)
            assert vm.run(timeout=30).reason is StopReason.HALT

    for _ in range(10):
        once()
    before = resident()
    for _ in range(rounds):
        once()
    assert resident() - before < 8 << 20
