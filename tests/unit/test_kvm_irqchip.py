"""Interrupt controllers in the kernel."""

import os
import time

import pytest

from vmexit.accel.kvm.system import System
from vmexit.arch.x86.cpuid import Leaf
from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError, HostError
from vmexit.core.memory import GuestMemory

pytestmark = pytest.mark.kvm

IOAPIC_IRR = 8 + 8 + 8  # struct kvm_irqchip: chip_id, pad; ioapic: base_address, ioregsel, id
PIC_IRR = 8 + 1


@pytest.fixture
def chip():
    memory = GuestMemory([(0, 1 << 20)])
    with System() as system, system.create_vm(memory, Bus("port"), Bus("MMIO"), 2) as vm:
        yield vm.create_irqchip()
    memory.close()


def ioapic_lines(chip) -> int:
    return int.from_bytes(chip.state()["ioapic"][IOAPIC_IRR : IOAPIC_IRR + 4], "little")


@pytest.mark.parametrize("gsi", [1, 4, 9, 15, 16, 23])
def test_a_line_is_seen_by_the_ioapic_and_if_it_is_isas_by_the_pic(chip, gsi):
    chip.set_level(gsi, True)
    assert ioapic_lines(chip) == 1 << gsi
    state = chip.state()
    assert state["pic_master"][PIC_IRR] >> gsi & 1 == (gsi < 8)
    assert gsi < 8 or state["pic_slave"][PIC_IRR] == (1 << gsi - 8 if gsi < 16 else 0)
    chip.set_level(gsi, False)
    assert ioapic_lines(chip) == 0


def test_gsi_0_is_pin_2_of_the_ioapic(chip):
    chip.set_level(0, True)
    assert ioapic_lines(chip) == 1 << 2
    assert chip.state()["pic_master"][PIC_IRR] & 1


def test_state_goes_there_and_back_and_reset_is_as_at_first(chip):
    fresh = chip.state()
    chip.set_level(4, True)
    raised = chip.state()
    assert raised != fresh
    chip.reset()
    assert chip.state()["pic_master"] == fresh["pic_master"]
    chip.restore(raised)
    assert chip.state()["pic_master"] == raised["pic_master"]
    assert chip.state()["ioapic"] == raised["ioapic"]


@pytest.mark.parametrize("gsi", [8, 12, 15])
def test_a_request_of_the_slave_is_gone_after_reset_and_restore(chip, gsi):
    fresh = chip.state()
    for back in (chip.reset, lambda: chip.restore(fresh)):
        chip.set_level(gsi, True)
        chip.set_level(gsi, False)
        assert chip.state()["pic_master"][PIC_IRR] == 1 << 2
        back()
        for name in ("pic_master", "pic_slave"):
            assert chip.state()[name] == fresh[name]


def test_gsi_2_leads_nowhere(chip):
    fresh = chip.state()
    chip.set_level(2, True)
    assert chip.state() == fresh
    chip.set_level(2, False)
    assert chip.state() == fresh


@pytest.mark.parametrize("gsi", [-1, 24, 4096, 1 << 33])
def test_what_is_no_gsi_is_refused(chip, gsi):
    with pytest.raises(ConfigError, match=rf"no GSI {gsi}; use 0 to 23"):
        chip.set_level(gsi, True)
    with pytest.raises(ConfigError, match=rf"no GSI {gsi}; use 0 to 23"):
        chip.assign_irqfd(gsi, 0)


def test_a_closed_chip_reaches_no_other_vm():
    memory = GuestMemory([(0, 1 << 20)])
    with System() as system:
        with system.create_vm(memory, Bus("port"), Bus("MMIO")) as vm:
            old = vm.create_irqchip()
            state = old.state()
        with system.create_vm(memory, Bus("port"), Bus("MMIO")) as vm:
            new = vm.create_irqchip()
            for use in (
                lambda: old.set_level(3, True),
                lambda: old.restore(state),
                old.reset,
                old.state,
                lambda: old.assign_irqfd(3, 0),
            ):
                with pytest.raises(HostError, match="is closed; make another"):
                    use()
            assert new.state()["pic_master"] == state["pic_master"]
    memory.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(version=2),
        lambda s: s.update(pit=b""),
        lambda s: s.pop("ioapic"),
        lambda s: s.update(pic_master=s["pic_slave"]),
        lambda s: s.update(pic_slave="text"),
    ],
)
def test_what_is_no_state_of_them_is_refused_and_changes_nothing(chip, change):
    chip.set_level(5, True)
    state = dict(chip.state())
    before = chip.state()["ioapic"]
    change(state)
    with pytest.raises(ConfigError, match="save it anew"):
        chip.restore(state)
    assert chip.state()["ioapic"] == before


def test_an_eventfd_gives_edges(chip):
    event = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        chip.assign_irqfd(7, event)
        os.eventfd_write(event, 1)
        # The PIC keeps an edge until it is taken.
        end = time.monotonic() + 30
        while chip.state()["pic_master"][PIC_IRR] != 1 << 7:
            assert time.monotonic() < end
        with pytest.raises(HostError, match="has one GSI"):
            chip.assign_irqfd(7, event)
        chip.deassign_irqfd(7, event)
        chip.reset()
        os.eventfd_write(event, 1)
        assert chip.state()["pic_master"][PIC_IRR] == 0
        with pytest.raises(HostError, match="GSI 7"):
            chip.assign_irqfd(7, 1 << 20)
    finally:
        os.close(event)


def test_vcpus_have_apic_ids_and_a_hypervisor():
    from vmexit.accel.kvm.cpuid import parse

    memory = GuestMemory([(0, 1 << 20)])
    with System() as system, system.create_vm(memory, Bus("port"), Bus("MMIO"), 3) as vm:
        vm.create_irqchip()
        for cpu in range(3):
            leaf = parse(vm._cpuid(cpu))[1, None]
            assert isinstance(leaf, Leaf)
            assert leaf.ebx >> 24 == cpu and leaf.ecx >> 31 and leaf.edx >> 9 & 1
    memory.close()
