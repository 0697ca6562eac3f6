"""Debian's own kernels: lz4 and xz inside, a PVH note, every protocol."""

import gzip
import shutil
import struct
import subprocess

import pytest
from kernels import busybox_initrd, debian_kernel

from vmexit.arch.x86.layout import ACPI_TABLES, ram_ranges
from vmexit.boot import bzimage, linux
from vmexit.core.memory import GuestMemory
from vmexit.inspect import describe


@pytest.mark.parametrize(("flavour", "packed"), [("cloud-amd64", "lz4"), ("amd64", "xz")])
def test_debians_kernel_is_unpacked_and_offers_every_protocol(flavour, packed) -> None:
    data = debian_kernel(flavour).read_bytes()
    kernel = linux.read(data)
    assert kernel.problem == "" and kernel.header is not None and kernel.elf is not None
    assert bzimage.payload_compression(data, kernel.header) in (packed, "zstd")  # by release
    assert kernel.offers() == ["pvh", "elf", "64", "32", "16"]
    assert kernel.elf.bits == 64 and kernel.elf.span.start == kernel.header.pref_address
    assert len(kernel.elf.span) <= kernel.header.init_size


@pytest.mark.parametrize("protocol", ["auto", "elf", "64", "32", "16"])
def test_debians_kernel_is_loaded_with_its_initrd(protocol) -> None:
    data, initrd = debian_kernel("cloud-amd64").read_bytes(), busybox_initrd().read_bytes()
    memory = GuestMemory(ram_ranges(256 << 20))
    boot = linux.load(memory, data, initrd, "quiet", protocol=protocol, rsdp=ACPI_TABLES)
    assert boot.protocol == protocol.replace("auto", "pvh")
    assert boot.initrd is not None and boot.initrd.stop <= 256 << 20
    assert memory.read(boot.initrd.start, len(initrd)) == initrd
    memory.close()


def test_inspect_says_what_debians_kernel_is() -> None:
    path = debian_kernel("cloud-amd64")
    text = describe(str(path), None, None, None, "real")
    release = path.name.removeprefix("vmlinuz-").split("_")[0]
    for part in (
        "a Linux kernel (bzImage)",
        f"Linux version {release} (",
        "boot protocol 2.15",
        "PVH entry 0x1000",
        "relocatable, aligned to 0x200000",
        "prefers 0x1000000",
        "initrd up to 0x7fffffff",
        "it can be booted by: pvh, elf, 64, 32, 16",
        f"run it with: vmexit run --kernel {path}",
    ):
        assert part in text


def test_the_initrd_is_a_cpio_with_an_init(tmp_path) -> None:
    archive = gzip.decompress(busybox_initrd().read_bytes())
    files, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name_at, size = at + 110, fields[6]
        name = archive[name_at : name_at + fields[11] - 1].decode()
        start = -(-(name_at + fields[11]) // 4) * 4
        at = -(-(start + size) // 4) * 4
        if name == "TRAILER!!!":
            break
        files[name] = (fields[1], archive[start : start + size], tuple(fields[9:11]))
    assert at == len(archive)
    assert files["dev/console"] == (0o020600, b"", (5, 1))
    mode, init, _ = files["init"]
    assert mode == 0o100755 and b"setsid cttyhack sh" in init
    mode, busybox, _ = files["bin/busybox"]
    assert mode == 0o100755 and struct.unpack_from("<H", busybox, 18) == (62,)  # EM_X86_64
    (tmp_path / "busybox").write_bytes(busybox)
    (tmp_path / "busybox").chmod(0o755)
    applets = subprocess.run([tmp_path / "busybox", "--list"], capture_output=True, text=True)
    assert {"sh", "mount", "setsid", "cttyhack", "poweroff"} <= set(applets.stdout.split())
    if shutil.which("sh"):
        subprocess.run(["sh", "-n"], input=init, check=True)
