"""CPUID leaves as data, and what the number of processors changes (Intel SDM vol. 2, CPUID).

A table has an entry for each leaf and sub-leaf; where only the leaf counts, the sub-leaf is None.
"""

from typing import NamedTuple

Key = tuple[int, int | None]


class Leaf(NamedTuple):
    """What CPUID puts into EAX, EBX, ECX and EDX."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


Table = dict[Key, Leaf]

INTEL, AMD = b"GenuineIntel", b"AuthenticAMD"

# Leaf 1
_EDX_APIC, _EDX_HTT = 1 << 9, 1 << 28
# Leaf 0xb: types of levels
_THREAD, _CORE = 1, 2
# Leaf 0x80000001, ECX: several cores
_CMP_LEGACY = 1 << 1


def vendor(table: Table) -> bytes:
    """Twelve letters."""
    leaf = table.get((0, None), Leaf())
    return b"".join(word.to_bytes(4, "little") for word in (leaf.ebx, leaf.edx, leaf.ecx))


def brand(table: Table) -> str:
    """What the processor calls itself."""
    leaves = (table.get((number, None), Leaf()) for number in range(0x8000_0002, 0x8000_0005))
    data = b"".join(word.to_bytes(4, "little") for leaf in leaves for word in leaf)
    return data.split(b"\0")[0].decode("ascii", "replace").strip()


def with_brand(table: Table, text: str) -> Table:
    """`table` whose processor calls itself `text`, of at most 48 bytes."""
    data = text.encode("ascii", "replace")[:48].ljust(48, b"\0")
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, 48, 4)]
    new = dict(table)
    for number in range(3):
        new[0x8000_0002 + number, None] = Leaf(*words[4 * number : 4 * number + 4])
    first = new.get((0x8000_0000, None), Leaf())
    new[0x8000_0000, None] = first._replace(eax=max(first.eax, 0x8000_0004))
    return new


def family_model_stepping(table: Table) -> tuple[int, int, int]:
    """The numbers in leaf 1, EAX, with the extended ones where they count."""
    eax = table.get((1, None), Leaf()).eax
    family, model = eax >> 8 & 0xF, eax >> 4 & 0xF
    if family in (6, 0xF):
        model |= eax >> 12 & 0xF0
    if family == 0xF:
        family += eax >> 20 & 0xFF
    return family, model, eax & 0xF


def with_topology(table: Table, cpu: int, cpus: int) -> Table:
    """`table` for processor `cpu` of `cpus`: one package with so many cores of one thread each.

    The APIC ID is the number. Caches of the third level are the package's, the others a core's.
    """
    bits = (cpus - 1).bit_length()  # of the APIC ID, below those that name the package
    new = dict(table)

    def change(key: Key, **words: int) -> None:
        if key in new:
            new[key] = new[key]._replace(**words)

    if (1, None) in new:
        leaf = new[1, None]
        several, count = (_EDX_HTT, min(1 << bits, 0xFF)) if cpus > 1 else (0, 0)
        edx = leaf.edx & ~_EDX_HTT | _EDX_APIC | several
        ebx = leaf.ebx & 0xFFFF | count << 16 | (cpu & 0xFF) << 24
        change((1, None), ebx=ebx, edx=edx)
    for number in (4, 0x8000_001D):  # caches
        for key, leaf in table.items():
            if key[0] == number and leaf.eax & 0x1F:
                shared = (1 << bits) - 1 if leaf.eax >> 5 & 7 >= 3 else 0
                cores = (
                    (min((1 << bits) - 1, 0x3F) << 26) if number == 4 else leaf.eax & ~0x3FF_FFFF
                )
                change(key, eax=leaf.eax & 0x3FFF | shared << 14 | cores)
    for key in [key for key in new if key[0] in (0xB, 0x1F)]:
        del new[key]
    if max(leaf for leaf, _ in table if leaf < 0x4000_0000) >= 0xB:
        new[0xB, 0] = Leaf(0, 1, _THREAD << 8, cpu)
        new[0xB, 1] = Leaf(bits, cpus, _CORE << 8 | 1, cpu)
        new[0xB, 2] = Leaf(0, 0, 2, cpu)
    if vendor(table) == AMD:
        # Cores less one, and how many bits of the APIC ID they take (APM vol. 3, E.4.8).
        change((0x8000_0008, None), ecx=bits << 12 | (cpus - 1) & 0xFF)
        if (0x8000_0001, None) in new:
            ecx = new[0x8000_0001, None].ecx & ~_CMP_LEGACY
            change((0x8000_0001, None), ecx=ecx | (_CMP_LEGACY if cpus > 1 else 0))
        change((0x8000_001E, None), eax=cpu, ebx=cpu, ecx=0)
    return new
