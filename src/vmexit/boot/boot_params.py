"""The 32-bit and 64-bit Linux boot protocols: a zero page, and an entry past the real-mode code.

Linux Documentation/arch/x86/boot.rst, "32-bit Boot Protocol" and "64-bit Boot Protocol".
"""

from vmexit.abi.linux_boot import (
    BOOT_CS,
    BOOT_DS,
    BOOT_FLAG,
    E820_MAX_ENTRIES_ZEROPAGE,
    HEADER_MAGIC,
    SETUP_HEADER_OFFSET,
    TYPE_OF_LOADER_UNDEFINED,
    boot_params,
)
from vmexit.arch.x86.e820 import E820Entry
from vmexit.arch.x86.layout import (
    IDENTITY_MAP_MIN,
    KERNEL_GDT,
    KERNEL_PAGE_TABLES,
    ZERO_PAGE,
)
from vmexit.arch.x86.paging import identity_map
from vmexit.arch.x86.registers import SystemRegisters, Table
from vmexit.arch.x86.segments import descriptor, general, long_mode, protected_mode
from vmexit.boot.bzimage import BzImage
from vmexit.boot.entry import BootEntry
from vmexit.core.memory import GuestMemory

# What a vmlinux without setup header is told: the first version with ext_ramdisk_image and with
# xloadflags, as Linux's own PVH entry does (arch/x86/platform/pvh/enlighten.c).
_VMLINUX_VERSION = 0x20C


def write(
    memory: GuestMemory,
    image: bytes | memoryview,
    header: BzImage | None,
    *,
    load: int,
    cmdline: int,
    initrd: range | None,
    rsdp: int,
    memory_map: list[E820Entry],
) -> None:
    """Write the zero page. `header` is that of `image`; None if it is a vmlinux.

    `load` is the GPA of the protected-mode code; `cmdline` and `rsdp` are GPAs. The bootloader
    fields are set, and those that only the kernel writes stay 0.
    """
    params = boot_params()
    if header is None:
        hdr = params.hdr
        hdr.boot_flag, hdr.version = BOOT_FLAG, _VMLINUX_VERSION
        hdr.header = int.from_bytes(HEADER_MAGIC, "little")
    else:
        raw = bytearray(params)
        end = header.header_end
        raw[SETUP_HEADER_OFFSET:end] = image[SETUP_HEADER_OFFSET:end]
        params = boot_params.from_buffer(raw)
        hdr = params.hdr
        if header.relocatable:
            hdr.code32_start = load
    hdr.type_of_loader = TYPE_OF_LOADER_UNDEFINED
    hdr.cmd_line_ptr = cmdline
    hdr.ramdisk_image = hdr.ramdisk_size = 0
    if initrd is not None:
        hdr.ramdisk_image, hdr.ramdisk_size = initrd.start, len(initrd)
    params.acpi_rsdp_addr = rsdp
    if len(memory_map) > E820_MAX_ENTRIES_ZEROPAGE:
        raise ValueError(f"the zero page has room for {E820_MAX_ENTRIES_ZEROPAGE} memory ranges")
    for slot, entry in zip(params.e820_table, memory_map, strict=False):
        slot.addr, slot.size, slot.type = entry
    params.e820_entries = len(memory_map)
    memory.write(ZERO_PAGE, bytes(params))


def start_32(memory: GuestMemory, entry: int) -> BootEntry:
    """Registers for the 32-bit entry point; writes the GDT. ESI has the zero page."""
    gdt = _gdt_register(memory, long=False)
    return BootEntry(general(entry) | {"rsi": ZERO_PAGE}, _selectors(protected_mode(gdt)))


def start_64(memory: GuestMemory, entry: int) -> BootEntry:
    """Registers for the 64-bit entry point; writes GDT and a map of the first 4 GiB."""
    memory.write(KERNEL_PAGE_TABLES, identity_map(KERNEL_PAGE_TABLES, IDENTITY_MAP_MIN))
    gdt = _gdt_register(memory, long=True)
    system = _selectors(long_mode(gdt, KERNEL_PAGE_TABLES))
    return BootEntry(general(entry) | {"rsi": ZERO_PAGE}, system)


def _selectors(system: SystemRegisters) -> SystemRegisters:
    """The flat segments under the selectors that Linux requires."""
    data = system.ds._replace(selector=BOOT_DS)
    cs = system.cs._replace(selector=BOOT_CS)
    return system._replace(cs=cs, ds=data, es=data, fs=data, gs=data, ss=data)


def _gdt_register(memory: GuestMemory, *, long: bool) -> Table:
    nowhere = Table(0, 0)
    system = _selectors(long_mode(nowhere, 0) if long else protected_mode(nowhere))
    table = bytes(BOOT_CS) + descriptor(system.cs) + descriptor(system.ds)
    memory.write(KERNEL_GDT, table)
    return Table(KERNEL_GDT, len(table) - 1)
