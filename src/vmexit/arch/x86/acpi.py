"""ACPI tables: what the machine has that a guest cannot find out by itself (ACPI 6.4, chapter 5).

The fixed hardware is a PC's, not the reduced kind, always in ACPI mode: SCI, PM1a event and control
blocks, PM timer, reset register. Devices without a discovery of their own stand in the DSDT.
"""

import struct

from vmexit.arch.x86 import aml
from vmexit.arch.x86.layout import (
    BIOS_STUB,
    COM1_GSI,
    COM1_PORT,
    IOAPIC_ADDRESS,
    LAPIC_ADDRESS,
    PM1A_CONTROL_PORT,
    PM1A_EVENT_PORT,
    PM_TIMER_PORT,
    PVPANIC_PORT,
    RESET_PORT,
    RESET_VALUE,
    RTC_CENTURY,
    RTC_GSI,
    RTC_PORT,
    SCI_IRQ,
    SLEEP_TYPE_S5,
    VIRTIO_MMIO_SIZE,
    VMGENID,
    VMGENID_GSI,
    virtio_place,
)
from vmexit.core.errors import ConfigError

# An xAPIC ID has 8 bits, of which 255 means all (Intel SDM vol. 3, 12.6.1).
MAX_CPUS = 255

_OEM = struct.pack("<6s8sI4sI", b"VMEXIT", b"VMEXIT  ", 1, b"VMEX", 1)
_HEADER = struct.Struct("<4sIBB26s")  # signature, length, revision, checksum, OEM (table 5-28)
_CHECKSUM = 9

# RSDP (table 5-27): its first 20 bytes have a checksum of their own, from revision 1.
_RSDP = struct.Struct("<8sB6sBIIQB3x")
_RSDP_SIZE, _RSDP_V1_SIZE = 36, 20
_RSDP_CHECKSUM, _RSDP_EXTENDED_CHECKSUM = 8, 32

_FACS_SIZE = 64  # and its alignment (5.2.10)

# FADT (table 5-33), from offset 36 on
_FADT_REVISION = 6
_FADT = struct.Struct(
    "<IIBBHIBBBB" "8I" "8B" "HHHH" "5BHB" "I12sBHB" "QQ" "12s12s12s12s12s12s12s12s12s12s" "Q"
)  # fmt: skip
_IAPC_LEGACY_DEVICES, _IAPC_NO_VGA, _IAPC_NO_MSI = 1 << 0, 1 << 2, 1 << 3
_FADT_WBINVD, _FADT_PROC_C1, _FADT_SLP_BUTTON, _FADT_FIX_RTC = 1 << 0, 1 << 2, 1 << 5, 1 << 6
_FADT_TMR_VAL_EXT, _FADT_RESET_REG_SUP = 1 << 8, 1 << 10
_NO_C2_LATENCY, _NO_C3_LATENCY = 0xFFF, 0xFFF
_PM1_EVENT_SIZE, _PM1_CONTROL_SIZE, _PM_TIMER_SIZE = 4, 2, 4
_SYSTEM_IO = 1
_ACCESS_BYTE, _ACCESS_WORD, _ACCESS_DWORD = 1, 2, 3

# MADT (5.2.12)
_MADT_REVISION = 5
_PCAT_COMPAT = 1 << 0
_LAPIC_ENABLED = 1 << 0
_ACTIVE_HIGH_LEVEL = 0b1101
_ALL_PROCESSORS = 0xFF


