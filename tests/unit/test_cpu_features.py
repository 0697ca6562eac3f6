"""`--cpu`: names of features, and what is offered with and without them."""

from pathlib import Path

import pytest

from vmexit import Machine, StopReason
from vmexit.arch.x86.cpu_features import FEATURES, canonical, offered
from vmexit.arch.x86.cpu_model import CpuModel
from vmexit.arch.x86.cpuid import (
    Leaf,
    Table,
    brand,
    family_model_stepping,
)
from vmexit.core.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "leaf", "subleaf", "register", "bit"),
    [
        ("fpu", 1, None, "edx", 0), ("apic", 1, None, "edx", 9), ("sep", 1, None, "edx", 11),
        ("mmx", 1, None, "edx", 23), ("ht", 1, None, "edx", 28),
        ("sse3", 1, None, "ecx", 0), ("vmx", 1, None, "ecx", 5), ("cx16", 1, None, "ecx", 13),
        ("x2apic", 1, None, "ecx", 21), ("popcnt", 1, None, "ecx", 23),
        ("tsc-deadline", 1, None, "ecx", 24), ("avx", 1, None, "ecx", 28),
        ("rdrand", 1, None, "ecx", 30), ("hypervisor", 1, None, "ecx", 31),
        ("fsgsbase", 7, 0, "ebx", 0), ("avx2", 7, 0, "ebx", 5), ("smep", 7, 0, "ebx", 7),
        ("avx512f", 7, 0, "ebx", 16), ("smap", 7, 0, "ebx", 20), ("sha", 7, 0, "ebx", 29),
        ("umip", 7, 0, "ecx", 2), ("la57", 7, 0, "ecx", 16), ("rdpid", 7, 0, "ecx", 22),
        ("fsrm", 7, 0, "edx", 4), ("spec-ctrl", 7, 0, "edx", 26), ("ssbd", 7, 0, "edx", 31),
        ("xsaveopt", 0xD, 1, "eax", 0), ("xsaves", 0xD, 1, "eax", 3),
        ("syscall", 0x8000_0001, None, "edx", 11), ("nx", 0x8000_0001, None, "edx", 20),
        ("pdpe1gb", 0x8000_0001, None, "edx", 26), ("lm", 0x8000_0001, None, "edx", 29),
        ("lahf_lm", 0x8000_0001, None, "ecx", 0), ("svm", 0x8000_0001, None, "ecx", 2),
        ("abm", 0x8000_0001, None, "ecx", 5), ("invtsc", 0x8000_0007, None, "edx", 8),
        ("ibpb", 0x8000_0008, None, "ebx", 12), ("kvmclock", 0x4000_0001, None, "eax", 0),
    ],
)  # fmt: skip
def test_names_are_bits_of_the_manuals(name, leaf, subleaf, register, bit):
    assert FEATURES[name] == (leaf, subleaf, register, bit)


def test_linuxs_names_are_known_too():
    assert canonical("pni") == "sse3" and canonical("tsc_deadline_timer") == "tsc-deadline"
    assert canonical("sse4.1") == "sse4_1" and canonical("nonsense") == ""


def test_the_host_has_what_linux_says_of_it():
    """The table of the software CPU, as a guest's /proc/cpuinfo would name it."""
    with Machine("1M", "soft") as vm:
        names = offered(vm._parts.executors[0]._processor.cpuid(0))
    assert {"fpu", "sse2", "lm", "nx", "syscall", "cx16", "popcnt", "hypervisor"} <= set(names)
    assert not {"avx", "xsave", "x2apic", "vmx", "svm", "mtrr"} & set(names)


TABLE: Table = {(1, None): Leaf(0x806EA, 0, 1 << 23 | 1 << 20, 1), (7, 0): Leaf(0, 1 << 5)}


def test_features_are_left_out_and_others_stay():
    new = CpuModel.parse("host,-popcnt,-avx2").applied(TABLE)
    assert offered(new) == ["fpu", "sse4_2"]
    assert offered(TABLE) == ["fpu", "sse4_2", "popcnt", "avx2"]


def test_what_is_there_may_be_asked_for_and_what_is_not_may_not():
    assert CpuModel.parse("max,+avx2").applied(TABLE) == TABLE
    with pytest.raises(
        ConfigError, match=r"cannot offer avx512f on this host; leave \+avx512f out"
    ):
        CpuModel.parse("max,+avx512f").applied(TABLE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qemu64", "no processor 'qemu64'; use host or max"),
        ("host,avx", "'avx' of --cpu is neither"),
        ("host,", "'' of --cpu is neither"),
        ("host,-popcnd", "no CPU feature 'popcnd'; is it popcnt"),
        ("host,+%%%", "doctor --cpuid"),
    ],
)
def test_what_cannot_be_is_said(text, message):
    with pytest.raises(ConfigError, match=message):
        CpuModel.parse(text)
    with pytest.raises(ConfigError, match=message):
        Machine("1M", "soft", cpu=text)


def test_numbers_and_brand():
    assert family_model_stepping(TABLE) == (6, 0x8E, 10)
    assert family_model_stepping({(1, None): Leaf(0x800F12)}) == (0x17, 1, 2)
    text = b"  A brand".ljust(48, b"\0")
    words = [int.from_bytes(text[i : i + 4], "little") for i in range(0, 48, 4)]
    table = {(0x8000_0002 + i, None): Leaf(*words[4 * i : 4 * i + 4]) for i in range(3)}
    assert brand(table) == "A brand" and brand({}) == ""


@pytest.mark.parametrize(("cpu", "value"), [("host", 1), ("host,-popcnt", 0)])
def test_a_guest_sees_it(accel, cpu, value):
    """mov eax, 1; cpuid; shr ecx, 23; mov al, cl; and al, 1; out 0xf4, al"""
    code = bytes.fromhex("66b801000000 0fa2 66c1e917 88c8 2401 e6f4")
    if accel == "kvm" and " popcnt " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no POPCNT")
    with Machine("1M", accel, cpu=cpu) as vm:
        vm.load_bytes(code, at=0x1000)
        stop = vm.run(timeout=30)
        if accel == "kvm" and Path("/sys/module/kvm_pvm").exists():
            pytest.skip("PVM obeys CPUID only partly")
        assert (stop.reason, stop.value) == (StopReason.DEBUG_EXIT, value)
