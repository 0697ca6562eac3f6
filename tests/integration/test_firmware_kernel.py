"""Firmware that nobody here wrote boots Debian's kernel, of which fw_cfg tells it."""

import re
from pathlib import Path

import pytest
from command import vmexit
from kernels import busybox_initrd, debian_kernel

from vmexit import Machine, StopReason
from vmexit.core.errors import ConfigError

pytestmark = [pytest.mark.linux, pytest.mark.usefixtures("nothing_left")]

# Debian's packages `seabios` and `qemu-system-data`.
FIRMWARE = [Path("/usr/share/seabios/bios-microvm.bin"), Path("/usr/share/qemu/qboot.rom")]


def there(firmware: Path) -> Path:
    if not firmware.exists():
        pytest.skip(f"there is no {firmware}")
    return firmware


@pytest.mark.parametrize("firmware", FIRMWARE, ids=lambda path: path.stem)
def test_firmware_boots_the_kernel_and_its_initrd(firmware, tmp_path):
    log = bytearray()
    with Machine(
        "256M",
        "soft",
        machine="microvm",
        smp=2,
        firmware=there(firmware),
        kernel=debian_kernel("cloud-amd64"),
        initrd=busybox_initrd(),
        # Init, not /init: it powers off, as there is nobody to type.
        append="console=ttyS0 rdinit=/bin/busybox -- poweroff -f",
        serial=f"file:{tmp_path / 'serial'}",
    ) as vm:
        vm.on_pio(0x402, read=lambda a: 0xE9, write=lambda a: log.append(a.value))
        stop = vm.run(timeout=100)
    text = (tmp_path / "serial").read_text(errors="replace")
    assert stop.reason is StopReason.POWEROFF, (stop, text[-1000:])
    assert re.search(r"Linux version \d", text)
    assert re.search(r"Command line: .*rdinit=/bin/busybox", text)
    # Tables that firmware has put somewhere, and found whole there.
    assert re.search(r"ACPI: XSDT 0x\w+ \w+ \(v01 VMEXIT", text)
    assert "checksum in table" not in text
    assert "smp: Brought up 1 node, 2 CPUs" in text
    assert "Run /bin/busybox as init process" in text
    if b"SeaBIOS" in log:
        assert b"QEMU fw_cfg DMA interface supported" in log
        # As there is no screen, its console is the serial port.
        assert "SeaBIOS (version " in text and "Booting from ROM..." in text


def test_the_command_boots_a_kernel_by_firmware():
    done = vmexit(
        "run",
        "--firmware", there(FIRMWARE[0]), "--kernel", debian_kernel("cloud-amd64"),
        "--append", "console=ttyS0 panic=-1", "--accel", "soft", "--timeout", "60",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "Linux version" in done.out and "panic" in done.out


def test_without_a_console_nothing_is_said_and_the_guest_runs_all_the_same():
    firmware, kernel = there(FIRMWARE[0]), debian_kernel("cloud-amd64")
    with Machine(
        "256M", "soft", machine="microvm", firmware=firmware, kernel=kernel, append="panic=-1"
    ) as vm:
        assert vm.run(timeout=100).reason is StopReason.RESET


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"machine": "bare"}, "cannot tell firmware of a kernel; use --machine microvm"),
        ({"protocol": "pvh"}, "boots a kernel its own way; leave out --protocol"),
        ({"image": "i"}, "an image and --firmware both want to start; give one of them"),
        ({"image": "i", "firmware": None}, "an image and --kernel both want to start"),
    ],
)
def test_what_firmware_cannot_be_asked_for_is_refused(options, message, tmp_path):
    (tmp_path / "rom").write_bytes(bytes(0x1_0000))
    with pytest.raises(ConfigError, match=message):
        Machine(
            "256M",
            "soft",
            **{"machine": "microvm", "firmware": tmp_path / "rom", "kernel": "k", **options},
        )
