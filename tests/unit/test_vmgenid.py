"""The generation ID: the device, and how ACPI tells of it."""

import pytest
from iasl import devices_there_and_back

from vmexit import ConfigError, Machine
from vmexit.arch.x86 import acpi
from vmexit.arch.x86.layout import VMGENID
from vmexit.devices.vmgenid import SIZE, VmGenId

MICROVM = {"machine": "microvm", "serial": "null", "devices": ("vmgenid",)}


class Line:
    """Counts edges."""

    def __init__(self) -> None:
        self.edges = 0

    def pulse(self) -> None:
        self.edges += 1


def whole(device: VmGenId) -> bytes:
    return b"".join(device.read(at, 8).to_bytes(8, "little") for at in (0, 8))


def test_it_is_another_one_after_renew_and_reset_only():
    line = Line()
    device = VmGenId(line)
    first = whole(device)
    device.write(0, 8, 0)
    assert whole(device) == first != bytes(SIZE)
    assert b"".join(bytes((device.read(at, 1),)) for at in range(SIZE)) == first
    device.renew()
    second = whole(device)
    assert (line.edges, second != first) == (1, True)
    device.reset()
    assert (line.edges, whole(device) not in (first, second)) == (1, True)


def test_its_state():
    device, other = VmGenId(Line()), VmGenId(Line())
    other.restore(device.state())
    assert whole(other) == whole(device)
    for state in ({}, {"version": 1, "id": b"short"}, {"version": 1, "id": "x" * 16}):
        with pytest.raises(ConfigError, match="generation ID"):
            other.restore(state)


def test_a_copy_has_the_same_until_it_is_renewed(accel):
    def read(vm: Machine) -> bytes:
        device = vm._parts.devices["vmgenid"]
        assert isinstance(device, VmGenId)
        assert vm.device_at(VMGENID + SIZE - 1, mmio=True) == "vmgenid"
        return whole(device)

    with Machine("2M", accel, **MICROVM) as vm, vm.snapshot() as snap, snap.clone() as twin:
        first = read(vm)
        assert read(twin) == first
        twin.renew_generation()
        assert read(twin) != first == read(vm)
        twin.reset_to(snap)
        assert read(twin) == first


def test_where_it_cannot_be():
    with pytest.raises(ConfigError, match="no interrupts for vmgenid; use microvm"):
        Machine("2M", "soft", devices=("vmgenid",))
    with (
        Machine("2M", "soft") as vm,
        pytest.raises(ConfigError, match="no generation ID; make it with --device vmgenid"),
    ):
        vm.renew_generation()


def test_iasl_reads_the_device(tmp_path):
    text = devices_there_and_back(tmp_path, acpi.vmgenid())
    for expected in ('"VM_Gen_Counter"', '"ACPI0013"', "Notify (\\_SB.VGEN, 0x80)", "0xFEB10000"):
        assert expected in text, text
