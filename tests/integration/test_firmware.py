"""Firmware: a ROM at the top of 4 GiB and its copy below 1 MiB, started at the reset vector."""

import subprocess
from pathlib import Path

import pytest
from command import VMEXIT, vmexit

from vmexit import Access, Machine, StopReason

pytestmark = pytest.mark.usefixtures("nothing_left")

# Debian's package `seabios`, which nobody here wrote.
SEABIOS = Path("/usr/share/seabios/bios-microvm.bin")


def rom(code: bytes, size: int = 0x4_0000) -> bytes:
    """A ROM of `size` bytes: `code` at the beginning of its last 64 KiB, jumped to at reset."""
    top = bytearray(b"\xcc" * 0x10000)
    top[: len(code)] = code
    top[0xFFF0:0xFFF3] = b"\xe9" + (0x10000 - 0xFFF3).to_bytes(2, "little")  # jmp 0
    return bytes(size - 0x10000) + bytes(top)


def test_seabios_says_its_version_on_port_0x402(accel):
    text = bytearray()

    def write(access: Access) -> None:
        text.append(access.value)
        if b"\n" in text:
            vm.stop()

    with Machine("128M", accel, firmware=SEABIOS) as vm:
        vm.on_pio(0x402, read=lambda a: 0xE9, write=write)
        stop = vm.run(timeout=100)
    assert text.startswith(b"SeaBIOS (version "), (bytes(text), stop)
    assert stop.reason is StopReason.STOPPED


def test_seabios_from_the_command_line(accel):
    command = ["run", "--firmware", SEABIOS, "--debugcon", "0x402", "--accel", accel]
    with subprocess.Popen([*VMEXIT, *command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"SeaBIOS (version ")
        process.terminate()
        process.wait(60)
    assert process.returncode == 128 + 15


def test_the_vcpu_starts_at_the_reset_vector(accel, tmp_path):
    (tmp_path / "rom").write_bytes(rom(b"\xf4"))
    with Machine("1M", accel, firmware=tmp_path / "rom") as vm:
        regs = vm.vcpus[0].regs
        assert (regs.cs.selector, regs.cs.base, regs.rip) == (0xF000, 0xFFFF_0000, 0xFFF0)
        assert regs.cr0 & 1 == 0
        assert vm.run(timeout=20).reason is StopReason.HALT
        assert regs.rip == 1


def test_the_rom_ends_at_4_gib_and_its_last_128_kib_are_below_1_mib(accel, tmp_path):
    image = bytearray(rom(b"\xf4"))
    image[0:4], image[-0x20000 : -0x20000 + 4] = b"long", b"low!"
    (tmp_path / "rom").write_bytes(image)
    with Machine("1M", accel, firmware=tmp_path / "rom") as vm:
        assert vm.memory.read(0xFFFC_0000, 4) == b"long"
        assert vm.memory.read(0xFFFE_0000, 4) == b"low!"
        assert vm.memory.read(0xE_0000, 4) == b"low!"
        assert vm.memory.read(0xF_FFF0, 1) == b"\xe9"
        assert vm.memory.read(0xD_FFFC, 4) == bytes(4)


def test_a_small_rom(accel, tmp_path):
    (tmp_path / "rom").write_bytes(rom(b"\xb0\x09\xe6\xf4", size=0x10000))
    done = vmexit("run", "--firmware", tmp_path / "rom", "--accel", accel, "-m", "1M")
    assert done.status == 9 << 1 | 1


def test_the_guest_cannot_change_the_rom_but_its_copy_in_ram(accel, tmp_path):
    # mov byte cs:[0x100], 1 - CS is the ROM; mov word cs:[0x201], 0x0302: not aligned
    # mov ax, 0xf000; mov ds, ax; mov byte [0x100], 2 - and this is RAM; hlt
    code = bytes.fromhex("2ec6060001012ec70601020203b800f08ed8c606000102f4")
    (tmp_path / "rom").write_bytes(rom(code))
    seen = []
    with Machine("1M", accel, firmware=tmp_path / "rom") as vm:
        vm.on_mmio(0xFFFF_0000, 0x1000, write=seen.append)
        assert vm.run(timeout=20).reason is StopReason.HALT
        assert vm.memory.read_u8(0xFFFF_0100) == 0xCC
        assert vm.memory.read_u16(0xFFFF_0201) == 0xCCCC
        assert vm.memory.read_u8(0xF_0100) == 2
    # The bus is asked, as about anything that is not RAM.
    assert seen == [
        Access(0xFFFF_0100, 1, 1, True),
        Access(0xFFFF_0201, 2, 0x302, True),
    ]
