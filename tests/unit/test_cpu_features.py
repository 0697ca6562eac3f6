"""`--cpu`: names of features, and what is offered with and without them."""

from pathlib import Path

import pytest

from vmexit import Machine, StopReason
from vmexit.accel.kvm.cpuid import pack
from vmexit.accel.kvm.system import System
from vmexit.accel.kvm.vm import KvmVm
from vmexit.arch.x86.cpu_features import FEATURES, canonical, offered
from vmexit.arch.x86.cpu_model import CpuModel
from vmexit.arch.x86.cpuid import (
    Leaf,
    Table,
    brand,
    family_model_stepping,
)
from vmexit.core.errors import ConfigError, HostError


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
        ("misalignsse", 0x8000_0001, None, "ecx", 7), ("xop", 0x8000_0001, None, "ecx", 11),
        ("fma4", 0x8000_0001, None, "ecx", 16), ("tbm", 0x8000_0001, None, "ecx", 21),
        ("perfctr_core", 0x8000_0001, None, "ecx", 23),
        ("mmxext", 0x8000_0001, None, "edx", 22), ("fxsr_opt", 0x8000_0001, None, "edx", 25),
        ("3dnow", 0x8000_0001, None, "edx", 31), ("xsaveerptr", 0x8000_0008, None, "ebx", 2),
        ("wbnoinvd", 0x8000_0008, None, "ebx", 9), ("ibrs", 0x8000_0008, None, "ebx", 14),
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
        names = offered(vm._parts.vm.executors[0]._processor.cpuid(0))
    assert {"fpu", "sse2", "lm", "nx", "syscall", "cx16", "popcnt", "hypervisor"} <= set(names)
    assert not {"avx", "xsave", "x2apic", "vmx", "svm", "mtrr"} & set(names)


TABLE: Table = {(1, None): Leaf(0x806EA, 0, 1 << 23 | 1 << 20, 1), (7, 0): Leaf(0, 1 << 5)}


def test_features_are_left_out_and_others_stay():
    new = CpuModel.parse("host,-popcnt,-avx2").applied(TABLE, "KVM")
    assert offered(new) == ["fpu", "sse4_2"]
    assert offered(TABLE) == ["fpu", "sse4_2", "popcnt", "avx2"]


