"""Linux on disks with overlays, snapshots, direct I/O, several queues and limits."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from test_linux_virtio import MIB, boot, content, ext4, fsck

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_two_queues_for_two_cpus(tmp_path):
    disk = ext4(tmp_path / "disk", 64)
    with boot("--smp", "2", "--drive", f"file={disk},queues=2") as guest:
        assert guest.run("ls /sys/block/vda/mq").split() == ["0", "1"]
        guest.run("mount /dev/vda /mnt")
        both = "for c in 1 2; do taskset $c dd if=/dev/urandom of=/mnt/$c bs=64k count=64 & done"
        guest.run(f"({both}; wait) 2>/dev/null; sync")
        sums = guest.run("cat /mnt/1 /mnt/2 | sha256sum").split()[0]
        interrupts = guest.run("grep -c virtio /proc/interrupts")
        assert int(interrupts) >= 1
        guest.run("umount /mnt")
        guest.power_off()
    fsck(disk)
    assert hashlib.sha256(content(disk, "1") + content(disk, "2")).hexdigest() == sums


def test_more_queues_than_cpus(tmp_path):
    disk = ext4(tmp_path / "disk", 16)
    with boot("--drive", f"file={disk},queues=16") as guest:
        assert guest.run("ls /sys/block/vda/mq").split() == ["0"]
        assert guest.run("mount /dev/vda /mnt && ls /mnt && umount /mnt") == "lost+found"
        guest.power_off()
    fsck(disk)


def test_a_snapshot_leaves_the_image_as_it_was(tmp_path):
    disk = ext4(tmp_path / "disk", 64)
    before = digest(disk)
    drives = ["--drive", f"file={disk},snapshot=on"] * 2  # each sees its own
    with boot(*drives) as guest:
        guest.run("mount /dev/vda /mnt && seq 100000 >/mnt/numbers && umount /mnt")
        guest.run("mount /dev/vda /mnt")
        assert guest.run("tail -n 1 /mnt/numbers; umount /mnt") == "100000"
        assert guest.run("mount /dev/vdb /mnt && ls /mnt; umount /mnt") == "lost+found"
        guest.power_off()
    assert digest(disk) == before


def test_an_overlay_goes_on_after_a_kill(tmp_path):
    disk, overlay = ext4(tmp_path / "disk", 64), tmp_path / "overlay"
    before = digest(disk)
    drive = ("--drive", f"file={disk},overlay={overlay}")
    with boot(*drive) as guest:
        guest.run("mount /dev/vda /mnt && seq 100000 >/mnt/numbers && sync")
        guest.process.send_signal(signal.SIGKILL)
        guest.process.wait(10)
    numbers = "".join(f"{n}\n" for n in range(1, 100001)).encode()
    with boot(*drive) as guest:
        guest.run("mount /dev/vda /mnt")  # which recovers the journal
        expected = hashlib.sha256(numbers).hexdigest()
        assert guest.run("sha256sum </mnt/numbers").split()[0] == expected
        guest.run("head -c 5000000 /dev/urandom >/mnt/more && sync && rm /mnt/more")
        guest.run("fstrim /mnt && umount /mnt")
        whole = guest.run("sha256sum </dev/vda").split()[0]
        assert not guest.run("dmesg | grep -iE 'i/o error|ext4-fs error|virtio.*error'")
        guest.power_off()
    assert digest(disk) == before
    with boot(*drive) as guest:
        assert guest.run("sha256sum </dev/vda").split()[0] == whole
        guest.power_off()
    assert digest(disk) == before


def test_dd_is_no_faster_than_the_limit(tmp_path):
    """A second's worth comes at once, the rest at the rate."""
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(8 * MIB))
    with boot("--drive", f"file={disk},bps=2M") as guest:
        before = float(guest.run("cut -d ' ' -f 1 /proc/uptime"))
        said = guest.run("dd if=/dev/vda of=/dev/null bs=64k count=96 2>&1")
        after = float(guest.run("cut -d ' ' -f 1 /proc/uptime"))
        assert re.search(r"96\+0 records in", said)
        assert after - before >= (6 - 2) / 2 - 0.1
        guest.power_off()


def test_a_file_system_past_the_page_cache(tmp_path):
    source, disk = tmp_path / "source", ext4(tmp_path / "disk", 64)
    data = os.urandom(16 * MIB)
    source.write_bytes(data)
    drives = ["--drive", f"file={source},readonly=on,direct=on"]
    with boot(*drives, "--drive", f"file={disk},direct=on") as guest:
        guest.run("mount /dev/vdb /mnt && cp /dev/vda /mnt/copy && umount /mnt")
        sums = guest.run("mount /dev/vdb /mnt; sha256sum </mnt/copy; umount /mnt")
        assert sums.split()[0] == hashlib.sha256(data).hexdigest()
        # Odd sectors, one at a time.
        guest.run("dd if=/dev/vda of=/tmp/odd bs=512 skip=3 count=5 iflag=direct 2>/dev/null")
        expected = hashlib.sha256(data[3 * 512 : 8 * 512]).hexdigest()
        assert guest.run("sha256sum </tmp/odd").split()[0] == expected
        assert not guest.run("dmesg | grep -iE 'i/o error|ext4-fs error|virtio.*error'")
        guest.power_off()
    fsck(disk)
    assert content(disk, "copy") == data


@pytest.mark.skipif(
    not shutil.which("qemu-storage-daemon") or not shutil.which("qemu-img"),
    reason="no qemu-storage-daemon; apt-get install qemu-system-common qemu-utils",
)
def test_an_image_of_another_format_with_queues_and_a_limit(tmp_path):
    raw, disk = tmp_path / "raw", tmp_path / "disk.qcow2"
    data = os.urandom(6 * MIB)
    raw.write_bytes(data)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk], check=True)
    drive = f"file={disk},direct=on,queues=2,bps=2M"
    with boot("--smp", "2", "--drive", drive) as guest:
        assert guest.run("ls /sys/block/vda/mq").split() == ["0", "1"]
        before = float(guest.run("cut -d ' ' -f 1 /proc/uptime"))
        sums = guest.run(
            "taskset 1 sha256sum /dev/vda; "
            "taskset 2 dd if=/dev/zero of=/dev/vda bs=4k count=1 2>/dev/null; sync"
        )
        after = float(guest.run("cut -d ' ' -f 1 /proc/uptime"))
        assert sums.split()[0] == hashlib.sha256(data).hexdigest()
        assert after - before >= (6 - 2) / 2 - 0.1
        guest.power_off()
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, raw], check=True)
    assert raw.read_bytes() == bytes(4096) + data[4096:]
