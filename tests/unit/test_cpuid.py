"""What the number of processors changes in CPUID (Intel SDM vol. 2; AMD APM vol. 3, appendix E)."""

import os
from pathlib import Path

import pytest

from vmexit import Machine
from vmexit.accel.kvm.cpuid import of_vcpu, pack, packed_of_vcpu, parse
from vmexit.accel.kvm.system import System
from vmexit.arch.x86.cpuid import (
    AMD,
    INTEL,
    Leaf,
    Table,
    brand,
    vendor,
    with_brand,
    with_topology,
)
from vmexit.core.bus import Bus
from vmexit.core.memory import GuestMemory


def words(text: bytes) -> list[int]:
    return [int.from_bytes(text[i : i + 4], "little") for i in (0, 4, 8)]


def table(who: bytes) -> Table:
    b, d, c = words(who)
    return {
        (0, None): Leaf(0x1F, b, c, d),
        (1, None): Leaf(0x806E9, 0x0710_0800, 0x1, 1 << 9 | 1 << 28),
        (4, 0): Leaf(0xFC00_4121, 1, 2, 3),  # L1 data, 2 threads, 64 cores
        (4, 3): Leaf(0xFC03_C163, 4, 5, 6),  # L3, 16 threads
        (4, 4): Leaf(),
        (0xB, 0): Leaf(1, 2, 0x100, 9),
        (0xB, 1): Leaf(4, 16, 0x201, 9),
        (0x1F, 0): Leaf(1, 2, 0x100, 9),
        (0x8000_0001, None): Leaf(0, 0, 1 << 22, 0),
        (0x8000_0008, None): Leaf(0x3030, 0, 0xF, 0),
        (0x8000_001E, None): Leaf(9, 0x109, 0x200, 0),
    }


@pytest.mark.parametrize(("cpus", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (64, 6)])
@pytest.mark.parametrize("who", [INTEL, AMD])
def test_each_processor_is_a_core_of_one_package(who, cpus, bits):
    assert vendor(table(who)) == who
    for cpu in range(cpus):
        new = with_topology(table(who), cpu, cpus)
        leaf = new[1, None]
        assert leaf.ebx >> 24 == cpu
        assert bool(leaf.edx & 1 << 28) is (cpus > 1)
        assert leaf.ebx >> 16 & 0xFF == (1 << bits if cpus > 1 else 0)
        assert leaf.ebx & 0xFFFF == 0x0800
        # Leaf 0xb, as an operating system takes the APIC ID apart by it.
        assert new[0xB, 0][:3] == (0, 1, 1 << 8)
        assert new[0xB, 1][:3] == (bits, cpus, 2 << 8 | 1)
        assert new[0xB, 0].edx == new[0xB, 1].edx == cpu
        assert cpu >> new[0xB, 1].eax == 0  # one package
        assert new[0xB, 2].ecx >> 8 == 0  # no more levels
        assert not any(key[0] == 0x1F for key in new)
        if who == AMD:
            assert new[0x8000_0008, None].ecx == bits << 12 | cpus - 1
            assert new[0x8000_001E, None][:2] == (cpu, cpu)
            assert bool(new[0x8000_0001, None].ecx & 1 << 1) is (cpus > 1)


def test_caches_are_shared_by_the_package_at_the_third_level_only():
    new = with_topology(table(INTEL), 1, 4)
    assert new[4, 0] == Leaf(3 << 26 | 0x121, 1, 2, 3)
    assert new[4, 3] == Leaf(3 << 26 | 3 << 14 | 0x163, 4, 5, 6)
    assert new[4, 4] == Leaf()


def test_the_table_that_was_given_stays_as_it_was():
    before = table(AMD)
    with_topology(before, 1, 2)
    assert before == table(AMD)


def test_kvm_structures_there_and_back():
    before = table(INTEL)
    data = pack(before)
    assert len(data) == 8 + 40 * len(before)
    assert parse(data) == before


def test_a_brand_is_48_bytes_in_three_leaves():
    new = with_brand(table(b"GenuineIntel"), "A processor, " + "x" * 60)
    assert brand(new) == ("A processor, " + "x" * 60)[:48]
    assert new[0x8000_0000, None].eax >= 0x8000_0004
    assert new[0x8000_0002, None].eax == int.from_bytes(b"A pr", "little")
    assert brand(with_brand(new, "short")) == "short"


def test_entries_that_an_older_kernel_leaves_empty_do_not_count():
    before = table(INTEL)
    data = bytearray(pack(before) + bytes(80))
    data[0] += 2
    assert parse(data) == before


@pytest.mark.parametrize("who", [INTEL, AMD])
def test_without_interrupt_controllers_there_is_no_apic(who):
    supported = table(who)
    supported[1, None] = Leaf(0x806E9, 0x7710_0800, 1 << 21 | 1 << 24 | 1, 1 << 9 | 1 << 28)
    supported[0x8000_0001, None] = Leaf(0, 0, 0, 1 << 9 | 1 << 29)
    bare = of_vcpu(pack(supported), 0, 1, False, False)
    assert bare[1, None] == Leaf(0x806E9, 0x0800, 1 << 31 | 1, 0)
    assert bare[0x8000_0001, None].edx == 1 << 29
    assert bare[0xB, 0] == Leaf(0, 1, 1 << 8, 0)
    pc = of_vcpu(pack(supported), 2, 4, True, True)
    assert pc[1, None] == Leaf(
        0x806E9, 2 << 24 | 4 << 16 | 0x0800, 1 << 31 | 1 << 24 | 1 << 21 | 1, 1 << 9 | 1 << 28
    )
    assert parse(packed_of_vcpu(pack(supported), 2, 4, True, True)) == pc


@pytest.mark.kvm
@pytest.mark.parametrize("machine", ["bare", "microvm"])
def test_the_guest_on_kvm_is_the_first_processor_wherever_it_runs(machine):
    """mov eax, 1; cpuid; mov al, 1; out 0xf4, al"""
    seen = set()
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in allowed:
            os.sched_setaffinity(0, {cpu})
            with Machine("1M", "kvm", machine=machine, mode="protected") as vm:
                vm.load_bytes(bytes.fromhex("b801000000 0fa2 b001 e6f4"), at=0x1000)
                vm.run(timeout=30)
                regs = vm.vcpus[0].regs
                seen.add((regs.rbx >> 24, regs.rbx >> 16 & 0xFF))
                apic = machine == "microvm"
                assert bool(regs.rdx >> 9 & 1) is apic
                if not apic:
                    assert not regs.rcx & (1 << 21 | 1 << 24)
    finally:
        os.sched_setaffinity(0, allowed)
    if Path("/sys/module/kvm_pvm").exists():
        pytest.skip("PVM obeys CPUID only partly")
    assert seen == {(0, 0)}


@pytest.mark.kvm
def test_the_guest_on_kvm_sees_a_brand():
    """KVM itself gives none."""
    memory = GuestMemory([(0, 1 << 20)])
    with System() as system, system.create_vm(memory, Bus("port"), Bus("MMIO")) as vm:
        vm.create_irqchip()
        assert brand(vm.cpuid(0)).isprintable() and brand(vm.cpuid(0))
    memory.close()