def build(cpus: int, at: int, devices: bytes = b"") -> bytes:
    r"""All tables for `cpus` processors, to be put at GPA `at`, where the RSDP comes first.

    `devices` is AML that joins the DSDT's own devices in \_SB. An OS finds the RSDP by its address
    or, if `at` is 16-byte-aligned between 0xe0000 and 1 MiB, by scanning. Raises ConfigError.
    """
    if not 1 <= cpus <= MAX_CPUS:
        raise ConfigError(f"{cpus} processors cannot be; use 1 to {MAX_CPUS}")
    facs_at = -(-(at + _RSDP_SIZE) // _FACS_SIZE) * _FACS_SIZE
    dsdt_at = facs_at + _FACS_SIZE
    dsdt = _table(b"DSDT", 2, _definitions(devices))
    fadt_at = dsdt_at + len(dsdt)
    fadt = _table(b"FACP", _FADT_REVISION, _fadt(facs_at, dsdt_at))
    madt_at = fadt_at + len(fadt)
    madt = _table(b"APIC", _MADT_REVISION, _madt(cpus))
    rsdt_at = madt_at + len(madt)
    rsdt = _table(b"RSDT", 1, struct.pack("<2I", fadt_at, madt_at))
    xsdt_at = rsdt_at + len(rsdt)
    xsdt = _table(b"XSDT", 1, struct.pack("<2Q", fadt_at, madt_at))
    rsdp = _rsdp(rsdt_at, xsdt_at).ljust(facs_at - at, b"\0")
    tables = rsdp + _facs() + dsdt + fadt + madt + rsdt + xsdt
    if at + len(tables) > BIOS_STUB:
        raise ConfigError(
            f"the ACPI tables at {at:#x} have {len(tables)} bytes and end above {BIOS_STUB:#x}; "
            "use fewer devices"
        )
    return tables


def virtio_mmio(count: int) -> bytes:
    """AML of so many virtio devices over MMIO; LNRO0005 is the ID that Linux gave them."""
    return b"".join(
        aml.device(
            f"VR{number:02X}",
            aml.name("_HID", aml.string("LNRO0005")),
            aml.name("_UID", aml.integer(number)),
            aml.name("_CCA", aml.integer(1)),
            aml.name(
                "_CRS",
                aml.resource_template(
                    aml.memory32_fixed(gpa, VIRTIO_MMIO_SIZE),
                    aml.extended_irq(gsi, level=False),
                ),
            ),
        )
        for number, (gpa, gsi) in enumerate(map(virtio_place, range(count)))
    )


def pvpanic() -> bytes:
    """AML of the device by which a guest tells that it panics, as QEMU's specs/pvpanic has it.

    Drivers take the port from the resources; RDPT and WRPT read and write it for those who do not.
    """
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_CRS", aml.resource_template(aml.io(PVPANIC_PORT, 1))),
        aml.io_region("PEOR", PVPANIC_PORT, 1),
        aml.byte_field("PEOR", "PEPT"),
        aml.method("RDPT", 0, aml.returns("PEPT")),
        aml.method("WRPT", 1, aml.store_argument(0, "PEPT")),
        aml.name("_STA", aml.integer(0x0F)),
    )


def vmgenid() -> bytes:
    r"""AML of the generation ID, and of the device whose interrupt says that it has changed.

    Linux's driver knows the compatible IDs; `ADDR` is where it is, 0x80 that it is another one.
    """
    where = aml.package(aml.integer(VMGENID & 0xFFFF_FFFF), aml.integer(VMGENID >> 32))
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("VMXT0001")),
        aml.name("_CID", aml.package(aml.string("VM_Gen_Counter"), aml.string("VMGENCTR"))),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", where),
    ) + aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resource_template(aml.extended_irq(VMGENID_GSI, level=False))),
        aml.method("_EVT", 1, aml.notify("\\_SB.VGEN", 0x80)),
    )


def _checked(data: bytes, position: int) -> bytes:
    """`data` with the byte at `position` such that all add up to 0."""
    return data[:position] + bytes((-sum(data) & 0xFF,)) + data[position + 1 :]


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = _HEADER.pack(signature, _HEADER.size + len(body), revision, 0, _OEM)
    return _checked(header + body, _CHECKSUM)


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    data = _RSDP.pack(b"RSD PTR ", 0, _OEM[:6], 2, rsdt, _RSDP_SIZE, xsdt, 0)
    data = _checked(data[:_RSDP_V1_SIZE], _RSDP_CHECKSUM) + data[_RSDP_V1_SIZE:]
    return _checked(data, _RSDP_EXTENDED_CHECKSUM)


