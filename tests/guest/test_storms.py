"""A guest that drowns in interrupts or exceptions can be ended at once, and takes no more memory.

`guests/storms.S` says what each storm is.
"""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from guests import FOLDER
from vmexit import Machine, StopReason

pytestmark = pytest.mark.engine

STORMS = (
    "PIT", "RTC", "LAPIC timer", "IPIs to itself", "a level that stays", "INIT and SIPI", "NMIs",
    "undefined opcodes", "single steps", "page faults", "timer settings",
)  # fmt: skip
TWO_CPUS = {"INIT and SIPI", "NMIs"}
COUNTS_NOTHING = {"INIT and SIPI", "timer settings"}
# Devices that have a limit to how often they interrupt.
LIMITED = {"PIT", "RTC", "LAPIC timer"}

KIND, TAKEN, DONE = 0x9000, 0x9008, 0x9010
IMAGE = FOLDER / "storms.bin"
SOON = 1.0


def storm(kind: str) -> Machine:
    smp = 2 if kind in TWO_CPUS else 1
    vm = Machine("4M", "soft", machine="microvm", smp=smp, image=IMAGE, mode="long", serial="null")
    vm.memory.write_u32(KIND, STORMS.index(kind))
    return vm


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) << 12


@pytest.mark.parametrize("kind", STORMS)
@pytest.mark.usefixtures("nothing_left")
def test_a_storm_is_taken_and_can_be_stopped_at_any_moment(kind):
    with storm(kind) as vm:
        assert vm.run(timeout=0.2).reason is StopReason.TIMEOUT
        before = resident()
        assert vm.run(timeout=0.5).reason is StopReason.TIMEOUT
        assert resident() - before < 6 << 20
        for _ in range(3):
            asked = []

            def ask(vm: Machine = vm, asked: list[float] = asked) -> None:
                asked.append(time.monotonic())
                vm.stop()

            timer = threading.Timer(0.05, ask)
            timer.start()
            assert vm.run(timeout=60).reason is StopReason.STOPPED
            assert time.monotonic() - asked[0] < SOON
            timer.join()
        taken, done = vm.memory.read_u64(TAKEN), vm.memory.read_u64(DONE)
        assert (taken == 0) is (kind in COUNTS_NOTHING)
        if kind in LIMITED:
            assert taken > 100
            assert done > 1000  # there is time left to do something


@pytest.mark.parametrize("kind", ["IPIs to itself", "undefined opcodes"])
def test_ctrl_c_ends_the_command_in_a_storm(kind, tmp_path):
    image = bytearray(IMAGE.read_bytes())
    image += bytes(KIND + 4 - len(image))
    image[KIND] = STORMS.index(kind)
    path = tmp_path / "storm.bin"
    path.write_bytes(image)
    command = [sys.executable, "-m", "vmexit", "run", path, "--mode", "long", "--serial", "null"]
    with subprocess.Popen(
        [*command, "--machine", "microvm", "--accel", "soft", "--timeout", "60"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        time.sleep(1.5)
        assert process.poll() is None
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - asked < 2
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("mode", "code", "gate"),
    [
        ("real", "0f0b", "0020 0000"),  # IVT[6], at 0x18
        ("real", "31c9 f7f1", "0020 0000"),  # xor cx, cx; div cx
        ("protected", "0f011d00300000 0f0b", "0020 0800 008e 0000"),  # lidt [0x3000]
    ],
)
@pytest.mark.usefixtures("nothing_left")
def test_an_exception_that_comes_again_for_ever_can_be_ended(mode, code, gate):
    """The handler at 0x2000 counts in memory, and returns to the same instruction."""
    count = {"real": "ff060050 cf", "protected": "ff0500500000 cf"}[mode]
    with Machine("1M", "soft", machine="microvm") as vm:
        vm.load_bytes(bytes.fromhex(code), mode=mode)
        vm.memory.write(0x2000, bytes.fromhex(count))
        if mode == "real":
            for vector in (0, 6):
                vm.memory.write(4 * vector, bytes.fromhex(gate))
        else:
            vm.memory.write(0x3000, bytes.fromhex("ff00 00400000"))
            vm.memory.write(0x4000 + 8 * 6, bytes.fromhex(gate))
        vm.vcpus[0].regs.rsp = 0x8000
        assert vm.run(timeout=0.3).reason is StopReason.TIMEOUT
        assert vm.memory.read_u16(0x5000) or vm.memory.read_u16(0x5002)
        threading.Timer(0.1, vm.stop).start()
        began = time.monotonic()
        assert vm.run(timeout=60).reason is StopReason.STOPPED
        assert time.monotonic() - began < 0.1 + SOON


@pytest.mark.parametrize(
    ("mode", "code", "reason", "words"),
    [
        ("protected", "b8000000f0 ffe0", StopReason.INTERNAL_ERROR, "rip 0xf0000000"),
        ("long", "b8000000f0 ffe0", StopReason.INTERNAL_ERROR, "rip 0xf0000000"),
        ("long", "b80000e0fe ffe0", StopReason.INTERNAL_ERROR, "rip 0xfee00000"),  # the LAPIC
        ("real", "ea000000f0", StopReason.INTERNAL_ERROR, "rip 0x"),  # beyond 64 KiB of RAM
        ("long", "48b80000000001000000 ffe0", StopReason.SHUTDOWN, "#PF (error code 0x0), #DF"),
        ("long", "48b80000000000800000 ffe0", StopReason.SHUTDOWN, "#GP (error code 0x0), #DF"),
    ],
)
@pytest.mark.usefixtures("nothing_left")
def test_a_jump_to_where_no_memory_is_ends_at_once_and_says_where(mode, code, reason, words):
    with Machine("64K" if mode == "real" else "4M", "soft", machine="microvm") as vm:
        vm.load_bytes(bytes.fromhex(code), mode=mode)
        began = time.monotonic()
        stop = vm.run(timeout=30)
        assert time.monotonic() - began < SOON
        assert stop.reason is reason
        assert words in stop.detail and "no guest memory there" in stop.detail
        assert stop.status == 3 and "rip=" in stop.dump
