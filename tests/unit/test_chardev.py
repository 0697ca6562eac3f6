"""Bytes go to, and come from, real files, sockets, pseudo-terminals and standard streams.

Nobody at the other end, one who leaves or one who never reads: none of them stops the guest, and
after close() no descriptor is left.
"""

import gc
import os
import resource
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import pytest

from vmexit.backends import chardev as backends
from vmexit.backends.chardev import Chardev
from vmexit.backends.wait import Ending, never
from vmexit.core.errors import ConfigError, HostError
from vmexit.core.loop import EventLoop

pytestmark = pytest.mark.timeout(30)  # whatever waits for ever must fail

EVERY_BYTE = bytes(range(256))

# It holds nothing until something is watched.
IDLE = EventLoop(lambda error: None)


def open_chardev(spec: str, ending: Ending = never, loop: EventLoop = IDLE) -> Chardev:
    return backends.open_chardev(spec, loop, ending)


def descriptors() -> dict[str, str]:
    gc.collect()
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        path = Path("/proc/self/fd") / entry
        if path.is_symlink():  # not the one that listdir() used
            found[entry] = str(path.readlink())
    return found


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors().items() <= before.items()


@pytest.fixture(params=["unix", "tcp"])
def listener(request, tmp_path) -> Iterator[Chardev]:
    spec = f"unix:{tmp_path}/socket" if request.param == "unix" else "tcp:127.0.0.1:0"
    chardev = open_chardev(spec)
    yield chardev
    chardev.close()


def connect(where: str) -> socket.socket:
    """A client of the address that `where` tells the user."""
    kind, _, address = where.partition(":")
    if kind == "unix":
        client = socket.socket(socket.AF_UNIX)
        client.connect(address)
    else:
        host, _, port = address.rpartition(":")
        client = socket.create_connection((host, int(port)))
    client.settimeout(10)
    return client


def poll(chardev: Chardev, count: int) -> bytes:
    """Read as a guest does: again and again, until there are so many bytes."""
    data = b""
    while len(data) < count:
        piece = chardev.read(min(16, count - len(data)))
        assert len(piece) <= 16
        data += piece
    return data


