"""`--serial stdio` on a real terminal: raw mode, Ctrl-A, and the terminal as it was afterwards."""

import os
import pty
import signal
import sys
import termios
import time

import pytest
from command import VMEXIT
from terminal import SECONDS, Terminal

# loop: wait for a byte, send it back.
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee ebf1")


@pytest.fixture
def terminal(tmp_path, accel):
    image = tmp_path / "echo.bin"
    image.write_bytes(ECHO)
    made: list[Terminal] = []

    def start(*more: str, stdout: int | None = None) -> Terminal:
        arguments = ("run", str(image), "--load-address", "0x1000", "--accel", accel)
        made.append(Terminal(*arguments, "--timeout", str(SECONDS), *more, stdout=stdout))
        made[-1].expect(b"Ctrl-A h helps)\r\n")
        made[-1].wait_until_raw()
        return made[-1]

    yield start
    for one in made:
        one.close()


def test_each_key_goes_to_the_guest_at_once_and_nothing_is_echoed(terminal):
    t = terminal()
    t.output = b""
    t.type(b"a")
    t.expect(b"a")
    t.type(b"b\x03\x04\x1a\r")  # Ctrl-C, Ctrl-D and Ctrl-Z are the guest's
    t.expect(b"ab\x03\x04\x1a\r")
    assert t.output == b"ab\x03\x04\x1a\r"
    assert t.process.poll() is None


def test_ctrl_a_x_quits_and_the_terminal_is_as_before(terminal):
    t = terminal()
    assert t.mode()[3] & (termios.ICANON | termios.ECHO | termios.ISIG) == 0
    t.type(b"\x01x")
    assert t.wait() == 130
    assert t.mode() == t.before


def test_ctrl_a_h_helps_and_ctrl_a_twice_sends_one(terminal):
    t = terminal()
    t.output = b""
    t.type(b"\x01h")
    t.expect(b"Ctrl-A x")
    t.output = b""
    t.type(b"\x01\x01z\x01q.")  # Ctrl-A q is no command, and goes nowhere
    t.expect(b".")
    assert t.output == b"\x01z."


def test_help_for_an_output_that_nobody_reads_any_more_harms_nothing(terminal):
    reader, writer = os.pipe()
    os.close(reader)
    t = terminal(stdout=writer)
    os.close(writer)
    t.type(b"\x01h\x01x")
    assert t.wait() == 130
    assert b"Broken pipe" not in t.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_and_the_terminal_is_as_before(terminal, number):
    t = terminal()
    t.process.send_signal(number)
    assert t.wait() != 0
    assert t.mode() == t.before


def test_the_terminal_is_as_before_after_a_timeout(terminal):
    t = terminal("--timeout", "0.5")
    assert t.wait() == 124
    assert t.mode() == t.before


PAUSES = """
import vmexit
with vmexit.Machine("1M", {accel!r}, serial="stdio") as vm:
    vm.load_bytes({code!r}, at=0x1000)
    for _ in range(2):
        vm.run(timeout=1)
        print("said", input("ask> "))
"""


def test_between_two_runs_the_terminal_is_the_programs(accel):
    t = Terminal(PAUSES.format(accel=accel, code=ECHO), command=[sys.executable, "-c"])
    try:
        for word in (b"one", b"two"):
            t.wait_until_raw()
            t.type(b"g")  # the guest's
            t.expect(b"g")
            t.expect(b"ask> ")
            assert t.mode() == t.before
            t.output = b""
            t.type(word + b"\n")
            t.expect(b"said " + word)
        assert t.wait() == 0
    finally:
        t.close()


def test_a_paste_of_100_kb_arrives_whole(terminal):
    t = terminal()
    t.output = b""
    text = b"".join(b"%07d\r" % i for i in range(100_000 // 8))
    t.type(text)
    end = time.monotonic() + SECONDS
    while len(t.output) < len(text) and time.monotonic() < end:
        t.take(0.1)
    assert t.output == text


def test_in_the_background_the_terminal_is_left_alone(tmp_path):
    """A job in the background that set its terminal up would be stopped by SIGTTOU."""
    image = tmp_path / "halt.bin"
    image.write_bytes(b"\xf4")
    script = (
        "import os, subprocess, sys\n"
        f"done = subprocess.run([*{VMEXIT!r}, 'run', {str(image)!r}, '--load-address', '0x1000'],"
        " process_group=0, timeout=30)\n"
        "sys.exit(done.returncode)\n"
    )
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", script])
    output = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        if not data:
            break
        output += data
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, output
    os.close(master)
