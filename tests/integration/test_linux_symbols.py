"""The symbols of Debian's kernels: as the running kernel tells them, and as gdb takes them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from command import vmexit
from kernels import debian_kernel, initrd_with, vmlinux
from linux_guest import ACCEL, Guest

from vmexit.boot.symbols import load_symbols, own_symbols

pytestmark = pytest.mark.linux


def told_by_the_guest(flavour: str, folder: Path) -> str:
    """/proc/kallsyms of a running guest, as root, by a disk or a folder."""
    kernel = debian_kernel(flavour)
    if flavour == "cloud-amd64":
        disk = folder / "disk"
        disk.write_bytes(bytes(16 << 20))
        initrd = initrd_with(flavour, "virtio_blk", "ext4")
        more, command = ["--drive", f"file={disk}"], "cat /proc/kallsyms > /dev/vda"
    else:
        disk = folder / "kallsyms"
        initrd = initrd_with(flavour, "9p", "9pnet_virtio", "virtiofs")
        more = ["--share", f"host={folder}"]
        command = "mount -t 9p -o trans=virtio host /mnt && cat /proc/kallsyms > /mnt/kallsyms"
    with Guest(kernel, initrd, "quiet nokaslr", "-m", "512M", *more, accel=ACCEL) as guest:
        guest.boot()
        written = guest.run(f"sysctl -w kernel.kptr_restrict=0; mkdir -p /mnt; {command}; sync")
        assert "rror" not in written and "not" not in written
        guest.power_off()
    return disk.read_bytes().rstrip(b"\0").decode()


@pytest.mark.parametrize("flavour", ["cloud-amd64", "amd64"])
def test_the_symbols_of_a_kernel_are_those_of_its_kallsyms(flavour, tmp_path) -> None:
    lines = [line for line in told_by_the_guest(flavour, tmp_path).splitlines() if "[" not in line]
    expected = sorted(
        (int(address, 16), kind, name) for address, kind, name in map(str.split, lines)
    )
    table = load_symbols(debian_kernel(flavour))
    found = sorted((symbol.address, symbol.kind, symbol.name) for symbol in table)
    assert len(expected) > 50_000 and found == expected
    assert table.find(table.address("start_kernel") + 3) == ("start_kernel", 3)


@pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb; apt-get install gdb")
@pytest.mark.parametrize("source", [debian_kernel, vmlinux])
def test_gdb_takes_the_kernel_with_its_symbols(source, tmp_path) -> None:
    output = tmp_path / "vmlinux.elf"
    done = vmexit("symbols", source("cloud-amd64"), "-o", output)
    assert done == (0, "", "")
    commands = [
        "info address start_kernel",
        "x/3i start_kernel",
        "info symbol panic+8",
        "x/s &linux_banner",
    ]
    words = [word for command in commands for word in ("-ex", command)]
    gdb = subprocess.run(
        ["gdb", "-nx", "-batch", *words, output], capture_output=True, text=True, check=True
    )
    address = load_symbols(source("cloud-amd64")).address("start_kernel")
    assert f'Symbol "start_kernel" is at {address:#x} in a file compiled' in gdb.stdout
    assert re.search(rf"{address:#x} <start_kernel>:\s+call +0x\w+ <__fentry__>", gdb.stdout)
    assert "panic + 8 in section .text" in gdb.stdout
    assert '"Linux version ' in gdb.stdout
    assert gdb.stderr == ""
    assert len(own_symbols(output)) == len(load_symbols(source("cloud-amd64")))


def test_the_report_of_a_kernel_that_ends_by_a_triple_fault_says_why() -> None:
    kernel = debian_kernel("cloud-amd64")
    # Without a root file system it panics, and then resets itself by reboot=t: a triple fault.
    done = vmexit(
        "run", "--accel", "soft", "--kernel", kernel, "--symbols", kernel,
        "--append", "console=ttyS0 quiet panic=-1 reboot=t", "-m", "256M",
    )  # fmt: skip
    assert done.status == 3 and "Kernel panic - not syncing: VFS" in done.out
    assert re.search(r"rip=\w+ rflags=\w+  native_machine_emergency_restart\+0x\w+: ", done.err)
    trace = done.err.partition("\nbacktrace:\n")[2]
    assert re.search(r"^  0xffffffff8\w{7} \? panic\+0x\w+$", trace, re.MULTILINE)
    # The kernel has told who called panic() itself.
    told = re.findall(r"\]  (\w+\+0x\w+)/", done.out.partition("<TASK>")[2])
    callers = told[[name.partition("+")[0] for name in told].index("panic") + 1 :]
    assert len(callers) > 3 and re.findall(r" (\w+\+0x\w+)$", trace, re.MULTILINE)[2:] == callers
