"""CPUID tables as KVM takes and gives them, and what they say of each vCPU.

They are `struct kvm_cpuid2` (KVM API 4.20, 4.46).
"""

import struct
from ctypes import sizeof
from functools import cache
from pathlib import Path

from vmexit.abi.kvm import KVM_CPUID_FLAG_SIGNIFCANT_INDEX
from vmexit.abi.kvm_structs import kvm_cpuid2, kvm_cpuid_entry2
from vmexit.arch.x86.cpuid import Leaf, Table, brand, with_brand, with_topology

# struct kvm_cpuid_entry2: function, index, flags, eax, ebx, ecx, edx. The structure itself, whose
# size it has, is slow to take apart.
_ENTRY = struct.Struct("=7I12x")
_HEAD = sizeof(kvm_cpuid2)

# Leaf 1. By number, as the names of all features take a millisecond to load.
_X2APIC_ECX, _TSC_DEADLINE_ECX, _HYPERVISOR_ECX = 1 << 21, 1 << 24, 1 << 31
_APIC_EDX = 1 << 9  # AMD has it in leaf 0x80000001, too


def empty(entries: int) -> bytearray:
    """Room for so many entries."""
    return bytearray(bytes(kvm_cpuid2(nent=entries))) + bytes(entries * sizeof(kvm_cpuid_entry2))


def parse(data: bytes | bytearray) -> Table:
    """The entries of a `struct kvm_cpuid2`."""
    count = kvm_cpuid2.from_buffer_copy(data).nent
    table: Table = {}
    for entry in _ENTRY.iter_unpack(data[_HEAD : _HEAD + count * _ENTRY.size]):
        function, index, flags, *words = entry
        # Older kernels say that all the room which they were given is filled; the rest is zero.
        if any(entry):
            table[function, index if flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX else None] = Leaf(
                *words
            )
    return table


def sound(data: bytes) -> bool:
    """Whether it is a `struct kvm_cpuid2` with its entries, and nothing else."""
    return len(data) >= _HEAD and len(data) == _HEAD + _nent(data) * _ENTRY.size


def _nent(data: bytes) -> int:
    return int(kvm_cpuid2.from_buffer_copy(data).nent)


def lacking(shown: bytes, here: bytes) -> list[str]:
    """Names of the features that `shown` has and `here` lacks; both as KVM takes them."""
    from vmexit.arch.x86.cpu_features import FEATURES

    then, now = parse(shown), parse(here)
    return [name for name, one in FEATURES.items() if one.is_in(then) and not one.is_in(now)]


def pack(table: Table) -> bytes:
    """The reverse."""
    data = bytearray(bytes(kvm_cpuid2(nent=len(table))))
    for (function, index), leaf in table.items():
        flags = 0 if index is None else KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        data += _ENTRY.pack(function, index or 0, flags, *leaf)
    return bytes(data)


@cache
def of_vcpu(supported: bytes, index: int, cpus: int, lapic: bool, tsc_deadline: bool) -> Table:
    """What vCPU `index` of `cpus` says, of all that KVM supports; not to be changed.

    KVM's own answer names the processor that the question was asked on, and offers what only its
    LAPIC has.
    """
    table = with_topology(parse(supported), index, cpus)
    if lapic and not brand(table):  # KVM leaves it to the VMM
        table = with_brand(table, _host_brand())
    leaf = table.get((1, None), Leaf())
    ecx, edx = leaf.ecx | _HYPERVISOR_ECX, leaf.edx
    if not lapic:
        ecx, edx = ecx & ~(_X2APIC_ECX | _TSC_DEADLINE_ECX), edx & ~_APIC_EDX
        if (amd := table.get((0x8000_0001, None))) is not None:
            table[0x8000_0001, None] = amd._replace(edx=amd.edx & ~_APIC_EDX)
    elif tsc_deadline:
        ecx |= _TSC_DEADLINE_ECX
    table[1, None] = leaf._replace(ecx=ecx, edx=edx)
    return table


@cache
def packed_of_vcpu(
    supported: bytes, index: int, cpus: int, lapic: bool, tsc_deadline: bool
) -> bytes:
    """The same, packed."""
    return pack(of_vcpu(supported, index, cpus, lapic, tsc_deadline))


@cache
def _host_brand() -> str:
    """What this host's processor calls itself, as Linux read it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines()
    except OSError:  # no /proc
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else "KVM processor"
