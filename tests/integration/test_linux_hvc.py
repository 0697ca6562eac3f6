"""Linux's driver of virtio consoles: hvc0 and plain ports, at sockets and terminals of the host."""

import contextlib
import fcntl
import hashlib
import os
import re
import select
import socket
import struct
import termios
import time
from pathlib import Path

import pytest
from command import SLOW, vmexit
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, Guest
from terminal import Terminal

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300 * SLOW)]

FLAVOUR = "cloud-amd64"
SECONDS = 60 * SLOW
KB100 = 100_000


@contextlib.contextmanager
def boot(*options: str, append: str = "quiet"):
    initrd = initrd_with(FLAVOUR, "virtio_console")
    options = ("--timeout", str(250 * SLOW), *options)
    with Guest(debian_kernel(FLAVOUR), initrd, append, *options, accel=ACCEL) as guest:
        guest.log = guest.boot()
        yield guest
        guest.power_off()


class End:
    """The other end of a console or port, on the host."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.data = b""

    @classmethod
    def connect(cls, path: Path) -> "End":
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))
        return cls(client.detach())

    def take(self, least: int) -> bytes:
        """Read until there is so much."""
        end = time.monotonic() + SECONDS
        while len(self.data) < least:
            assert time.monotonic() < end, (len(self.data), self.data[-500:])
            if select.select([self.fd], [], [], 0.2)[0]:
                data = os.read(self.fd, 1 << 16)
                assert data, self.data[-500:]
                self.data += data
        data, self.data = self.data[:least], self.data[least:]
        return data

    def expect(self, text: bytes) -> bytes:
        before = b""
        while text not in before:
            before += self.take(1)
        return before

    def send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.fd, data) :]

    def __enter__(self) -> "End":
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)


def start(guest: Guest, command: str) -> None:
    guest.run(f"{{ {command} & }}")


def shell(guest: Guest, tty: str) -> None:
    start(guest, f"setsid sh -c 'exec sh -i <>{tty} >&0 2>&1'")


def port(guest: Guest, name: str) -> str:
    found = guest.run(f"grep -lx {name} /sys/class/virtio-ports/*/name")
    return f"/dev/{found.split('/')[-2]}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def both_ways(guest: Guest, device: str, end: End) -> None:
    """100 KB to the guest, and back."""
    data = os.urandom(KB100)
    start(guest, f"(head -c {KB100} <{device} >/tmp/in; touch /tmp/done)")
    end.send(data)
    guest.run("while [ ! -e /tmp/done ]; do usleep 100000; done; rm /tmp/done")
    assert guest.run("sha256sum </tmp/in").split()[0] == sha256(data)
    start(guest, f"cat /tmp/in >{device}")
    assert end.take(KB100) == data


def test_a_shell_and_a_paste_of_100_kb_at_a_socket(tmp_path):
    path = tmp_path / "hvc"
    with boot("--console", f"unix:{path}") as guest, End.connect(path) as end:
        assert f"vmexit: console at unix:{path}" in guest.log
        assert guest.run("ls /sys/class/virtio-ports") == "vport0p0"
        shell(guest, "/dev/hvc0")
        end.send(b"echo $((6*7))-here\n")
        end.expect(b"42-here")
        count = KB100 // 8 // SLOW  # each byte of the echo is a request, of 10 ms in the lab
        lines = b"".join(b"%07d\n" % n for n in range(count))
        end.send(b"echo $((6*7))-ready; cat >/tmp/pasted\n")
        end.expect(b"42-ready")
        end.send(lines + b"\x04sha256sum </tmp/pasted\n")
        assert end.expect(sha256(lines).encode()).count(b"\n") >= count
        end.send(b"exit\n")
        start(guest, "sleep 1000 <>/dev/hvc0")
        guest.run("stty -F /dev/hvc0 raw -echo")
        while select.select([end.fd], [], [], 0.5)[0]:
            os.read(end.fd, 4096)
        end.data = b""
        both_ways(guest, "/dev/hvc0", end)


def test_a_port_with_a_name_carries_data_both_ways(tmp_path):
    path = tmp_path / "port"
    with boot("--console", f"unix:{path},name=org.example.0") as guest, End.connect(path) as end:
        assert f"vmexit: port org.example.0 at unix:{path}" in guest.log
        device = port(guest, "org.example.0")
        assert guest.run("ls /dev/hvc0 2>&1").count("No such file")
        end.send(b"early ")  # waits for a program that opens the port
        guest.run(f"head -c 6 <{device} >/tmp/early")
        assert guest.run("cat /tmp/early") == "early "
        both_ways(guest, device, end)


def test_several_at_once_and_one_that_is_not_read(tmp_path):
    paths = [tmp_path / str(n) for n in range(4)]
    names = ("", ",name=first", "", ",name=second")
    options = [w for p, n in zip(paths, names, strict=True) for w in ("--console", f"unix:{p}{n}")]
    with boot(*options) as guest:
        ends = [End.connect(path) for path in paths]
        assert len(guest.run("ls /dev/hvc[0-9]").split()) >= 2
        devices = ["/dev/hvc0", port(guest, "first"), "/dev/hvc1", port(guest, "second")]
        # Nobody reads this one: what is too much is lost, and the guest goes on.
        guest.run(
            f"head -c 3000000 /dev/zero >{devices[0]}; head -c 3000000 /dev/zero >{devices[1]}"
        )
        for number, device in enumerate(devices[2:], 2):
            guest.run(f"echo out-{number} >{device}")
            end_of_line = b"\r\n" if "hvc" in device else b"\n"
            ends[number].expect(b"out-%d" % number + end_of_line)
        both_ways(guest, devices[3], ends[3])
        for end in ends:
            os.close(end.fd)


def set_size(fd: int, columns: int, rows: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def wait_for_size(guest: Guest, tty: str, expected: str) -> None:
    end = time.monotonic() + SECONDS
    while (size := guest.run(f"stty -F {tty} size")) != expected:
        assert time.monotonic() < end, size


def test_the_size_follows_that_of_a_pseudo_terminal():
    with boot("--console", "pty") as guest:
        found = re.search(r"console at (/dev/pts/\d+)", guest.log)
        assert found
        with End(os.open(found[1], os.O_RDWR | os.O_NOCTTY)) as end:
            set_size(end.fd, 101, 37)
            shell(guest, "/dev/hvc0")
            wait_for_size(guest, "/dev/hvc0", "37 101")
            set_size(end.fd, 55, 11)
            wait_for_size(guest, "/dev/hvc0", "11 55")
            end.send(b"stty size\n")
            end.expect(b"11 55")
            end.send(b"exit\n")


def test_a_terminal_as_the_only_console():
    """The kernel has none before the module is loaded; then the size is the terminal's."""
    run = ["run", "--accel", ACCEL, "--kernel", str(debian_kernel(FLAVOUR)), "--console", "stdio"]
    run += ["--initrd", str(initrd_with(FLAVOUR, "virtio_console"))]
    terminal = Terminal(*run, "--append", "console=hvc0 quiet", "--timeout", str(150 * SLOW))
    try:
        set_size(terminal.master, 91, 31)
        terminal.expect(b"/root # ")
        for columns, rows in ((91, 31), (71, 21)):
            set_size(terminal.master, columns, rows)
            end = time.monotonic() + SECONDS
            while b"%d %d\r" % (rows, columns) not in terminal.output:
                assert time.monotonic() < end, terminal.output[-500:]
                terminal.type(b"stty size\r")
                terminal.take(0.5)
        # Before that program runs, ^C is a key of the shell's line editor, or the shell's own.
        terminal.type(b"sh -c 'echo $((6*6))-asleep; exec sleep 1000'\r")
        terminal.expect(b"36-asleep\r")
        terminal.type(b"\x03echo $((6*7))-alive\r")
        terminal.expect(b"42-alive")
        terminal.type(b"\x01x")
        assert terminal.wait() == 130 and terminal.mode() == terminal.before
    finally:
        terminal.close()


