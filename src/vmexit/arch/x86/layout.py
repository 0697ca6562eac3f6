"""Every guest address that vmexit chooses, each with its reason."""

# The MMIO hole: GPAs below 4 GiB where no RAM is. The LAPIC (0xfee00000), the IOAPIC (0xfec00000)
# and the firmware ROM have their architectural places in the last GiB, so RAM stops at 3 GiB
# and goes on at 4 GiB.
MMIO_HOLE_START = 0xC000_0000
MMIO_HOLE_END = 0x1_0000_0000

# Where guest RAM may end: the software CPU's physical addresses have 40 bits.
PHYSICAL_END = 1 << 40

# A ROM ends at 4 GiB because the reset vector is 0xfffffff0 (Intel SDM vol. 3, 10.1.4).
ROM_END = MMIO_HOLE_END
# A PC shows the last 128 KiB of its ROM below 1 MiB, too, so that real mode reaches it.
ROM_SHADOW_END = 0x10_0000
ROM_SHADOW_SIZE = 0x2_0000
# A larger ROM would come near the IOAPIC page at 0xfec00000.
ROM_MAX_SIZE = 0x100_0000

# Three pages that KVM on Intel needs for real mode without unrestricted guest (KVM API 4.36) and
# one for its identity map (4.40). They lie in the hole where neither RAM, ROM nor an APIC is.
KVM_TSS_ADDRESS = 0xFEFF_D000
KVM_IDENTITY_MAP_ADDRESS = 0xFEFF_C000

# Flat images: the start that the command line gives them unless told otherwise.
FLAT_LOAD_ADDRESS = 0x0
FLAT_ENTRY = 0x1000

# The boot tables that protected and long mode start with (a GDT; for long mode page tables, too)
# take the last pages of low RAM, because images usually are at its beginning.
# Long mode: one PML4, one PDPT, and a page directory for each GiB that is mapped.
GDT_PAGES = 1
# At least 4 GiB are identity-mapped, so that the MMIO hole and the ROM are within reach.
IDENTITY_MAP_MIN = MMIO_HOLE_END
# And as much as one page of page directory pointers reaches.
IDENTITY_MAP_MAX = 512 << 30

# COM1: the first serial port of a PC.
COM1_PORT = 0x3F8


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """`(gpa, size)` of the RAM ranges for `size` bytes: around the MMIO hole."""
    low = min(size, MMIO_HOLE_START)
    ranges = [(0, low)]
    if size > low:
        ranges.append((MMIO_HOLE_END, size - low))
    return ranges
