"""A Debian with systemd on a disk: it boots to the login, and is reached by ssh.

`make test-long`: to make its file system takes a minute, and to boot it another.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from command import FEWER, FULL
from debian_root import Root, debian_root
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, Guest
from test_linux_net import free_port
from test_linux_virtio import fsck

pytestmark = [pytest.mark.linux, pytest.mark.soak, pytest.mark.timeout(10_000 if FULL else 1800)]

FLAVOUR = "cloud-amd64"
MIB = 1 << 20
SECONDS = 4000 if FULL else 900


@pytest.fixture
def root(tmp_path):
    """A copy that may be changed."""
    original = debian_root()
    image = tmp_path / "root.img"
    subprocess.run(["cp", "--sparse=always", original.image, image], check=True)
    key = tmp_path / "key"  # ssh wants it to be ours alone
    key.write_bytes(original.key.read_bytes())
    key.chmod(0o600)
    return Root(image, key)


def boot(root: Root, *options: str) -> Guest:
    initrd = initrd_with(FLAVOUR, "virtio_blk", "ext4", "virtio_net", "virtio_rng")
    options = ("--drive", f"file={root.image}", "--rng", "-m", "512M", *options)
    options = ("--timeout", str(2 * SECONDS), *options)
    append = "root=/dev/vda rw"
    return Guest(debian_kernel(FLAVOUR), initrd, append, *options, accel=ACCEL)


def log_in(guest: Guest) -> None:
    guest.expect(b"vmexit-guest login: ", SECONDS)
    guest.type("root\n")
    guest.expect(b"Password: ", SECONDS)
    guest.type("x\n")
    guest.expect(b"root@vmexit-guest:~# ", SECONDS)


def ask(guest: Guest, command: str) -> str:
    guest.type(f"{command}; echo =$((40+2))=\n")
    return guest.expect(b"=42=", SECONDS)


def power_off(guest: Guest, root: Root) -> None:
    guest.type("poweroff\n")
    assert guest.status(SECONDS) == 0
    fsck(root.image)


def test_it_boots_to_the_login(root):
    with boot(root) as guest:
        log_in(guest)
        assert "0 loaded units listed" in ask(guest, "systemctl --failed --no-pager")
        assert "/dev/vda / ext4" in ask(guest, "cat /proc/mounts")
        power_off(guest, root)


@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; apt-get install passt")
def test_it_is_reached_by_ssh_with_200_mib_each_way(root, tmp_path):
    data = os.urandom(MIB) * (200 // FEWER)  # ssh in an emulated machine: 200 KB a second
    source, back = tmp_path / "data", tmp_path / "back"
    source.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    port = free_port()
    ssh = ["ssh", "-i", root.key, "-p", str(port), "-o", "StrictHostKeyChecking=no"]
    ssh += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "root@127.0.0.1"]

    def by_ssh(command: str, stdin: Path = Path("/dev/null"), stdout: Path | None = None) -> str:
        with stdin.open("rb") as into, (stdout or Path("/dev/null")).open("wb") as out:
            done = subprocess.run(
                [*ssh, command],
                stdin=into,
                stdout=out if stdout else subprocess.PIPE,
                timeout=SECONDS,
            )
        assert done.returncode == 0
        return "" if stdout else done.stdout.decode()

    with boot(root, "--net", f"user,hostfwd=tcp:127.0.0.1:{port}-:22") as guest:
        log_in(guest)
        ask(guest, "while ! ip -4 addr show dev eth0 | grep -q inet; do sleep 1; done")
        assert by_ssh("hostname") == "vmexit-guest\n"
        by_ssh("cat >data", stdin=source)
        assert by_ssh("sha256sum data").split()[0] == digest
        by_ssh("cat data", stdout=back)
        assert hashlib.sha256(back.read_bytes()).hexdigest() == digest
        assert "0 loaded units listed" in ask(guest, "systemctl --failed --no-pager")
        power_off(guest, root)
