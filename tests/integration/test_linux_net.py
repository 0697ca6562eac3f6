"""Linux's network driver against our device: over sockets of the host, and over a tap interface."""

import hashlib
import os
import shutil
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest
from command import FULL
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, Guest

pytestmark = [pytest.mark.linux, pytest.mark.timeout(4000 if FULL else 600)]

MIB = 1 << 20
LIMIT = 3000 if FULL else 400  # seconds for one transfer
SIZES = [10, pytest.param(200, marks=pytest.mark.soak)]

needs_passt = pytest.mark.skipif(
    shutil.which("passt") is None, reason="no passt; apt-get install passt"
)
needs_tap = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or shutil.which("ip") is None,
    reason="a tap interface in a namespace needs root, /dev/net/tun and iproute2",
)


def boot(*options: str, prefix: tuple[str, ...] = ()) -> Guest:
    flavour = "cloud-amd64"
    initrd = initrd_with(flavour, "virtio_net")
    options = ("--timeout", str(500 * (8 if FULL else 1)), *options)
    guest = Guest(debian_kernel(flavour), initrd, "quiet", *options, accel=ACCEL, prefix=prefix)
    guest.boot()
    return guest


class Sender:
    """Sends `data` to each who connects."""

    def __init__(self, data: bytes) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.server.getsockname()[1]
        self.data = data
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()

    def _main(self) -> None:
        try:
            while True:
                client, _ = self.server.accept()
                with client:
                    client.sendall(self.data)
        except OSError:
            return

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@needs_passt
@pytest.mark.parametrize("mib", SIZES)
def test_user_networking_in_both_directions(mib):
    data = os.urandom(MIB) * mib
    digest = hashlib.sha256(data).hexdigest()
    port = free_port()
    forward = f"user,hostfwd=tcp:127.0.0.1:{port}-:80"
    with Sender(data) as sender, boot("--net", forward, "-m", "512M") as guest:
        assert "eth0 has 10.0.2.15" in guest.run("udhcpc -n -q")
        assert "carrier" not in guest.run("cat /sys/class/net/eth0/operstate")
        # The guest reaches the host where its gateway is.
        got = guest.run(f"nc 10.0.2.2 {sender.port} >/tmp/data; sha256sum </tmp/data", LIMIT)
        assert got.split()[0] == digest
        # And the host a server of the guest.
        guest.run("httpd -h /tmp")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data", timeout=LIMIT) as answer:
            assert hashlib.sha256(answer.read()).hexdigest() == digest
        guest.power_off()


@needs_passt
def test_the_interface_is_as_asked_for():
    options = "user,mac=52:54:00:aa:bb:cc,mtu=1400"
    with boot("--net", options, "--net", "user") as guest:
        assert guest.run("cat /sys/class/net/eth0/address") == "52:54:00:aa:bb:cc"
        assert guest.run("cat /sys/class/net/eth0/mtu") == "1400"
        assert guest.run("cat /sys/class/net/eth1/mtu") == "65520"
        assert guest.run("cat /sys/class/net/eth1/address").startswith("52:54:00:")
        guest.run("ip link set eth1 address 52:54:00:01:02:03 && ip link set eth1 up promisc on")
        assert guest.run("cat /sys/class/net/eth1/address") == "52:54:00:01:02:03"
        assert guest.run("cat /sys/class/net/eth1/carrier") == "1"
        assert not guest.run("dmesg | grep -i 'virtio_net.*\\(fail\\|err\\)'")
        guest.power_off()


@needs_passt
def test_the_link_goes_down_when_the_backend_ends():
    with boot("--net", "user") as guest:
        assert "eth0 has" in guest.run("udhcpc -n -q")
        children = Path(f"/proc/{guest.process.pid}/task/{guest.process.pid}/children")
        (passt,) = map(int, children.read_text().split())
        os.kill(passt, 15)
        assert guest.run("while grep -q 1 /sys/class/net/eth0/carrier; do sleep 1; done") == ""
        guest.power_off()


@needs_passt
def test_a_limit_of_the_rate_is_kept():
    """Never too fast; how slow it is at most is the host's affair."""
    data = os.urandom(4 * MIB)
    with Sender(data) as sender, boot("--net", "user,bps=1M") as guest:
        guest.run("udhcpc -n -q")
        script = f"s=$(date +%s); nc 10.0.2.2 {sender.port} | sha256sum; echo $(($(date +%s) - s))"
        digest, _, seconds = guest.run(script).split()
        assert digest == hashlib.sha256(data).hexdigest()
        assert int(seconds) >= 2  # the first MiB comes at once
        guest.power_off()


@pytest.fixture
def namespace():
    """A network namespace of its own; the words that run a command in it."""
    name = f"vmexit-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield ("ip", "netns", "exec", name)
    subprocess.run(["ip", "netns", "delete", name], check=True)


@needs_tap
@pytest.mark.parametrize("mib", SIZES)
def test_a_tap_interface_in_both_directions(namespace, tmp_path, mib):
    data = os.urandom(MIB) * mib
    digest = hashlib.sha256(data).hexdigest()
    source = tmp_path / "data"
    source.write_bytes(data)
    server = [*namespace, "python3", "-m", "http.server", "-d", tmp_path, "-b", "10.9.8.1", "8000"]
    options = ["--net", "tap=vmexit0,address=10.9.8.1/24", "-m", "512M"]
    with boot(*options, prefix=namespace) as guest:
        guest.run("ip addr add 10.9.8.2/24 dev eth0; ip link set eth0 up")
        assert "2 packets received" in guest.run("ping -c 2 10.9.8.1")
        with subprocess.Popen(server, stderr=subprocess.DEVNULL) as web:
            script = "until wget -q -O /tmp/data http://10.9.8.1:8000/data; do sleep 1; done"
            guest.run(script, LIMIT)
            assert guest.run("sha256sum </tmp/data", LIMIT).split()[0] == digest
            web.terminate()
        guest.run("httpd -h /tmp")
        fetch = "import hashlib, urllib.request as r; print(hashlib.sha256(r.urlopen("
        fetch += f"'http://10.9.8.2/data', timeout={LIMIT}).read()).hexdigest())"
        done = subprocess.run([*namespace, "python3", "-c", fetch], capture_output=True, text=True)
        assert done.stdout.strip() == digest, done.stderr
        assert not guest.run("dmesg | grep -iE 'bad gso|partial checksum|hw csum failure'")
        # It was ours, and goes with the machine.
        guest.power_off()
    found = subprocess.run([*namespace, "ip", "link"], capture_output=True, text=True)
    assert "vmexit0" not in found.stdout


@needs_passt
@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root")
def test_a_host_without_a_network_is_told_what_passt_wants():
    flavour = "cloud-amd64"
    files = debian_kernel(flavour), initrd_with(flavour, "virtio_net")
    options = ("--net", "user")
    with Guest(*files, "quiet", *options, accel=ACCEL, prefix=("unshare", "--net")) as guest:
        assert guest.status() == 2
        assert b"it needs an interface with a default route, or use tap=" in guest.output
