"""`inspect` on kernels: what it is, how it can be booted, where it goes."""

import struct

import pytest
from kernel_images import PACK, bzimage, elf

from vmexit.boot.image import detect
from vmexit.inspect import describe

BANNER = b"Linux version 6.1.0-test (me@here) (gcc) #1 SMP Thu\n\0"
VMLINUX = elf(((0x100_0000, b"kernel" + BANNER, 0x2000),))


def report(tmp_path, data: bytes) -> list[str]:
    (tmp_path / "image").write_bytes(data)
    path = str(tmp_path / "image")
    text = describe(path, None, None, None, "real")
    return text.replace(path, "IMAGE").splitlines()


def test_a_bzimage(tmp_path) -> None:
    data = bzimage(PACK["xz"](VMLINUX))
    packed = len(PACK["xz"](VMLINUX))
    assert report(tmp_path, data) == [
        f"IMAGE: a Linux kernel (bzImage), {len(data)} bytes",
        "Linux version 6.1.0-test (me@here) (gcc) #1 SMP Thu",
        "boot protocol 2.15",
        "relocatable, aligned to 0x200000 (at least 0x200000), prefers 0x1000000, "
        "needs 0x300000 bytes there",
        "command line of up to 2047 bytes, initrd up to 0x7fffffff",
        f"payload xz, {packed} bytes, unpacks to {len(VMLINUX)} bytes",
        "64-bit, entry 0x1000000, PVH entry 0x1000040",
        "load 0x3b bytes at physical 0x1000000, virtual 0x1000000",
        "it can be booted by: pvh, elf, 64, 32, 16",
        "run it with: vmexit run --kernel IMAGE --initrd INITRD --append console=ttyS0",
    ]


def test_a_bzimage_that_cannot_be_unpacked_has_its_name_from_the_header(tmp_path) -> None:
    lines = report(tmp_path, bzimage(b"\x89LZO\0\r\n\x1a\n", relocatable=0, version=0x209))
    assert lines[1:] == [
        "Linux version 6.1.0-test (me) #1",
        "boot protocol 2.09",
        "loaded at 0x100000",
        "command line of up to 2047 bytes, initrd up to 0x7fffffff",
        "payload lzo, 9 bytes",
        "entered compressed only: a kernel packed with lzo cannot be unpacked",
        "it can be booted by: 32, 16",
        "run it with: vmexit run --kernel IMAGE --initrd INITRD --append console=ttyS0",
    ]


@pytest.mark.parametrize("pack", [None, "gzip", "xz", "lz4", "zstd"])
def test_a_vmlinux_as_it_is_or_compressed(tmp_path, pack) -> None:
    lines = report(tmp_path, PACK[pack](VMLINUX) if pack else VMLINUX)
    assert lines[1:3] == [
        "Linux version 6.1.0-test (me@here) (gcc) #1 SMP Thu",
        "64-bit, entry 0x1000000, PVH entry 0x1000040",
    ]
    assert lines[-2:] == [
        "it can be booted by: pvh, elf",
        "run it with: vmexit run --kernel IMAGE --initrd INITRD --append console=ttyS0",
    ]


@pytest.mark.parametrize(
    ("pack", "command"),
    [("gzip", "gunzip"), ("xz", "unxz"), ("lz4", "unlz4"), ("zstd", "unzstd")],
)
def test_a_compressed_file_that_is_no_kernel(tmp_path, pack, command) -> None:
    data = PACK[pack](b"flat image")
    assert detect(data).name == pack
    assert report(tmp_path, data) == [
        f"IMAGE: {'an' if pack in ('xz', 'lz4') else 'a'} {pack} file, {len(data)} bytes",
        f"unpack it with: {command} IMAGE",
    ]


def test_a_damaged_bzimage(tmp_path) -> None:
    lines = report(tmp_path, bzimage()[:0x250])
    assert lines[1:] == [
        "it cannot be booted: the Linux kernel is damaged: it is cut short; build it again"
    ]


def test_an_elf_file_that_is_no_kernel_is_described_as_before(tmp_path) -> None:
    lines = report(tmp_path, elf(note=None))
    assert lines[1] == "machine EM_X86_64, type ET_EXEC, entry 0x1000000"
    assert not any("--kernel" in line for line in lines)


def test_an_elf_file_of_absurd_many_parts_is_not_taken_apart(tmp_path) -> None:
    """Each section would be looked for in each segment: minutes, for 2 MB."""
    number, path = 20_000, tmp_path / "file"
    head = 64 + 56 * number
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0x1000, 64, head, 0, 64, 56, number, 64, number, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x1000, 0x1000, 16, 16, 1)
    section = struct.pack("<IIQQQQIIQQ", 0, 1, 2, 0x1000, 0, 16, 0, 0, 1, 0)
    path.write_bytes(header + segment * number + section * number)
    assert "more than any program" in describe(str(path), None, None, None, "real")
