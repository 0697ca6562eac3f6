"""CPUID tables as KVM takes and gives them: `struct kvm_cpuid2` (KVM API 4.20, 4.46)."""

import struct

from vmexit.arch.x86.cpuid import Leaf, Table

_HEAD = struct.Struct("=II")  # nent, padding
_ENTRY = struct.Struct("=7I12x")  # function, index, flags, eax, ebx, ecx, edx
_SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX


def parse(data: bytes) -> Table:
    """The entries of a `struct kvm_cpuid2`."""
    count, _ = _HEAD.unpack_from(data)
    table: Table = {}
    for number in range(count):
        at = _HEAD.size + number * _ENTRY.size
        function, index, flags, *words = _ENTRY.unpack_from(data, at)
        table[function, index if flags & _SIGNIFICANT_INDEX else None] = Leaf(*words)
    return table


def pack(table: Table) -> bytes:
    """The reverse."""
    data = bytearray(_HEAD.pack(len(table), 0))
    for (function, index), leaf in table.items():
        flags = 0 if index is None else _SIGNIFICANT_INDEX
        data += _ENTRY.pack(function, index or 0, flags, *leaf)
    return bytes(data)
