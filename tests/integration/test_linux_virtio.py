"""Linux's own virtio drivers against our devices: disks and entropy, on the software CPU."""

import hashlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, Guest

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]

MODULES = ("virtio_mmio", "virtio_blk", "virtio_rng", "ext4")
MIB = 1 << 20


def boot(*options: str, append: str = "quiet", flavour: str = "cloud-amd64") -> Guest:
    initrd = initrd_with(flavour, *MODULES)
    guest = Guest(debian_kernel(flavour), initrd, append, *options, accel=ACCEL)
    guest.boot()
    return guest


def ext4(path: Path, mib: int) -> Path:
    """A new file system."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4; apt-get install e2fsprogs")
    with path.open("wb") as file:
        file.truncate(mib * MIB)
    subprocess.run(["mkfs.ext4", "-q", path], check=True)
    return path


def fsck(path: Path) -> None:
    done = subprocess.run(["e2fsck", "-f", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def content(image: Path, name: str) -> bytes:
    """A file of the file system in `image`."""
    command = ["debugfs", "-R", f"cat {name}", image]
    return subprocess.run(command, capture_output=True, check=True).stdout


def copy_and_check(tmp_path: Path, mib: int, flavour: str) -> None:
    source = tmp_path / "source"
    data = os.urandom(MIB) * mib
    source.write_bytes(data)
    target = ext4(tmp_path / "target", mib + 32)
    drives = ["--drive", f"file={source},readonly=on,serial=abc", "--drive", f"file={target}"]
    with boot(*drives, flavour=flavour) as guest:
        assert guest.run("cat /sys/block/vda/ro /sys/block/vda/serial").split() == ["1", "abc"]
        assert guest.run("cat /sys/block/vda/size") == str(mib * MIB // 512)
        assert guest.run("dd if=/dev/zero of=/dev/vda count=1 2>&1").count("not permitted")
        guest.run("mount /dev/vdb /mnt && cp /dev/vda /mnt/copy && umount /mnt")
        guest.run("mount /dev/vdb /mnt")
        sums = guest.run("sha256sum </mnt/copy; umount /mnt")
        assert sums.split()[0] == hashlib.sha256(data).hexdigest()
        assert not guest.run("dmesg | grep -iE 'i/o error|ext4-fs error|virtio.*error'")
        guest.power_off()
    fsck(target)
    assert content(target, "copy") == data
    assert source.read_bytes() == data


@pytest.mark.parametrize("flavour", ["cloud-amd64", pytest.param("amd64", marks=pytest.mark.soak)])
def test_a_file_system_on_a_disk(tmp_path, flavour):
    copy_and_check(tmp_path, 20, flavour)


@pytest.mark.soak
def test_a_file_system_with_200_mib(tmp_path):
    copy_and_check(tmp_path, 200, "cloud-amd64")


def test_what_is_synced_survives_a_kill(tmp_path):
    disk = ext4(tmp_path / "disk", 64)
    with boot("--drive", f"file={disk}") as guest:
        guest.run("mount /dev/vda /mnt && seq 100000 >/mnt/numbers && sync")
        guest.process.send_signal(signal.SIGKILL)
        guest.process.wait(10)
    numbers = "".join(f"{n}\n" for n in range(1, 100001)).encode()
    with boot("--drive", f"file={disk}") as guest:
        guest.run("mount /dev/vda /mnt")  # which recovers the journal
        assert (
            guest.run("sha256sum </mnt/numbers").split()[0] == hashlib.sha256(numbers).hexdigest()
        )
        guest.run("umount /mnt")
        guest.power_off()
    fsck(disk)


def test_poweroff_leaves_the_file_system_clean(tmp_path):
    """So that it can be mounted read-only, which cannot recover a journal."""
    disk = ext4(tmp_path / "disk", 64)
    with boot("--drive", f"file={disk}") as guest:
        guest.run("mount /dev/vda /mnt && echo kept >/mnt/file")
        guest.type("poweroff\n")
        assert guest.status() == 0
    fsck(disk)
    header = subprocess.run(["dumpe2fs", "-h", disk], capture_output=True, text=True).stdout
    assert "needs_recovery" not in header
    with boot("--drive", f"file={disk},readonly=on") as guest:
        assert guest.run("mount -o ro /dev/vda /mnt && cat /mnt/file") == "kept"
        guest.power_off()


def test_programs_from_a_disk_run_where_others_have_run_before(tmp_path):
    """Pages of code are filled by the disk, freed, and filled with other code."""
    disk = ext4(tmp_path / "disk", 64)
    script = (
        "mount /dev/vda /mnt; for i in $(seq 20); do b=/mnt/busybox$((i % 2)); cp /bin/busybox $b; "
        "sync; "
        "echo 3 >/proc/sys/vm/drop_caches; $b seq 2000 | $b md5sum; done | sort | uniq -c"
    )
    expected = hashlib.md5("".join(f"{n}\n" for n in range(1, 2001)).encode()).hexdigest()
    with boot("--drive", f"file={disk}") as guest:
        assert guest.run(script).split() == ["20", expected, "-"]
        guest.power_off()


def test_entropy_and_no_disk(tmp_path):
    with boot("--rng") as guest:
        assert guest.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
        two = [guest.run("head -c 1000 /dev/hwrng | sha256sum").split()[0] for _ in range(2)]
        assert two[0] != two[1]
        assert guest.run("head -c 1000 /dev/hwrng | wc -c") == "1000"
        assert guest.run("ls /dev/vd* 2>&1").count("No such file")
        guest.power_off()


def test_discard_gives_the_host_its_room_back(tmp_path):
    disk = ext4(tmp_path / "disk", 64)
    with boot("--drive", f"file={disk}") as guest:
        guest.run("mount /dev/vda /mnt && head -c 10000000 /dev/urandom >/mnt/a && sync")
        full = os.stat(disk).st_blocks
        guest.run("rm /mnt/a && sync && fstrim /mnt && umount /mnt")
        guest.power_off()
    assert os.stat(disk).st_blocks < full - 17_000
    fsck(disk)


def test_a_disk_that_fails_gives_the_guest_errors_and_goes_on(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(8 * MIB))
    with boot("--drive", f"file={disk}") as guest:
        os.truncate(disk, 4 * MIB)
        assert "I/O error" in guest.run("dd if=/dev/vda of=/dev/null bs=1M 2>&1")
        assert guest.run("dd if=/dev/vda bs=1M count=2 2>/dev/null | wc -c") == str(2 * MIB)
        guest.power_off()


def test_as_many_disks_as_there_can_be(tmp_path):
    drives = []
    for number in range(13):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]) * 4096)
        drives += ["--drive", f"file={path},readonly=on"]
    with boot(*drives) as guest:
        firsts = guest.run("head -qc 1 /dev/vd[a-m] | hexdump -ve '1/1 \"%d \"'")
        assert firsts.split() == [str(n) for n in range(13)]
        guest.power_off()


def test_without_acpi_the_command_line_tells_of_the_devices():
    """Debian's driver was built without that: so that far and no further."""
    with boot("--rng", "--balloon", "0", append="quiet acpi=off") as guest:
        words = guest.run("cat /proc/cmdline").split()
        assert [w for w in words if w.startswith("virtio")] == [
            "virtio_mmio.device=0x1000@0xfeb00000:5", "virtio_mmio.device=0x1000@0xfeb01000:6",
        ]  # fmt: skip
        guest.power_off("reboot -f")  # without ACPI it cannot switch itself off