def test_what_is_there_may_be_asked_for_and_what_is_not_may_not():
    assert CpuModel.parse("max,+avx2").applied(TABLE, "KVM") == TABLE
    with pytest.raises(
        HostError, match=r"KVM cannot offer avx512f on this host; leave \+avx512f out"
    ):
        CpuModel.parse("max,+avx512f").applied(TABLE, "KVM")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qemu64", "no processor 'qemu64'; use host or max"),
        ("", "--cpu: there is no processor ''"),
        ("q" * 100_000, "--cpu: there is no processor 'q{64}[.]{3}'; use host"),
        ("host,avx", "--cpu: 'avx' is neither .*; begin it with"),
        ("host," + "q" * 100_000, "--cpu: 'q{64}[.]{3}' is neither"),
        ("host,", "--cpu has a comma with no feature behind it; use"),
        ("host,-popcnd", "no CPU feature 'popcnd'; is it popcnt"),
        ("host,+%%%", "doctor --cpuid"),
        ("host,-" + "q" * 100_000, "--cpu: there is no CPU feature 'q{64}[.]{3}'"),
        ("host,+sse2,-sse2", r"asks for \+sse2 and leaves out sse2; give one of them"),
        ("host,-avx,+avx2", r"asks for \+avx2 and leaves out avx, without which there is no avx2"),
    ],
)
def test_what_cannot_be_is_said(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        CpuModel.parse(text)
    assert len(str(caught.value)) < 300
    with pytest.raises(ConfigError, match=message):
        Machine("1M", "soft", cpu=text)


# A processor with AVX-512, protection keys and AMX; each part of the state is at EBX, EAX long.
WIDE: Table = {
    (0, None): Leaf(0x1F),
    (1, None): Leaf(0, 0, 0xFFFF_FFFF, 0xFFFF_FFFF),
    (7, 0): Leaf(1, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF),
    (7, 1): Leaf(0xFFFF_FFFF),
    (0xD, 0): Leaf(0x6_02E7, 11008, 11008, 0),
    (0xD, 1): Leaf(0xF, 12000, 1 << 8, 0),
    (0xD, 2): Leaf(256, 576),
    (0xD, 5): Leaf(64, 1088), (0xD, 6): Leaf(512, 1152), (0xD, 7): Leaf(1024, 1664),
    (0xD, 8): Leaf(128, 0, 1, 0),  # a component of the supervisor
    (0xD, 9): Leaf(8, 2688),
    (0xD, 17): Leaf(64, 2752), (0xD, 18): Leaf(8192, 2816),
    (0x8000_0001, None): Leaf(0, 0, 0xFFFF_FFFF, 0xFFFF_FFFF),
}  # fmt: skip


def test_without_avx_nothing_that_needs_it_is_there():
    new = CpuModel.parse("host,-avx").applied(WIDE, "KVM")
    names = set(offered(new))
    assert not {n for n in names if n.startswith("avx")}
    assert not {"fma", "fma4", "f16c", "xop", "vaes", "vpclmulqdq"} & names
    assert {"sse4_2", "xsave", "pku", "aes", "amx-tile"} <= names
    # x87, SSE, protection keys and AMX are left, up to where AMX ends.
    assert new[0xD, 0] == Leaf(0x6_0203, 576, 2816 + 8192, 0)
    assert {key for key in WIDE if key[0] == 0xD and not any(new[key])} == {
        (0xD, 2), (0xD, 5), (0xD, 6), (0xD, 7),
    }  # fmt: skip


def test_without_avx512_avx_stays():
    new = CpuModel.parse("host,-avx512f,-amx-tile").applied(WIDE, "KVM")
    assert {"avx", "avx2", "avx-vnni"} <= set(offered(new))
    assert not {n for n in offered(new) if n.startswith(("avx512", "amx"))}
    assert new[0xD, 0] == Leaf(0x207, 576, 2688 + 8, 0)
    assert new[0xD, 8] == WIDE[0xD, 8]


def test_without_xsaves_the_supervisors_state_is_gone():
    new = CpuModel.parse("host,-xsaves").applied(WIDE, "KVM")
    assert new[0xD, 1] == Leaf(7) and new[0xD, 8] == Leaf()
    assert new[0xD, 0] == WIDE[0xD, 0]._replace(ebx=576)


def test_without_xsave_there_is_no_state_at_all():
    new = CpuModel.parse("host,-xsave").applied(WIDE, "KVM")
    assert not {n for n in offered(new) if n.startswith(("avx", "xsave", "amx"))}
    assert not {"pku", "ospke", "xgetbv1"} & set(offered(new))
    assert not any(any(leaf) for key, leaf in new.items() if key[0] == 0xD)


def test_amds_second_mention_of_a_feature_goes_too():
    new = CpuModel.parse("host,-mmx,-sse2").applied(WIDE, "KVM")
    edx = new[0x8000_0001, None].edx
    assert not edx >> 23 & 1 and edx >> 24 & 1 and edx >> 29 & 1
    assert not {"sse2", "sse3", "ssse3", "sse4_1", "sse4_2", "mmxext", "3dnow"} & set(offered(new))


def test_the_software_cpu_leaves_out_what_depends_on_it():
    with Machine("1M", "soft", cpu="host,-sse3") as vm:
        names = set(offered(vm._parts.vm.executors[0]._processor.cpuid(0)))
    assert "sse2" in names and not {"sse3", "sse4_1", "sse4_2"} & names


@pytest.mark.kvm
def test_what_kvm_lacks_may_be_the_software_cpus(monkeypatch):
    def nothing(system):
        return pack({(0, None): Leaf(1), (1, None): Leaf()})

    monkeypatch.setattr(System, "supported_cpuid", nothing)
    with Machine("1M", "auto", cpu="host,+popcnt") as vm:
        assert vm.accel == "soft"
        assert "KVM cannot offer popcnt" in vm.accel_reason
    with pytest.raises(HostError, match=r"software CPU cannot offer amx-tile .* leave \+amx-tile"):
        Machine("1M", "auto", cpu="host,+amx-tile")


@pytest.mark.kvm
def test_a_kvm_that_shows_what_is_left_out_is_found(monkeypatch):
    monkeypatch.setattr(KvmVm, "guest_cpuid", lambda vm, vcpu: WIDE)
    with pytest.raises(HostError, match=r"shows avx2 to its guests in spite of -avx2; leave -avx2"):
        Machine("1M", "kvm", cpu="host,-avx2")
    with Machine("1M", "kvm", cpu="host") as vm:
        assert vm.accel == "kvm"


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
    try:
        vm = Machine("1M", accel, cpu=cpu)
    except HostError as error:
        assert accel == "kvm" and value == 0 and "shows popcnt" in str(error)
        pytest.skip("this KVM obeys CPUID only partly, and vmexit says so")
    with vm:
        vm.load_bytes(code, at=0x1000)
        stop = vm.run(timeout=30)
        assert (stop.reason, stop.value) == (StopReason.DEBUG_EXIT, value)
