"""--metrics while Linux uses its disks: values are what was read and written."""

import os
import shutil
import subprocess

import pytest
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, Guest
from scraping import scrape

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]

MIB = 1 << 20


def test_disks_memory_and_exits_of_linux(tmp_path):
    path = tmp_path / "metrics.sock"
    source, target = tmp_path / "source", tmp_path / "target.qcow2"
    source.write_bytes(os.urandom(MIB) * 8)
    drives = ["--drive", f"file={source},readonly=on,iops=200"]
    qcow2 = shutil.which("qemu-storage-daemon") and shutil.which("qemu-img")
    if qcow2:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", target, "16M"], check=True)
        drives += ["--drive", f"file={target}"]
    options = [*drives, "--stats", "--balloon", "0", "--metrics", f"unix:{path}"]
    initrd = initrd_with("cloud-amd64", "virtio_blk", "virtio_balloon")
    with Guest(debian_kernel("cloud-amd64"), initrd, "quiet", *options, accel=ACCEL) as guest:
        guest.boot()
        before = scrape(path)
        guest.run("dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null")
        after = scrape(path)

        def grown(name: str, **labels: str) -> float:
            return after.value(name, **labels) - before.value(name, **labels)

        # What was read before, for a partition table, need not be read again.
        disk = {"device": "disk0", "type": "virtio-blk", "operation": "read"}
        known = before.value("vmexit_virtio_bytes_total", **disk)
        assert known <= MIB
        assert 8 * MIB - known <= grown("vmexit_virtio_bytes_total", **disk) <= 9 * MIB
        assert 8 <= grown("vmexit_virtio_operations_total", **disk) <= 8 * 256
        writes = {"device": "disk0", "operation": "write"}
        assert after.value("vmexit_virtio_operations_total", **writes) == 0
        assert after.value("vmexit_virtio_limit_wait_seconds_total", device="disk0") >= 0

        size = after.value("vmexit_memory_bytes")
        assert 16 * MIB < after.value("vmexit_memory_resident_bytes") <= size == 128 * MIB
        assert after.value("vmexit_balloon_target_bytes") == 0
        uart = sum(
            value
            for labels, value in after.named("vmexit_exits_total")
            if (labels["device"], labels["reason"]) == ("UART", "io out")
        )
        assert uart > 100
        assert grown("vmexit_vcpu_seconds_total", vcpu="0", where="guest") > 0

        if qcow2:
            guest.run("dd if=/dev/zero of=/dev/vdb bs=64k count=16 conv=fsync 2>/dev/null")
            after = scrape(path)
            writes = {"device": "disk1", "type": "virtio-blk", "operation": "write"}
            assert MIB <= grown("vmexit_virtio_bytes_total", **writes) <= MIB + 65536
            assert grown("vmexit_virtio_operations_total", device="disk1", operation="flush") >= 1
        guest.power_off()
