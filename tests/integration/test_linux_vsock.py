"""Linux's own vsock driver against our device: real programs at both ends."""

import gzip
import hashlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, Guest

from vmexit import Machine
from vmexit.fetch.cpio import archive, executable

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]

FLAVOUR = "cloud-amd64"
SOURCE = Path(__file__).with_name("vsock_guest.c")
SECONDS = 100
MANY = 64
SIZE = 10_000_000


@pytest.fixture(scope="session")
def initrd(tmp_path_factory) -> Path:
    """With the driver, and the program of these tests."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc; apt-get install gcc libc6-dev")
    base = initrd_with(FLAVOUR, "vmw_vsock_virtio_transport")
    folder = tmp_path_factory.mktemp("vsock")
    program = folder / "vs"
    subprocess.run(["gcc", "-O2", "-Wall", "-static", SOURCE, "-o", program], check=True)
    path = folder / "initrd.gz"
    more = gzip.compress(archive([executable("bin/vs", program.read_bytes())]))
    path.write_bytes(base.read_bytes() + more)  # the kernel unpacks one after the other
    return path


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "v.sock")


@pytest.fixture
def guest(initrd, path) -> Iterator[Guest]:
    options = ["--vsock", f"cid=42,path={path}"]
    with Guest(debian_kernel(FLAVOUR), initrd, "quiet", *options, accel=ACCEL) as guest:
        guest.boot()
        yield guest
        guest.power_off()
    assert not os.path.exists(path)


def server(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(128)
    listening.settimeout(SECONDS)
    return listening


def connect(path: str, port: int) -> socket.socket:
    """To the guest, up to the answer."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(SECONDS)
    client.connect(path)
    client.sendall(b"CONNECT %d\n" % port)
    line = b""
    while not line.endswith(b"\n"):
        part = client.recv(1)
        assert part, "the guest has refused"
        line += part
    word, host_port = line.split()
    assert word == b"OK" and int(host_port) >= 1 << 30
    return client


def rest(connected: socket.socket) -> bytes:
    """All that comes until the end."""
    parts = []
    while part := connected.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def exchange(connected: socket.socket, data: bytes) -> bytes:
    """Send it and then the end, while reading; what has come."""

    def send() -> None:
        connected.sendall(data)
        connected.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    found = rest(connected)
    sender.join()
    return found


def test_the_host_connects(guest, path):
    guest.run("vs echo 1234")
    with connect(path, 1234) as client:
        assert exchange(client, b"hello") == b"hello"
    with connect(path, 1234) as first, connect(path, 1234) as second:
        first.sendall(b"1")
        second.sendall(b"2")
        assert (first.recv(10), second.recv(10)) == (b"1", b"2")
        first.shutdown(socket.SHUT_WR)  # and the other one goes on
        assert first.recv(10) == b""
        second.sendall(b"3")
        assert second.recv(10) == b"3"
    with socket.socket(socket.AF_UNIX) as client:  # where nobody listens
        client.settimeout(SECONDS)
        client.connect(path)
        client.sendall(b"CONNECT 4321\n")
        assert client.recv(10) == b""


def test_the_guest_connects(guest, path):
    assert guest.run("vs cat 2 52 </dev/null 2>&1") == "connect: Connection reset by peer"
    assert guest.run("vs cat 7 52 </dev/null 2>&1") == "connect: Connection reset by peer"
    with server(f"{path}_52") as listening, ThreadPoolExecutor(1) as pool:

        def serve() -> bytes:
            with listening.accept()[0] as connected:
                found = rest(connected)  # the guest has closed its half
                connected.sendall(found.upper())
                return found

        found = pool.submit(serve)
        assert guest.run("echo hello | vs cat 2 52") == "HELLO"
        assert found.result() == b"hello\n"
    assert guest.run("vs cat 2 52 </dev/null 2>&1") == "connect: Connection reset by peer"


