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

# What a kernel finds in low memory. A kernel itself is at 1 MiB or above.
# The BIOS data area: the segment of the EBDA and the size of base memory, which Linux reads.
BDA_EBDA_SEGMENT = 0x40E
BDA_BASE_MEMORY_KIB = 0x413
# A GDT, in the first bytes behind the BIOS data area.
KERNEL_GDT = 0x500
# A page for the PVH start info with its module list and memory map, one for Linux's boot_params,
# and six for the map of the first 4 GiB that the 64-bit protocol starts with.
PVH_START_INFO = 0x6000
ZERO_PAGE = 0x7000
KERNEL_PAGE_TABLES = 0x9000
# What a multiboot kernel is told, if it leaves room: behind all that a PC keeps in the first pages.
MULTIBOOT_INFORMATION = 0x9000
# The 64 KiB segment in which Linux's real-mode setup code runs, with its heap and stack at the end.
REAL_MODE_SETUP = 0x1_0000
# Before boot protocol 2.02 setup code moves itself to 0x90000, so it is put there at once.
REAL_MODE_SETUP_OLD = 0x9_0000
# The command line is above the heap of the setup code (Linux boot.rst, cmd_line_ptr).
KERNEL_CMDLINE = 0x2_0000
KERNEL_CMDLINE_END = 0x3_0000
# The small BIOS that real-mode setup code calls: up to the reset vector of an 8086 at 0xffff0.
BIOS_STUB = 0xF_F000
# Base memory ends with 1 KiB of extended BIOS data area, which ends at the VGA window.
EBDA_START = 0x9_FC00
EBDA_END = 0xA_0000
# ACPI tables: the OS looks for the RSDP from here to 1 MiB (ACPI 6.4, 5.2.5.1).
ACPI_TABLES = 0xE_0000
HIGH_MEMORY = 0x10_0000

# APICs at their architectural addresses (Intel SDM vol. 3, 12.4.1; 82093AA data sheet, 3.0).
LAPIC_ADDRESS = 0xFEE0_0000
LAPIC_SIZE = 0x1000
IOAPIC_ADDRESS = 0xFEC0_0000
IOAPIC_SIZE = 0x20

# Power management, where QEMU's PC has it, too: Linux and others find it by the FADT.
PM1A_EVENT_PORT = 0x600
PM1A_CONTROL_PORT = 0x604
PM_TIMER_PORT = 0x608
# The reset control register of a PC's south bridge; 6 is a full reset.
RESET_PORT = 0xCF9
RESET_VALUE = 0x06
# S5, soft off: the sleep type that the guest writes to PM1a_CNT.
SLEEP_TYPE_S5 = 5
SCI_IRQ = 9

# COM1: the first serial port of a PC, and its interrupt.
COM1_PORT = 0x3F8
COM1_GSI = 4

# The devices of a PC/AT, where every system looks for them without asking (IBM PC/AT Technical
# Reference, system board I/O addresses), and the inputs of the interrupt controller they are at.
PIC_MASTER_PORT = 0x20
PIC_SLAVE_PORT = 0xA0
# The edge/level control of both PICs, which came with EISA (82371 PIIX, ELCR1 and ELCR2).
ELCR_PORT = 0x4D0
PIT_PORT = 0x40
PIT_GSI = 0
# System control port B: gate and output of PIT channel 2, speaker, refresh.
PORT61 = 0x61
RTC_PORT = 0x70
RTC_GSI = 8
RTC_CENTURY = 0x32  # the register that the FADT names
# Two ports that are not neighbours: port 0x61 is between them.
I8042_DATA_PORT = 0x60
I8042_COMMAND_PORT = 0x64
KEYBOARD_GSI = 1
MOUSE_GSI = 12
# System control port A of the PS/2: A20 and fast reset.
PORT92 = 0x92
# The reset control register is in the middle of the ports of PCI configuration mechanism #1, whose
# address is written there as 32 bits. Its device takes all four, so that this is no reset.
RESET_CONTROL_PORTS = 0xCF8
# The firmware configuration device, where QEMU's PC has it and firmware looks for it.
FW_CFG_PORT = 0x510
# The device by which a guest tells that it panics, where QEMU has it (QEMU, specs/pvpanic).
PVPANIC_PORT = 0x505
# QEMU's test device: the register twice, the page flush between, the lines, the memory.
TESTDEV_ECHO_PORT, TESTDEV_FLUSH_PORT, TESTDEV_ECHO_BYTES_PORT = 0xE0, 0xE4, 0xE8
TESTDEV_LINES_PORT = 0x2000
TESTDEV_MEMORY = 0xFF00_0000
# Virtio devices over MMIO, a page each, where QEMU's microvm has them. Their interrupts: first the
# ISA ones that nothing else has, which work without the I/O APIC, too, then its own.
VIRTIO_MMIO, VIRTIO_MMIO_SIZE = 0xFEB0_0000, 0x1000
VIRTIO_GSIS = (5, 6, 7, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23)
# The generation ID, in a page behind those of virtio; its interrupt is that of COM2, which is not.
VMGENID, VMGENID_GSI = 0xFEB1_0000, 3
# What another process is told to find its rings at: no memory is there, nor can be.
VHOST_RINGS = PHYSICAL_END
# PM1a event and control block and PM timer as one device.
ACPI_PM_PORT = PM1A_EVENT_PORT
ACPI_PM_SIZE = 12


def virtio_place(number: int) -> tuple[int, int]:
    """The GPA of the registers, and the GSI, of this virtio device."""
    return VIRTIO_MMIO + number * VIRTIO_MMIO_SIZE, VIRTIO_GSIS[number]


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """`(gpa, size)` of the RAM ranges for `size` bytes: around the MMIO hole."""
    low = min(size, MMIO_HOLE_START)
    ranges = [(0, low)]
    if size > low:
        ranges.append((MMIO_HOLE_END, size - low))
    return ranges
