"""A multiboot kernel does on each accelerator and machine what its source says that it does."""

import re
import struct

import pytest

from guests import FOLDER
from vmexit import Machine, StopReason
from vmexit.core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("nothing_left")

KERNEL = FOLDER / "multiboot.kernel"
MIB = 1 << 20


def elf32() -> bytes:
    """The same code as an ELF file, whose header has no addresses: its segment has them."""
    code = bytearray(KERNEL.read_bytes())
    load, _, bss_end, entry = struct.unpack_from("<4I", code, 16)
    magic, flags = 0x1BADB002, 3
    struct.pack_into("<2I", code, 4, flags, -(magic + flags) & 0xFFFF_FFFF)
    ident = b"\x7fELF\1\1\1" + bytes(9)
    head = ident + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    segment = struct.pack("<8I", 1, 84, load, load, len(code), bss_end - load, 7, 4)
    return head + segment + code


def ranges(memory: int) -> list[str]:
    """The lines on RAM."""
    low, high = f"map: {0:016X} {0x9FC00:016X} {1:08X}", memory - MIB
    return [low, f"map: {MIB:016X} {high:016X} {1:08X}"]


@pytest.mark.parametrize("machine", ["bare", "microvm"])
@pytest.mark.parametrize("file", ["flat", "elf"])
def test_the_kernel_prints_what_it_is_told_and_exits(accel, machine, file, tmp_path):
    kernel = KERNEL
    if file == "elf":
        kernel = tmp_path / "kernel.elf"
        kernel.write_bytes(elf32())
    (tmp_path / "one").write_bytes(b"first\nmodule")
    (tmp_path / "two,b").write_bytes(b"second")
    smp = 3 if machine == "microvm" else 1
    with Machine(
        "16M",
        accel,
        machine=machine,
        smp=smp,
        kernel=kernel,
        append="a=1 b",
        initrd=f"{tmp_path}/one with=string,{tmp_path}/two,,b",
        serial=f"file:{tmp_path / 'serial'}",
    ) as vm:
        stop = vm.run(timeout=60)
    text = (tmp_path / "serial").read_text()
    assert (stop.reason, stop.value) == (StopReason.DEBUG_EXIT, 0x10), (stop, text)
    lines = text.splitlines()
    assert lines[:4] == [
        "loader: vmexit",
        f"command line: {kernel} a=1 b",
        f"memory: {639:08X} {15 * 1024:08X}",
        f"processors: {smp:08X}",
    ]
    assert [x for x in lines if re.fullmatch("map: .* 00000001", x)] == ranges(16 * MIB)
    # Behind the kernel and its 64 KiB of bss, each at a page of its own.
    assert f"module: 00111000 {tmp_path}/one with=string: first\nmodule\n" in text
    assert lines[-1] == f"module: 00112000 {tmp_path}/two,b: second"


def test_without_modules_and_without_append(accel, tmp_path):
    serial = tmp_path / "serial"
    with Machine("2M", accel, kernel=KERNEL, machine="bare", serial=f"file:{serial}") as vm:
        assert vm.run(timeout=60).value == 0x10
    assert f"\ncommand line: {KERNEL}\n" in serial.read_text()
    assert "module" not in serial.read_text()


def test_what_is_no_multiboot_kernel_needs_the_machine_of_a_pc(tmp_path):
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes(100))
    with pytest.raises(ConfigError, match="needs interrupts and timers; use --machine microvm"):
        Machine("2M", "soft", kernel=kernel, machine="bare")


def test_a_module_that_is_not_there_is_named(tmp_path):
    from vmexit.core.errors import ImageError

    with pytest.raises(ImageError, match=f"cannot read module {tmp_path}/no: No such file"):
        Machine("2M", "soft", kernel=KERNEL, initrd=f"{tmp_path}/no arguments", machine="bare")
