"""The pvpanic device, and how ACPI tells of it."""

import pytest
from iasl import devices_there_and_back

from vmexit import Event, EventKind, Machine, StopReason
from vmexit.arch.x86 import acpi
from vmexit.devices.pvpanic import PvPanic


def test_each_bit_has_its_meaning_and_others_have_none():
    calls = []
    device = PvPanic(
        lambda: calls.append("panicked"),
        lambda: calls.append("crash kernel"),
        lambda: calls.append("shut down"),
    )
    assert device.read(0, 1) == 0b111
    for value, expected in (
        (1, ["panicked"]),
        (2, ["crash kernel"]),
        (4, ["shut down"]),
        (0xF8, []),
        (0, []),
    ):
        calls.clear()
        device.write(0, 1, value)
        assert calls == expected


# mov dx, 0x505; in al, dx; mov al, VALUE; out dx, al; hlt
def tells(value: int) -> bytes:
    return bytes.fromhex("ba0505 ec b0") + bytes((value,)) + bytes.fromhex("ee f4")


@pytest.mark.parametrize(
    ("value", "reason", "status", "kinds"),
    [
        (1, StopReason.GUEST_CRASH, 3, [EventKind.CRASHED]),
        (2, StopReason.HALT, 0, [EventKind.CRASH_KERNEL, EventKind.SHUTDOWN]),
        (4, StopReason.POWEROFF, 0, [EventKind.SHUTDOWN]),
    ],
)
def test_a_guest_ends_by_it(accel, value, reason, status, kinds):
    with Machine(memory="1M", accel=accel, devices=("pvpanic",)) as vm:
        vm.load_bytes(tells(value), at=0x1000)
        told: list[Event] = []
        vm.subscribe(told.append)
        stop = vm.run(timeout=30)
        assert (stop.reason, stop.status) == (reason, status)
        assert [event.kind for event in told] == [EventKind.RESUMED, *kinds]


def test_iasl_reads_the_device(tmp_path):
    text = devices_there_and_back(tmp_path, acpi.pvpanic())
    for expected in (
        '"QEMU0001"',
        "OperationRegion (PEOR, SystemIO, 0x0505, One)",
        "Field (PEOR, ByteAcc, NoLock, Preserve)",
        "PEPT,   8",
        "Method (RDPT, 0, Serialized)",
        "Method (WRPT, 1, Serialized)",
        "PEPT = Arg0",
    ):
        assert expected in text, text
