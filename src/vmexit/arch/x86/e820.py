"""The memory map that a guest is told: which GPAs are RAM, which are not to be touched."""

from collections.abc import Iterable
from typing import NamedTuple

from vmexit.arch.x86.layout import (
    ACPI_TABLES,
    EBDA_END,
    EBDA_START,
    HIGH_MEMORY,
    KVM_IDENTITY_MAP_ADDRESS,
    KVM_TSS_ADDRESS,
)
from vmexit.core.memory import Region

# Address range types (ACPI 6.4, table 15-374).
RAM, RESERVED, ACPI, NVS, UNUSABLE = 1, 2, 3, 4, 5

_KVM_END = KVM_TSS_ADDRESS + 3 * 0x1000


class E820Entry(NamedTuple):
    """A range of GPAs and its type."""

    gpa: int
    size: int
    type: int

    @property
    def end(self) -> int:
        """The first GPA behind the range."""
        return self.gpa + self.size


def memory_map(regions: Iterable[Region]) -> list[E820Entry]:
    """The map for guest memory of these `regions`, in rising order and without overlap.

    RAM is RAM, save the PC's reserved places below 1 MiB: the EBDA, and the BIOS area with the ACPI
    tables. Between them is the VGA window, which is in no entry. ROM is reserved, and so are the
    pages that KVM needs for itself.
    """
    entries = [
        E820Entry(EBDA_START, EBDA_END - EBDA_START, RESERVED),
        E820Entry(ACPI_TABLES, HIGH_MEMORY - ACPI_TABLES, RESERVED),
        E820Entry(KVM_IDENTITY_MAP_ADDRESS, _KVM_END - KVM_IDENTITY_MAP_ADDRESS, RESERVED),
    ]
    for region in regions:
        if region.readonly:
            entries.append(E820Entry(region.gpa, region.size, RESERVED))
            continue
        for start, end in ((0, EBDA_START), (HIGH_MEMORY, 1 << 64)):
            low, high = max(region.gpa, start), min(region.end, end)
            if low < high:
                entries.append(E820Entry(low, high - low, RAM))
    return sorted(entries)