@pytest.mark.parametrize("more", [(), ("--console", "null,name=port")])
def test_input_that_is_there_from_the_start_is_not_lost(more):
    command = ["run", "--accel", ACCEL, "--kernel", debian_kernel(FLAVOUR), "--console", "stdio"]
    command += ["--initrd", initrd_with(FLAVOUR, "virtio_console"), *more]
    done = vmexit(
        *command, "--append", "console=hvc0 quiet", "--timeout", str(90 * SLOW),
        stdin=b"echo =$((6*7))=\npoweroff -f\n",
    )  # fmt: skip
    assert done.status == 0 and "=42=" in done.out, done


def test_output_that_nobody_reads_does_not_outlast_the_time_limit():
    with Guest(
        debian_kernel(FLAVOUR),
        initrd_with(FLAVOUR, "virtio_console"),
        "quiet console=hvc0",
        *("--console", "stdio", "--timeout", "25"),
        accel=ACCEL,
    ) as guest:
        guest.boot()
        guest.type("cat /dev/zero\n")
        assert guest.process.wait(60) == 124


def test_sizes_of_several_consoles_are_told_by_messages():
    with boot("--console", "null", "--console", "pty") as guest:
        found = re.search(r"console at (/dev/pts/\d+)", guest.log)
        assert found
        with End(os.open(found[1], os.O_RDWR | os.O_NOCTTY)) as end:
            set_size(end.fd, 101, 37)
            start(guest, "sleep 1000 <>/dev/hvc1")
            end_of_time = time.monotonic() + SECONDS
            # Some versions of Linux take columns for rows.
            while (size := guest.run("stty -F /dev/hvc1 size")) not in ("37 101", "101 37"):
                assert time.monotonic() < end_of_time, size


def test_standard_input_and_output_as_the_only_console():
    with boot("--console", "stdio", append="quiet console=hvc0") as guest:
        assert guest.run("cat /sys/class/tty/console/active").endswith("hvc0")
        assert guest.run("tty") == "/dev/hvc0"
        count = 20_000 // SLOW  # two requests for each line
        assert guest.run(f"seq {count}").split() == [str(n + 1) for n in range(count)]
