"""Disks that another program serves: QEMU's storage daemon, by vhost-user, with Linux's driver."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, Guest
from test_linux_virtio import MIB, ext4, fsck

pytestmark = [
    pytest.mark.linux,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not shutil.which("qemu-storage-daemon") or not shutil.which("qemu-img"),
        reason="no qemu-storage-daemon; apt-get install qemu-system-common qemu-utils",
    ),
]

MODULES = ("virtio_blk", "ext4")


def boot(*options: str) -> Guest:
    flavour = "cloud-amd64"
    options = ("--timeout", "500", *options)
    initrd = initrd_with(flavour, *MODULES)
    guest = Guest(debian_kernel(flavour), initrd, "quiet", *options, accel=ACCEL)
    guest.boot()
    return guest


def with_ext4(path: Path, mib: int, kind: str = "qcow2") -> Path:
    """An image of format `kind` with a new file system."""
    raw = ext4(path.with_suffix(".raw"), mib)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, raw, path], check=True)
    raw.unlink()
    return path


def check(image: Path, kind: str = "qcow2") -> None:
    """The image and the file system in it are clean."""
    done = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True)
    assert "No errors were found" in done.stdout, done
    raw = image.with_suffix(".checked")
    subprocess.run(["qemu-img", "convert", "-f", kind, "-O", "raw", image, raw], check=True)
    fsck(raw)


@pytest.mark.parametrize(
    ("kind", "mib"), [("qcow2", 20), ("vdi", 4), pytest.param("qcow2", 200, marks=pytest.mark.soak)]
)
def test_a_file_system_in_an_image(tmp_path, kind, mib):
    data = os.urandom(MIB) * mib
    source, target = tmp_path / "source", tmp_path / f"target.{kind}"
    source.write_bytes(data)
    with_ext4(target, mib + 32, kind)
    drives = ["--drive", f"file={source},readonly=on", "--drive", f"file={target}"]
    with boot(*drives) as guest:
        guest.run("mount /dev/vdb /mnt && cp /dev/vda /mnt/copy && umount /mnt", 400)
        sums = guest.run("mount /dev/vdb /mnt; sha256sum </mnt/copy; umount /mnt", 400)
        assert sums.split()[0] == hashlib.sha256(data).hexdigest()
        assert not guest.run("dmesg | grep -iE 'i/o error|ext4-fs error|virtio.*error'")
        guest.power_off("poweroff")
    check(target, kind)


def test_what_is_synced_survives_a_kill_and_no_daemon_stays(tmp_path):
    disk = with_ext4(tmp_path / "disk.qcow2", 64)
    with boot("--drive", f"file={disk}") as guest:
        guest.run("mount /dev/vda /mnt && seq 100000 >/mnt/numbers && sync")
        guest.process.send_signal(signal.SIGKILL)
        guest.process.wait(10)
        guest.process.communicate(timeout=30)  # the daemon holds no pipe of it any more
    numbers = "".join(f"{n}\n" for n in range(1, 100001)).encode()
    end = time.monotonic() + 60
    while True:  # the daemon may still write the image out; it holds a lock on it until then
        info = subprocess.run(["qemu-img", "info", disk], capture_output=True, text=True)
        if info.returncode == 0:
            break
        assert "lock" in info.stderr and time.monotonic() < end, info.stderr
    with boot("--drive", f"file={disk}") as guest:
        guest.run("mount /dev/vda /mnt")  # which recovers the journal
        digest = hashlib.sha256(numbers).hexdigest()
        assert guest.run("sha256sum </mnt/numbers").split()[0] == digest
        guest.run("umount /mnt")
        guest.power_off("poweroff")
    check(disk)


def test_a_read_only_image_stays_as_it_is(tmp_path):
    disk = with_ext4(tmp_path / "disk.qcow2", 16)
    before = disk.read_bytes()
    with boot("--drive", f"file={disk},readonly=on") as guest:
        assert guest.run("cat /sys/block/vda/ro") == "1"
        assert "lost+found" in guest.run("mount -o ro /dev/vda /mnt && ls /mnt")
        guest.power_off("poweroff")
    assert disk.read_bytes() == before


class Daemon:
    """A storage daemon of our own, as users start one."""

    def __init__(self, image: Path, socket: Path) -> None:
        image_options = f"driver=raw,node-name=d,file.driver=file,file.filename={image}"
        export = f"vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={socket}"
        socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            ["qemu-storage-daemon", "--blockdev", image_options, "--export", export]
        )
        end = time.monotonic() + 60
        while not socket.exists():
            assert time.monotonic() < end and self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


def test_a_back_end_that_is_away_for_a_while_loses_nothing(tmp_path):
    image, socket = ext4(tmp_path / "disk", 64), tmp_path / "socket"
    daemon = Daemon(image, socket)
    try:
        with boot("--drive", f"vhost-user:{socket},reconnect=60") as guest:
            guest.run("mount /dev/vda /mnt && cp /bin/busybox /mnt/1 && sync")
            copy = "for i in $(seq 9); do cp /mnt/$i /mnt/$((i + 1)); sync; done"
            guest.type(f"({copy}; echo fin''ished) &\n")
            daemon.kill()
            daemon = Daemon(image, socket)
            guest.expect(b"finished")
            daemon.kill()
            guest.type("\n")
            daemon = Daemon(image, socket)
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            found = guest.run("sha256sum /bin/busybox /mnt/? /mnt/10 | cut -c 1-64 | uniq -c")
            assert found.split()[0] == "11" and len(found.split()) == 2
            assert not guest.run("dmesg | grep -iE 'i/o error|ext4-fs error|virtio.*error'")
            guest.power_off("poweroff")
    finally:
        daemon.kill()
    fsck(image)


def test_a_back_end_that_ends_for_good_ends_the_run(tmp_path):
    image, socket = tmp_path / "disk", tmp_path / "socket"
    image.write_bytes(bytes(MIB))
    daemon = Daemon(image, socket)
    try:
        with boot("--drive", f"vhost-user:{socket}") as guest:
            daemon.kill()
            assert guest.status() == 4
            last = guest.output.decode().strip().splitlines()[-1]
            assert "vmexit: the vhost-user back end at " in last
            assert "it has ended; start it" in last
    finally:
        daemon.kill()