def _facs() -> bytes:
    return struct.pack("<4sI24xB31x", b"FACS", _FACS_SIZE, 2)


def _port(port: int, size: int, access: int) -> bytes:
    """A generic address structure (5.2.3.2)."""
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8 * size, 0, access, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    nowhere = bytes(12)
    event = _port(PM1A_EVENT_PORT, _PM1_EVENT_SIZE, _ACCESS_WORD)
    control = _port(PM1A_CONTROL_PORT, _PM1_CONTROL_SIZE, _ACCESS_WORD)
    timer = _port(PM_TIMER_PORT, _PM_TIMER_SIZE, _ACCESS_DWORD)
    # Without PWR_BUTTON there is a power button in PM1a; SLP_BUTTON and FIX_RTC say that a sleep
    # button and the wake-up by the RTC are not there.
    flags = (
        _FADT_WBINVD | _FADT_PROC_C1 | _FADT_SLP_BUTTON | _FADT_FIX_RTC
        | _FADT_TMR_VAL_EXT | _FADT_RESET_REG_SUP
    )  # fmt: skip
    # Without the bit for an 8042 Linux does not spend a second to look for a keyboard.
    boot_architecture = _IAPC_LEGACY_DEVICES | _IAPC_NO_VGA | _IAPC_NO_MSI
    return _FADT.pack(
        facs, dsdt, 0, 0, SCI_IRQ, 0, 0, 0, 0, 0,  # SMI_CMD 0: always in ACPI mode
        PM1A_EVENT_PORT, 0, PM1A_CONTROL_PORT, 0, 0, PM_TIMER_PORT, 0, 0,
        _PM1_EVENT_SIZE, _PM1_CONTROL_SIZE, 0, _PM_TIMER_SIZE, 0, 0, 0, 0,
        _NO_C2_LATENCY, _NO_C3_LATENCY, 0, 0,
        0, 0, 0, 0, RTC_CENTURY, boot_architecture, 0,
        flags, _port(RESET_PORT, 1, _ACCESS_BYTE), RESET_VALUE, 0, 0,
        0, dsdt,  # X_FIRMWARE_CTRL 0: the 32-bit field has it
        event, nowhere, control, nowhere, nowhere, timer, nowhere, nowhere, nowhere, nowhere,
        0,
    )  # fmt: skip


def _madt(cpus: int) -> bytes:
    lapics = b"".join(struct.pack("<BBBBI", 0, 8, n, n, _LAPIC_ENABLED) for n in range(cpus))
    return (
        struct.pack("<II", LAPIC_ADDRESS, _PCAT_COMPAT)
        + lapics
        + struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_ADDRESS, 0)
        # The PIT is at pin 2 of the IOAPIC, as on every PC; the SCI is level, active high.
        + struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)
        + struct.pack("<BBBBIH", 2, 10, 0, SCI_IRQ, SCI_IRQ, _ACTIVE_HIGH_LEVEL)
        + struct.pack("<BBBHB", 4, 6, _ALL_PROCESSORS, 0, 1)
    )


def _definitions(devices: bytes) -> bytes:
    com1 = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resource_template(aml.io(COM1_PORT, 8), aml.irq(COM1_GSI))),
    )
    rtc = aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resource_template(aml.io(RTC_PORT, 2), aml.irq(RTC_GSI))),
    )
    sleep = aml.integer(SLEEP_TYPE_S5)
    zero = aml.integer(0)
    return aml.name("\\_S5", aml.package(sleep, sleep, zero, zero)) + aml.scope(
        "\\_SB", com1, rtc, devices
    )