def receive(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = client.recv(count - len(data))
        assert piece, "the connection ended"
        data += piece
    return data


# Sockets.


def test_a_client_gets_every_byte_and_the_guest_gets_every_byte_of_the_client(listener) -> None:
    with connect(listener.where) as client:
        client.sendall(EVERY_BYTE)
        assert poll(listener, 256) == EVERY_BYTE
        assert listener.read(16) == b""
        listener.write(EVERY_BYTE)
        listener.write(b"!")
        assert receive(client, 257) == EVERY_BYTE + b"!"


def test_with_no_client_output_is_dropped_and_input_empty(listener) -> None:
    listener.write(b"nobody hears this")
    assert listener.read(16) == b""
    with connect(listener.where) as client:
        listener.write(b"somebody")
        assert receive(client, 8) == b"somebody"


def test_after_a_client_has_gone_the_next_is_served(listener) -> None:
    for text in (b"first", b"second", b"third"):
        with connect(listener.where) as client:
            client.sendall(text)
            assert poll(listener, len(text)) == text
            listener.write(text)
            assert receive(client, len(text)) == text


def test_writing_to_a_client_that_has_gone_raises_nothing_and_finds_the_next(listener) -> None:
    with connect(listener.where):
        listener.write(b"hello")  # unread: the end of the connection is a reset
    with connect(listener.where) as second:
        while not select.select([second], [], [], 0)[0]:
            listener.write(b"again")
        assert receive(second, 5) == b"again"


def test_of_two_clients_one_is_served_and_the_other_after_it(listener) -> None:
    with connect(listener.where) as first, connect(listener.where) as second:
        second.sendall(b"from second")
        first.sendall(b"from first")
        assert poll(listener, 10) == b"from first"
        listener.write(b"to first")
        assert receive(first, 8) == b"to first"
        assert not select.select([second], [], [], 0)[0]
        assert listener.read(16) == b""
        first.close()
        assert poll(listener, 11) == b"from second"
        listener.write(b"to second")
        assert receive(second, 9) == b"to second"


def test_a_client_that_never_reads_does_not_hold_up_the_guest_for_ever(listener) -> None:
    with connect(listener.where) as client:
        listener.write(bytes(64 << 20))  # more than any socket buffer
        client.sendall(b"still here")
        assert poll(listener, 10) == b"still here"
        client.setblocking(False)
        taken = 0
        try:
            while piece := client.recv(1 << 20):
                assert not piece.strip(b"\0")
                taken += len(piece)
        except BlockingIOError:
            pass
        assert 0 < taken < 64 << 20
        client.settimeout(10)
        listener.write(b"\1")
        while (byte := client.recv(1)) == b"\0":
            pass
        assert byte == b"\1"


def test_once_the_run_ends_a_client_that_never_reads_is_not_waited_for(tmp_path) -> None:
    asked = []
    listener = open_chardev(f"unix:{tmp_path}/socket", ending=lambda: not asked.append(1))
    with connect(listener.where):
        listener.write(bytes(64 << 20))
        assert asked == [1]  # the first answer was enough
        listener.write(b"x")
        assert asked == [1, 1]
    listener.close()


def test_close_ends_the_connection_and_is_harmless_twice_and_so_is_use_after_it(listener) -> None:
    with connect(listener.where) as client:
        listener.write(b"x")
        listener.close()
        listener.close()
        assert receive(client, 1) == b"x" and client.recv(1) == b""
    with pytest.raises(OSError, match=r"refused|No such file"):
        connect(listener.where)
    listener.write(b"y")
    assert listener.read(1) == b""


def test_only_the_owner_may_use_a_unix_socket_and_close_removes_it(tmp_path) -> None:
    path = tmp_path / "socket"
    chardev = open_chardev(f"unix:{path}")
    try:
        assert chardev.where == f"unix:{path}"
        mode = path.stat().st_mode
    finally:
        chardev.close()
    assert stat.S_ISSOCK(mode) and not path.exists()
    assert oct(stat.S_IMODE(mode)) == oct(0o600)


def test_a_unix_path_in_use_is_a_config_error_and_what_is_there_stays(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(ConfigError, match=f"{file}: Address already in use; use another"):
        open_chardev(f"unix:{file}")
    assert file.read_text() == "precious"
    first = open_chardev(f"unix:{tmp_path}/socket")
    with pytest.raises(ConfigError, match="already in use"):
        open_chardev(f"unix:{tmp_path}/socket")
    with connect(first.where) as client:
        client.sendall(b"works")
        assert poll(first, 5) == b"works"
    first.close()


def test_a_tcp_port_in_use_is_a_config_error_and_free_again_after_close() -> None:
    first = open_chardev("tcp:127.0.0.1:0")
    spec = first.where
    assert int(spec.rpartition(":")[2]) > 0
    with pytest.raises(ConfigError, match=f"at {spec[4:]}: Address already in use; use another"):
        open_chardev(spec)
    with connect(first.where) as client:
        first.write(b"x")
        assert receive(client, 1) == b"x"
        first.close()  # the side that closes first, whose port stays in TIME_WAIT
        assert client.recv(1) == b""
    second = open_chardev(spec)
    assert second.where == spec
    second.close()


# Files.


def test_a_file_is_emptied_and_gets_every_byte(tmp_path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"old" * 1000)
    loop = EventLoop(lambda error: None)
    chardev = open_chardev(f"file:{path}", loop=loop)
    assert path.read_bytes() == b""
    chardev.write(EVERY_BYTE)
    chardev.write(b"!")
    chardev.running(False)
    loop.close()
    assert path.read_bytes() == EVERY_BYTE + b"!"
    assert chardev.read(16) == b""
    chardev.close()
    chardev.close()
    chardev.write(b"late")
    assert path.read_bytes() == EVERY_BYTE + b"!"


def test_a_full_device_is_a_host_error_that_says_so() -> None:
    chardev = open_chardev("file:/dev/full")
    with pytest.raises(HostError, match="No space left on device"):
        chardev.write(b"x\n")
    chardev.close()


def test_null_is_nowhere() -> None:
    chardev = open_chardev("null")
    chardev.write(b"x")
    assert (chardev.read(16), chardev.where) == (b"", "")
    chardev.close()


BAD = [
    "", "serial", "null:", "stdio:x", "pty:x", "NULL", "file", "file:", "unix", "unix:", "tcp:",
    "tcp:localhost", "tcp::80", "tcp:localhost:", "tcp:localhost:http", "tcp:localhost:65536",
    "tcp:localhost:-1", "udp:localhost:80", "file:/nonexistent/log", "file:/",
    "unix:/nonexistent/s", "unix:" + "x" * 200, "tcp:256.256.256.256:80", "tcp:192.0.2.1:80",
    "tcp:a..b:80", "new\nline",
]  # fmt: skip
ODD = [
    "file:nul\0byte", "unix:nul\0byte", "file:\ud800", "unix:\ud800", "file:/no\nsuch/x",
    "unix:/no\nsuch/x", "tcp:localhost:" + "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("spec", BAD + ODD, ids=lambda s: ascii(s)[:40])
def test_a_place_that_cannot_be_is_a_config_error_naming_it_with_a_remedy(
    tmp_path, monkeypatch, spec
) -> None:
    monkeypatch.chdir(tmp_path)
    before = descriptors()
    with pytest.raises(ConfigError) as caught:
        open_chardev(spec).close()
    assert descriptors() == before  # even while the error is held
    what, _, remedy = str(caught.value).partition("; ")
    assert len(str(caught.value).splitlines()) == 1
    name = (spec.partition(":")[2] or spec)[:100]
    assert name in what or ascii(name)[1:-1] in what
    assert remedy.startswith("use ")
    assert not list(tmp_path.iterdir())


# Pseudo-terminals.


@pytest.fixture
def pty() -> Iterator[Chardev]:
    chardev = open_chardev("pty")
    yield chardev
    chardev.close()


def open_terminal(where: str) -> int:
    return os.open(where, os.O_RDWR | os.O_NOCTTY)


def read_terminal(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += os.read(fd, count - len(data))
    return data


def test_a_pty_passes_every_byte_both_ways_unchanged_and_without_echo(pty) -> None:
    terminal = open_terminal(pty.where)
    os.write(terminal, EVERY_BYTE)
    assert poll(pty, 256) == EVERY_BYTE
    pty.write(EVERY_BYTE)
    assert read_terminal(terminal, 256) == EVERY_BYTE
    assert pty.read(16) == b""
    os.close(terminal)


def test_a_terminal_program_may_leave_and_come_back(pty) -> None:
    for text in (b"first", b"second"):
        terminal = open_terminal(pty.where)
        os.write(terminal, text)
        assert poll(pty, len(text)) == text
        os.close(terminal)
        assert pty.read(16) == b""


def test_a_terminal_that_nobody_reads_does_not_hold_up_the_guest(pty) -> None:
    for _ in range(1024):
        pty.write(b"x" * 1024)
    terminal = open_terminal(pty.where)
    os.set_blocking(terminal, False)
    taken = b""
    try:
        while piece := os.read(terminal, 65536):
            taken += piece
    except BlockingIOError:
        pass
    assert 0 < len(taken) < 1 << 20 and not taken.strip(b"x")
    os.set_blocking(terminal, True)
    pty.write(b"y")
    assert read_terminal(terminal, 1) == b"y"
    os.close(terminal)


def test_a_pty_may_be_closed_twice_and_used_after_it_like_every_other_place(pty) -> None:
    pty.close()
    pty.close()
    assert pty.read(16) == b""
    pty.write(b"late")


@pytest.mark.parametrize("spec", ["file:log", "unix:socket", "tcp:127.0.0.1:0", "pty"])
def test_no_descriptor_is_passed_on_to_other_programs(tmp_path, monkeypatch, spec) -> None:
    monkeypatch.chdir(tmp_path)
    before = descriptors()
    chardev = open_chardev(spec)
    opened = descriptors().keys() - before.keys()
    assert opened and not any(os.get_inheritable(int(fd)) for fd in opened)
    chardev.close()


@pytest.mark.parametrize("spec", ["unix:socket", "pty"])
def test_a_program_may_have_more_than_1024_descriptors_open(tmp_path, monkeypatch, spec) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"this process may open only {hard} descriptors")
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1024):
            stack.enter_context(open("/dev/null"))
        chardev = open_chardev(spec)
        stack.callback(chardev.close)
        client = connect(chardev.where).detach() if spec != "pty" else open_terminal(chardev.where)
        stack.callback(os.close, client)
        os.write(client, b"typed")
        assert poll(chardev, 5) == b"typed"
        chardev.write(bytes(8 << 20))


# Standard input and output, in a process of their own.


def test_close_leaves_the_socket_of_another_alone(tmp_path) -> None:
    path = tmp_path / "socket"
    first = open_chardev(f"unix:{path}")
    path.unlink()
    second = open_chardev(f"unix:{path}")
    first.close()
    assert path.is_socket()
    second.close()
    assert not path.exists()


IMPORT = (
    "import os, sys\n"
    "from vmexit.backends import chardev\n"
    "from vmexit.core.loop import EventLoop\n"
    "def open_chardev(spec, *ending):\n"
    "    return chardev.open_chardev(spec, EventLoop(print), *ending)\n"
)
ECHO = """
c = open_chardev("stdio")
data = b""
while len(data) < 256:
    data += c.read(16)
print("before", end="", flush=False)
c = open_chardev("stdio")
c.write(data)
c.running(False)
"""


def run(code: str, **options) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", IMPORT + code]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(command, timeout=20, stderr=subprocess.PIPE, env=environment, **options)


def test_stdio_passes_every_byte_both_ways_behind_what_was_printed_before() -> None:
    done = run(ECHO, input=EVERY_BYTE, stdout=subprocess.PIPE)
    assert (done.stdout, done.stderr) == (b"before" + EVERY_BYTE, b"")


@pytest.mark.parametrize("blocking", [True, False])
def test_standard_output_waits_for_a_slow_reader_and_loses_nothing(blocking) -> None:
    code = f"os.set_blocking(1, {blocking})\nopen_chardev('stdio').write(bytes(range(256)) * 4096)"
    done = run(code, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert (done.stdout == EVERY_BYTE * 4096, done.stderr) == (True, b"")


def test_standard_output_that_nobody_reads_is_not_waited_for_once_the_run_ends() -> None:
    out, into = os.pipe()
    code = "asked = []\nc = open_chardev('stdio', lambda: len(asked) > 2 or asked.append(1))\n"
    code += "c.write(bytes(1 << 20))\nassert len(asked) == 3\nc.write(b'x')"
    done = run(code, stdin=subprocess.DEVNULL, stdout=into)
    os.close(into)
    os.close(out)
    assert (done.returncode, done.stderr) == (0, b"")


STOPS = (
    "c = open_chardev('stdio')\nassert not any(c.read(1) for _ in range(1000))\nc.write(b'ok\\n')"
)


@pytest.mark.parametrize("how", ["end of file", "closed"])
def test_without_standard_input_there_is_no_input(how) -> None:
    options = {"stdin": subprocess.DEVNULL} if how == "end of file" else {}
    code = STOPS
    if how == "closed":
        code = f"os.close(0)\n{STOPS}"
    done = run(code, stdout=subprocess.PIPE, **options)
    assert (done.stdout, done.stderr) == (b"ok\n", b"")


def test_without_standard_output_opening_it_gives_an_error_of_ours_or_none() -> None:
    """As in `vmexit run … >&-`, where Python has no sys.stdout."""
    command = [sys.executable, "-c", IMPORT + "open_chardev('stdio')"]
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(shell, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=20)
    assert b"AttributeError" not in done.stderr


def test_a_reader_of_standard_output_that_has_gone_is_a_host_error() -> None:
    out, into = os.pipe()
    os.close(out)
    code = """
from vmexit.core.errors import HostError
try:
    open_chardev("stdio").write(b"x\\n")
except HostError as error:
    sys.stderr.write(str(error))
"""
    done = run(code, stdin=subprocess.DEVNULL, stdout=into)
    os.close(into)
    assert b"Broken pipe" in done.stderr and b"Traceback" not in done.stderr


@pytest.fixture
def typed() -> Iterator[int]:
    """A terminal on which somebody has typed a line."""
    master, slave = os.openpty()
    os.write(master, b"typed\n")
    yield slave
    os.close(master)
    os.close(slave)


def test_a_terminal_that_does_not_control_the_process_can_be_read(typed) -> None:
    """As under setsid, or with a terminal passed on from another session."""
    code = "c = open_chardev('stdio')\nc.running(True)\ndata = b''\n"
    code += "while len(data) < 6: data += c.read(6)\nc.write(data)"
    done = run(code, stdin=typed, stdout=subprocess.PIPE, start_new_session=True)
    assert (done.stdout, done.stderr) == (b"typed\n", b"")


BACKGROUND = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the session's terminal; we are its foreground
pid = os.fork()
if not pid:
    os.setpgid(0, 0)
    c = open_chardev("stdio")
    os._exit(any(c.read(1) for _ in range(100)))
_, status = os.waitpid(pid, os.WUNTRACED)
if os.WIFSTOPPED(status):
    os.kill(pid, signal.SIGKILL)
    sys.exit("stopped")
c = open_chardev("stdio")
c.running(True)
data = b""
while len(data) < 6:
    data += c.read(6)
c.write(b"%d " % status + data)
"""


def test_in_the_background_a_terminal_is_left_alone_and_in_the_foreground_read(typed) -> None:
    done = run(BACKGROUND, stdin=typed, stdout=subprocess.PIPE, start_new_session=True)
    assert (done.stdout, done.stderr) == (b"0 typed\n", b"")


@pytest.fixture
def loop():
    failures: list[BaseException] = []
    loop = EventLoop(failures.append)
    yield loop
    loop.close()
    assert failures == []


def arrivals(chardev: Chardev) -> "SimpleQueue[bytes]":
    """What arrives, as a device takes it that is told of it."""
    taken: SimpleQueue[bytes] = SimpleQueue()

    def take() -> None:
        taken.put(chardev.read(4))
        chardev.when_readable(take)

    chardev.when_readable(take)
    return taken


def collect(taken: "SimpleQueue[bytes]", size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += taken.get(timeout=20)
    return data


def test_a_client_is_heard_of_when_it_sends(loop, tmp_path):
    chardev = open_chardev(f"unix:{tmp_path}/socket", loop=loop)
    taken = arrivals(chardev)
    for text in (b"first client", b"second"):  # the one after the other
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/socket")
            client.sendall(text)
            assert collect(taken, len(text)) == text
    chardev.close()


def test_a_client_that_only_the_output_has_met_is_heard_of(loop, tmp_path):
    chardev = open_chardev(f"unix:{tmp_path}/socket", loop=loop)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/socket")
        chardev.write(b"hello")
        taken = arrivals(chardev)
        assert client.recv(5) == b"hello"
        client.sendall(b"answer")
        assert collect(taken, 6) == b"answer"
    chardev.close()


def test_a_client_in_place_of_one_that_reset_is_heard_of(loop, tmp_path):
    chardev = open_chardev(f"unix:{tmp_path}/socket", loop=loop)
    taken = arrivals(chardev)
    client = socket.socket(socket.AF_UNIX)
    client.connect(f"{tmp_path}/socket")
    client.sendall(b"a")
    assert collect(taken, 1) == b"a"
    client.close()
    chardev.write(b"x" * 100)  # finds out that it is gone
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(f"{tmp_path}/socket")
        other.sendall(b"b")
        assert collect(taken, 1) == b"b"
    chardev.close()


def test_a_pseudo_terminal_is_heard_of(loop):
    chardev = open_chardev("pty", loop=loop)
    taken = arrivals(chardev)
    terminal = os.open(chardev.where, os.O_RDWR | os.O_NOCTTY)
    os.write(terminal, b"typed")
    assert collect(taken, 5) == b"typed"
    os.close(terminal)
    chardev.close()


def test_standard_input_is_heard_of_up_to_its_end():
    code = """
import queue
q = queue.SimpleQueue()
c = open_chardev("stdio")
def take():
    q.put(c.read(100))
    c.when_readable(take)
c.when_readable(take)
data = b""
while piece := q.get(timeout=20):
    data += piece
assert data == b"some input", data
c.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT + code], input=b"some input", timeout=25, check=False
    )
    assert done.returncode == 0


def test_a_client_that_reads_nothing_holds_a_guest_up_once_only(tmp_path) -> None:
    path = tmp_path / "socket"
    loop = EventLoop(lambda error: None)
    chardev = backends.open_chardev(f"unix:{path}", loop)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            chardev.write(bytes(1 << 20))  # more than the socket takes
            begin = time.monotonic()
            for _ in range(5000):
                chardev.write(b"x")
            assert time.monotonic() - begin < 20  # 20 ms each would be 100 s
    finally:
        chardev.close()
        loop.close()


def test_a_client_for_whom_there_is_no_descriptor_waits_and_keeps_nobody_busy(tmp_path):
    loop = EventLoop(print)
    listener = backends.open_chardev(f"unix:{tmp_path}/socket", loop)
    ready: SimpleQueue[None] = SimpleQueue()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as client:
        listener.when_readable(lambda: None)  # the loop has its descriptors
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            client.connect(f"{tmp_path}/socket")
            client.send(b"hello")
            assert listener.read(5) == b""
            listener.when_readable(lambda: ready.put(None))
            assert listener._rests  # else it would be called at once, again and again
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        ready.get(timeout=20)
        assert listener.read(5) == b"hello"
    listener.close()
    loop.close()
