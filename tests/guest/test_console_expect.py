"""`vm.console`: what a guest writes to its serial port, and what a program types."""

import threading
import time

import pytest

from vmexit import ConfigError, Machine, RunState, StopReason
from vmexit.backends.chardev import Null
from vmexit.backends.console_tap import KEPT, ConsoleTap
from vmexit.core.loop import EventLoop
from vmexit.machine.terminal import ConsoleError

pytestmark = pytest.mark.usefixtures("nothing_left")

TIMEOUT = 30
# 16-bit: 0: mov dx, 0x3fd; in al, dx; test al, 1; jz 0; mov dx, 0x3f8; in al, dx; cmp al, '!';
# je 13; out dx, al; jmp 0; 13: hlt
ECHO = bytes.fromhex("bafd03 ec a801 74f8 baf803 ec 3c21 7403 ee ebed f4")


@pytest.fixture
def vm(accel):
    with Machine(memory="1M", accel=accel, serial="null") as machine:
        machine.load_bytes(ECHO, at=0x1000)
        yield machine


def test_what_is_typed_comes_back(vm):
    console = vm.console
    console.send("login: root\nlogin: ")
    assert console.expect("login:", TIMEOUT) == "login:"
    assert vm.state is RunState.PAUSED
    assert console.expect("login:", TIMEOUT) == " root\nlogin:"  # not the first once more
    with pytest.raises(ConsoleError, match=r"no 'login:' .*within 0.1 s; the end of it is ' '"):
        console.expect("login:", 0.1)
    console.send("ünd\n!")
    with pytest.raises(ConsoleError, match=r"before the end .*halt"):
        console.expect("login:", TIMEOUT)
    assert console.output == "login: root\nlogin: ünd\n"


def test_it_runs_in_another_thread(vm):
    vm.start(TIMEOUT)
    vm.console.send("one")
    vm.console.expect("one", TIMEOUT)
    assert vm.state is RunState.RUNNING
    waiting = threading.Thread(target=vm.console.expect, args=("two", TIMEOUT))
    waiting.start()
    vm.console.send("two")
    waiting.join(TIMEOUT)
    assert not waiting.is_alive()
    vm.console.send("!")
    assert vm.wait(TIMEOUT).reason is StopReason.HALT


def test_a_run_until_there_is_a_text(vm):
    vm.console.send("abcabcab")
    for n in (3, 6):
        assert vm.run_until(text="abc", timeout=TIMEOUT).reason is StopReason.UNTIL
        assert len(vm.console.output) == n  # it stands still right behind it
    assert vm.run_until(text="abc", timeout=0.05).reason is StopReason.TIMEOUT
    vm.console.send("c")  # what was there before does not count: from now on that is
    assert vm.run_until(text="abc", timeout=0.05).reason is StopReason.TIMEOUT
    with pytest.raises(ConfigError, match="no text"):
        vm.run_until(text="")


def test_no_console(accel):
    with Machine(memory="1M", accel=accel, serial=None) as vm:
        with pytest.raises(ConfigError, match="no console"):
            vm.console.send("x")
        with pytest.raises(ConfigError, match="no console"):
            vm.run_until(text="x")


def test_what_a_guest_writes_without_end_is_forgotten():
    errors = []
    loop = EventLoop(errors.append)
    tap = ConsoleTap(Null(), loop)
    for n in range(5 * KEPT // 1000):
        tap.write(b"%07d\n" % n * 125)
    start, there = tap.since(0)
    assert KEPT <= len(there) <= 2 * KEPT and start + len(there) == tap.end
    assert there.endswith(b"%07d\n" % (5 * KEPT // 1000 - 1))
    assert tap.since(tap.end - 3) == (tap.end - 3, there[-3:])
    assert tap.since(tap.end + 9)[1] == b""
    loop.close()
    assert not errors


def test_who_waits_for_input_is_called_once_from_the_loop():
    loop = EventLoop(lambda error: None)
    tap = ConsoleTap(Null(), loop)
    called = []
    tap.when_readable(lambda: called.append(threading.current_thread()))
    tap.type(b"ab")
    tap.type(b"c")
    end = time.monotonic() + TIMEOUT
    while not called:
        assert time.monotonic() < end
    assert [thread is threading.current_thread() for thread in called] == [False]
    assert (tap.read(2), tap.read(2), tap.read(2)) == (b"ab", b"c", b"")
    tap.type(b"d")
    tap.when_readable(lambda: called.append(None))  # it is there already
    while len(called) < 2:
        assert time.monotonic() < end
    loop.close()
