"""What is at well-known addresses of a PC, for traces that do not say it themselves."""

from vmexit.arch.x86 import layout

# First port, how many, name (IBM PC/AT Technical Reference; the rest by convention).
_PORTS = (
    (0x00, 0x10, "DMA controller"),
    (0x20, 2, "PIC"),
    (0x40, 4, "PIT"),
    (0x60, 1, "i8042 data"),
    (0x61, 1, "system control B"),
    (0x64, 1, "i8042 command"),
    (0x70, 2, "RTC and CMOS"),
    (0x80, 1, "POST code"),
    (0x81, 0xF, "DMA pages"),
    (0x92, 1, "system control A"),
    (0xA0, 2, "PIC"),
    (0xC0, 0x20, "DMA controller"),
    (0xE9, 1, "debug console"),
    (0xED, 1, "delay"),
    (0xF4, 1, "debug exit"),
    (0x170, 8, "ATA"),
    (0x1F0, 8, "ATA"),
    (0x278, 3, "LPT2"),
    (0x2E8, 8, "COM4"),
    (0x2F8, 8, "COM2"),
    (0x378, 3, "LPT1"),
    (0x3B0, 0x30, "VGA"),
    (0x3E8, 8, "COM3"),
    (0x3F0, 8, "floppy disk"),
    (layout.COM1_PORT, 8, "COM1"),
    (0x402, 1, "debug console"),
    (layout.ELCR_PORT, 2, "PIC edge/level"),
    (layout.FW_CFG_PORT, 12, "fw_cfg"),
    (layout.ACPI_PM_PORT, layout.ACPI_PM_SIZE, "ACPI PM"),
    (0xCF8, 4, "PCI address"),
    (0xCFC, 4, "PCI data"),
)
_MMIO = (
    (0xA_0000, 0x2_0000, "VGA memory"),
    (layout.VIRTIO_MMIO, len(layout.VIRTIO_GSIS) * layout.VIRTIO_MMIO_SIZE, "virtio-mmio"),
    (layout.IOAPIC_ADDRESS, layout.IOAPIC_SIZE, "IOAPIC"),
    (0xFED0_0000, 0x400, "HPET"),
    (layout.LAPIC_ADDRESS, layout.LAPIC_SIZE, "LAPIC"),
)


def usual_name(kind: str, address: int) -> str:
    """What a PC has at a port, or else at a GPA; empty where nothing is known."""
    for first, size, name in _PORTS if kind == "port" else _MMIO:
        if first <= address < first + size:
            return name
    return ""
