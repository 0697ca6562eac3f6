"""A Linux guest's console where the user wants it: a terminal, a socket, a pseudo-terminal."""

import hashlib
import os
import re
import select
import socket
import subprocess
import time

import pytest
from command import VMEXIT
from kernels import busybox_initrd, debian_kernel
from terminal import Terminal

pytestmark = [pytest.mark.linux, pytest.mark.timeout(200)]

SECONDS = 60
PROMPT = b"/root # "


def arguments() -> list[str]:
    kernel, initrd = debian_kernel("cloud-amd64"), busybox_initrd()
    run = ["run", "--accel", "soft", "--kernel", str(kernel), "--initrd", str(initrd)]
    return [*run, "--append", "console=ttyS0 quiet", "--timeout", "150"]


@pytest.fixture
def terminal():
    made = Terminal(*arguments())
    made.expect(PROMPT)
    yield made
    made.close()


def command(t: Terminal, text: bytes, answer: bytes) -> None:
    t.output = b""
    t.type(text + b"\r")
    t.expect(answer)
    t.expect(PROMPT)


def test_ctrl_c_at_a_terminal_ends_the_guests_program_only(terminal):
    t = terminal
    # Before that program runs, ^C is a key of the shell's line editor, or the shell's own.
    t.type(b"sh -c 'echo $((6*6))-asleep; exec sleep 1000'; echo status-$?\r")
    t.expect(b"36-asleep\r")
    t.type(b"\x03")
    t.expect(b"^C")
    t.output = b""
    command(t, b"echo alive-$((6*7))", b"alive-42\r")
    before = t.before
    t.type(b"\x01x")
    assert t.wait() == 130
    assert t.mode() == before


def test_a_paste_of_100_kb_at_a_terminal_arrives_whole_and_is_echoed(terminal):
    t = terminal
    lines = b"".join(b"%07d\n" % i for i in range(12_500))
    t.type(b"echo $((6*7))-ready; cat > /tmp/pasted\r")
    t.expect(b"42-ready")  # from now on the guest's terminal echoes, not its shell
    t.output = b""
    t.type(lines + b"\x04")
    t.expect(PROMPT)
    assert t.output.count(b"\n") >= 12_500
    command(t, b"sha256sum < /tmp/pasted", hashlib.sha256(lines).hexdigest().encode())


def test_poweroff_at_a_terminal_ends_with_status_0_and_the_terminal_as_before(terminal):
    terminal.type(b"poweroff -f\r")
    assert terminal.wait() == 0
    assert terminal.mode() == terminal.before


class Elsewhere:
    """The command with `--serial WHERE`, and the file or socket that its console is at."""

    def __init__(self, where: str) -> None:
        self.process = subprocess.Popen(
            [*VMEXIT, *arguments(), "--serial", where],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.fd = -1
        self.output = b""

    def expect(self, text: bytes) -> None:
        end = time.monotonic() + SECONDS
        while text not in self.output:
            assert time.monotonic() < end, self.output[-500:]
            if select.select([self.fd], [], [], 0.2)[0]:
                self.output += os.read(self.fd, 1 << 16)
        self.output = self.output.partition(text)[2]

    def command(self, text: str, answer: str) -> None:
        os.write(self.fd, text.encode() + b"\n")
        self.expect(answer.encode())
        self.expect(PROMPT)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_shell_over_a_unix_socket_that_comes_late_and_again(tmp_path):
    path = tmp_path / "console"
    guest = Elsewhere(f"unix:{path}")
    try:
        for answer in ("first", "second"):
            client = socket.socket(socket.AF_UNIX)
            end = time.monotonic() + SECONDS
            while client.connect_ex(str(path)):
                assert time.monotonic() < end
                time.sleep(0.1)
            guest.fd = client.fileno()
            while PROMPT not in guest.output:  # what came before the client is lost
                client.send(b"\n")
                if select.select([client], [], [], 0.5)[0]:
                    guest.output += client.recv(1 << 16)
                assert time.monotonic() < end
            guest.command(f"echo $((1))-{answer}", f"1-{answer}\r\n")
            if answer == "second":
                client.send(b"poweroff -f\n")
                assert guest.process.wait(SECONDS) == 0
            client.close()
            guest.output = b""
    finally:
        guest.close()


def test_a_shell_at_a_pseudo_terminal():
    guest = Elsewhere("pty")
    try:
        assert guest.process.stderr is not None
        said = ""
        while "/dev/pts/" not in said:
            line = guest.process.stderr.readline()
            assert line, said
            said += line
        found = re.search(r"/dev/pts/\d+", said)
        assert found
        guest.fd = os.open(found[0], os.O_RDWR | os.O_NOCTTY)
        guest.expect(PROMPT)
        guest.command("echo $((6*7))-here", "42-here\r\n")
        os.write(guest.fd, b"poweroff -f\n")
        assert guest.process.wait(SECONDS) == 0
        os.close(guest.fd)
    finally:
        guest.close()
