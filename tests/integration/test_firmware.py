"""Firmware: a ROM at the top of 4 GiB and its copy below 1 MiB, started at the reset vector.

And boot loaders, which are firmware's next: GRUB, by the 16-bit boot protocol.
"""

import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import VMEXIT, vmexit
from kernels import busybox_initrd, debian_kernel

from vmexit import Access, Machine, StopReason

pytestmark = pytest.mark.usefixtures("nothing_left")

# Debian's package `seabios`, which nobody here wrote.
SEABIOS = Path("/usr/share/seabios/bios-microvm.bin")
# Package `u-boot-qemu`.
U_BOOT = Path("/usr/lib/u-boot/qemu-x86/u-boot.rom")
# Package `grub-pc-bin`; `grub-mkimage` is of package `grub-common`.
GRUB = Path("/usr/lib/grub/i386-pc")

SECONDS = 100


class Guest:
    """The command with a guest whose serial port is its standard input and output."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self.output = b""

    def expect(self, *texts: bytes) -> None:
        """Wait until all of `texts` have come, one behind the other; takes them away."""
        assert self.process.stdout is not None
        end = time.monotonic() + SECONDS
        for text in texts:
            while text not in self.output:
                left = end - time.monotonic()
                assert left > 0, f"no {text!r} in {self.output[-500:]!r}"
                if select.select([self.process.stdout], [], [], left)[0]:
                    data = os.read(self.process.stdout.fileno(), 1 << 16)
                    assert data, f"it ended without {text!r}: {self.output[-500:]!r}"
                    self.output += data
            self.output = self.output.partition(text)[2]

    def rest(self) -> bytes:
        """What has come and was not expected; for a command that has ended."""
        assert self.process.stdout is not None
        return self.output + self.process.stdout.read()

    def type(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()


@contextmanager
def running(*arguments: object) -> Iterator[Guest]:
    """`vmexit run ARGUMENTS`, ended behind the block if it has not by itself."""
    command = [*VMEXIT, "run", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Guest(process)
        finally:
            process.terminate()
            process.wait(60)


def package(path: Path, name: str) -> Path:
    if not path.exists():
        pytest.skip(f"no {path}: the package {name} is not installed")
    return path


@pytest.fixture(scope="module")
def grub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GRUB with some commands in it, in front the code that makes it look like Linux."""
    lnxboot = package(GRUB / "lnxboot.img", "grub-pc-bin")
    tool = shutil.which("grub-mkimage")
    if tool is None:
        pytest.skip("no grub-mkimage: the package grub-common is not installed")
    folder = tmp_path_factory.mktemp("grub")
    modules = ["normal", "echo", "minicmd", "ls", "lsmmap", "halt", "reboot"]
    core = ["-O", "i386-pc", "-d", GRUB, "-o", folder / "core.img", "-p", "/boot/grub", *modules]
    subprocess.run([tool, *core], check=True, timeout=60)
    image = folder / "grub.lnx"
    image.write_bytes(lnxboot.read_bytes() + (folder / "core.img").read_bytes())
    return image


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


MICROVM = ("--machine", "microvm", "--accel", "soft", "-m", "64M")


def test_seabios_finds_memory_and_devices_of_the_microvm_machine():
    firmware = ("--firmware", package(SEABIOS, "seabios"), "--debugcon", "0x402")
    with running(*firmware, *MICROVM) as guest:
        guest.expect(b"SeaBIOS (version ", b"RamSize: 0x04000000 [cmos]", b"Found 1 serial ports")
        guest.expect(b"Press ESC for boot menu.")


def test_seabios_finds_nothing_to_boot():
    firmware = ("--firmware", package(SEABIOS, "seabios"), "--debugcon", "0x402")
    with running(*firmware, *MICROVM) as guest:
        guest.expect(b"No bootable device")


def test_u_boot_says_its_version(accel):
    with running("--firmware", package(U_BOOT, "u-boot-qemu"), "--accel", accel) as guest:
        guest.expect(b"U-Boot 20", b"CPU:", b"DRAM:")


def test_u_boot_answers_at_its_prompt_on_the_microvm_machine():
    with running("--firmware", package(U_BOOT, "u-boot-qemu"), *MICROVM) as guest:
        guest.expect(b"U-Boot 20", b"DRAM:  64 MiB", b"Hit any key to stop autoboot")
        guest.type(b"\n")
        guest.expect(b"=> ")
        guest.type(b"echo U-Boot-$board\n")
        guest.expect(b"U-Boot-qemu-x86\r\n")
        guest.type(b"date\n")
        guest.expect(b"Date: %d-" % time.gmtime().tm_year)
        guest.type(b"reset\n")
        guest.expect(b"resetting ...")
        assert guest.process.wait(60) == 0


def test_grub_answers_at_its_prompt(accel, grub):
    """On the bare machine: KVM has that only, so far."""
    machine = ("--machine", "bare", "--protocol", "16", "--accel", accel)
    with running("--kernel", grub, *machine) as guest:
        guest.expect(b"Welcome to GRUB!", b"GNU GRUB  version ", b"grub> ")
        guest.type(b"echo a\x1b[Db\n")  # cursor left
        guest.expect(b"\n\rba\n\r")


def test_grub_on_the_microvm_machine_lists_memory_and_powers_off(grub):
    with running("--kernel", grub, "--accel", "soft", "-m", "64M") as guest:
        guest.expect(b"Welcome to GRUB!", b"grub> ")
        guest.type(b"ls\r")
        guest.expect(b"ls", b"grub> ")
        guest.type(b"lsmmap\r")
        guest.expect(b"base_addr = 0x100000, length = 0x3f00000, available RAM", b"grub> ")
        guest.type(b"halt\r")
        assert guest.process.wait(60) == 0
        assert b"ACPI shutdown failed" not in guest.rest()


@pytest.mark.parametrize(
    ("command", "said"), [(b"reboot\r", b"reboot"), (b"exit\r", b"No bootable device")]
)
def test_grub_ends_the_machine(grub, command, said):
    with running("--kernel", grub, "--accel", "soft") as guest:
        guest.expect(b"grub> ")
        guest.type(command)
        guest.expect(said)
        assert guest.process.wait(60) == 0


def test_linux_passes_through_its_own_setup_code_to_the_shell():
    kernel = ("--kernel", debian_kernel("cloud-amd64"), "--initrd", busybox_initrd())
    options = ("--append", "console=ttyS0", "--protocol", "16", "--accel", "soft")
    with running(*kernel, *options) as guest:
        guest.expect(b"Probing EDD", b"Console: colour dummy device", b"/root # ")
        guest.type(b"echo shell-$((6*7)); poweroff -f\n")
        guest.expect(b"shell-42\r\n")
        assert guest.process.wait(60) == 0