def test_10_mb_from_the_guest(guest, path):
    with server(f"{path}_52") as listening, ThreadPoolExecutor(1) as pool:

        def serve() -> int:
            with listening.accept()[0] as connected:
                data = rest(connected)
                connected.sendall(hashlib.sha256(data).hexdigest().encode())
                return len(data)

        size = pool.submit(serve)
        guest.run(f"head -c {SIZE} /dev/urandom >/file")
        expected = guest.run("sha256sum </file").split()[0]
        assert guest.run("vs cat 2 52 </file") == expected
        assert size.result() == SIZE


def test_10_mb_to_the_guest_and_back(guest, path):
    data = os.urandom(SIZE)
    guest.run("vs echo 1")
    with connect(path, 1) as client:
        assert hashlib.sha256(exchange(client, data)).digest() == hashlib.sha256(data).digest()


def test_many_connections_of_the_host_at_once(guest, path):
    guest.run("vs echo 1")
    everybody = threading.Barrier(MANY, timeout=SECONDS)

    def talk(number: int) -> bool:
        data = bytes([number]) * 20_000
        with connect(path, 1) as client:
            everybody.wait()  # until all are there
            return exchange(client, data) == data

    with ThreadPoolExecutor(MANY) as pool:
        assert all(pool.map(talk, range(MANY)))


def test_many_connections_of_the_guest_at_once(guest, path):
    everybody = threading.Barrier(MANY, timeout=SECONDS)

    def echo(connected: socket.socket) -> None:
        everybody.wait()
        with connected:
            connected.settimeout(SECONDS)
            while data := connected.recv(1 << 16):
                connected.sendall(data)

    with server(f"{path}_52") as listening, ThreadPoolExecutor(MANY + 1) as pool:

        def serve() -> None:
            for served in [pool.submit(echo, listening.accept()[0]) for _ in range(MANY)]:
                served.result()

        done = pool.submit(serve)
        assert guest.run(f"vs many 52 {MANY} 20000") == f"{MANY} are good"
        done.result()


def test_the_host_closes_while_the_guest_sends(guest, path):
    with server(f"{path}_52") as listening, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            with listening.accept()[0] as connected:
                connected.recv(1)

        done = pool.submit(serve)
        assert "Broken pipe" in guest.run("vs cat 2 52 </dev/zero 2>&1")
        done.result()
    guest.run("vs echo 1")
    with connect(path, 1) as client:
        assert exchange(client, b"and goes on") == b"and goes on"


def test_connections_end_when_a_state_is_restored(initrd, path, tmp_path):
    """And the guest is told so: what listens there goes on."""
    console = socket.socket(socket.AF_UNIX)
    console.settimeout(SECONDS)

    def expect(*texts: bytes) -> None:
        seen = b""
        while not any(text in seen for text in texts):
            part = console.recv(4096)
            assert part, seen
            seen += part

    machine = Machine(
        accel=ACCEL, kernel=debian_kernel(FLAVOUR), initrd=initrd, append="console=ttyS0 quiet",
        serial=f"unix:{tmp_path / 'console'}", vsock=f"path={path}",
    )  # fmt: skip
    with machine as vm, console, ThreadPoolExecutor(1) as pool:
        console.connect(str(tmp_path / "console"))
        run = pool.submit(vm.run, SECONDS)
        try:
            expect(b"/root # ")
            console.sendall(b"vs echo 1; echo listens at $((1))\n")
            expect(b"listens at 1\r\n")
            with connect(path, 1) as client:
                client.sendall(b"before")
                assert client.recv(10) == b"before"
                assert vm.stop()
                run.result()
                device = vm._parts.devices["vsock"]
                device.restore(device.state())
                assert client.recv(10) == b""
            run = pool.submit(vm.run, SECONDS)
            # What the child that echoed is told depends on whether it read again by then.
            expect(b"read: Connection reset by peer", b"read: Transport endpoint is not connected")
            with connect(path, 1) as client:
                assert exchange(client, b"after") == b"after"
        finally:
            vm.stop()
            run.result()
