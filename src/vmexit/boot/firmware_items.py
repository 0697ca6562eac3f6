"""What firmware is told by the firmware configuration device: memory, tables, the kernel to boot.

Keys, names and contents are those that QEMU has, so that firmware made for it finds its way:
SeaBIOS takes all of it, qboot memory, tables and kernel.
"""

import struct
from collections.abc import Iterable
from importlib.resources import files as resources
from typing import NamedTuple

from vmexit.abi import fw_cfg
from vmexit.arch.x86.e820 import RAM, RESERVED, memory_map
from vmexit.arch.x86.layout import COM1_PORT, HIGH_MEMORY, MMIO_HOLE_START
from vmexit.boot import bzimage, real_mode
from vmexit.core.errors import ConfigError, ImageError
from vmexit.core.memory import PAGE_SIZE, GuestMemory, Region

# Below the end of RAM firmware keeps its tables: nothing may be loaded there.
FIRMWARE_TABLES = 256 << 10

# The linker script for tables (QEMU's bios-linker-loader): commands of 128 bytes each.
_ALLOCATE = struct.Struct("<I56sIB63x")  # file, alignment, zone
_ADD_POINTER = struct.Struct("<I56s56sIB7x")  # in file, to file, offset, size
_ADD_CHECKSUM = struct.Struct("<I56sIII56x")  # file, offset, start, length
_COMMAND_ALLOCATE, _COMMAND_ADD_POINTER, _COMMAND_ADD_CHECKSUM = 1, 2, 3
_ZONE_HIGH, _ZONE_FSEG = 1, 2
_TABLES, _RSDP, _LOADER = "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"

# ACPI 6.4: the RSDP (table 5-27), what all tables begin with (5-28), the FADT (5-33).
_RSDP_SIZE, _RSDP_V1_SIZE, _RSDP_CHECKSUM, _RSDP_EXTENDED_CHECKSUM = 36, 20, 8, 32
_RSDT_POINTER, _XSDT_POINTER = (16, 4), (24, 8)
_TABLE_HEADER, _TABLE_LENGTH, _TABLE_CHECKSUM = 36, 4, 9
_FADT_POINTERS = ((36, 4), (40, 4), (132, 8), (140, 8))  # FACS, DSDT, and again with 64 bits
_FACS_ALIGNMENT = 64

_ROM = "genroms/linuxboot.bin"


class Contents(NamedTuple):
    """Items by key, and files by name."""

    items: dict[int, bytes | memoryview]
    files: dict[str, bytes | memoryview]

    def __or__(self, other: "Contents") -> "Contents":
        return Contents(self.items | other.items, self.files | other.files)


def machine(regions: Iterable[Region], cpus: int, *, serial: bool) -> Contents:
    """What a machine with RAM in `regions` is. With `serial`, firmware has its console there."""
    ram = [(r.gpa, r.size, RAM) for r in regions if not r.readonly]
    reserved = [e for e in memory_map(()) if e.type == RESERVED and e.gpa >= HIGH_MEMORY]
    e820 = b"".join(fw_cfg.E820_ENTRY.pack(*entry) for entry in (*ram, *reserved))
    items: dict[int, bytes | memoryview] = {
        fw_cfg.RAM_SIZE: struct.pack("<Q", sum(size for _, size, _ in ram)),
        fw_cfg.NOGRAPHIC: struct.pack("<H", 1),
        fw_cfg.NB_CPUS: struct.pack("<H", cpus),
        fw_cfg.MAX_CPUS: struct.pack("<H", cpus),
        fw_cfg.IRQ0_OVERRIDE: struct.pack("<I", 1),  # the PIT is at pin 2 of the I/O APIC
    }
    files: dict[str, bytes | memoryview] = {
        "etc/e820": e820,
        "etc/boot-cpus": items[fw_cfg.NB_CPUS],
    }
    if serial:
        files["etc/sercon-port"] = struct.pack("<H", COM1_PORT)
    return Contents(items, files)


def acpi_tables(tables: bytes) -> Contents:
    """ACPI tables, built for GPA 0, with the script that puts them where firmware has room.

    So pointers in them are offsets from their beginning, where the RSDP is.
    """
    script = [
        _ALLOCATE.pack(_COMMAND_ALLOCATE, _TABLES.encode(), _FACS_ALIGNMENT, _ZONE_HIGH),
        _ALLOCATE.pack(_COMMAND_ALLOCATE, _RSDP.encode(), 16, _ZONE_FSEG),
    ]

    def point(file: str, base: int, pointer: tuple[int, int]) -> int:
        """Have `pointer` made an address; the offset that it has been."""
        offset, size = pointer
        target = int.from_bytes(tables[base + offset : base + offset + size], "little")
        if target:
            at = offset if file == _RSDP else base + offset
            script.append(
                _ADD_POINTER.pack(_COMMAND_ADD_POINTER, file.encode(), _TABLES.encode(), at, size)
            )
        return target

    def check(file: str, offset: int, start: int, length: int) -> None:
        script.append(
            _ADD_CHECKSUM.pack(_COMMAND_ADD_CHECKSUM, file.encode(), offset, start, length)
        )

    for pointer in (_RSDT_POINTER, _XSDT_POINTER):
        root, size = point(_RSDP, 0, pointer), pointer[1]
        length = int.from_bytes(tables[root + _TABLE_LENGTH : root + _TABLE_LENGTH + 4], "little")
        for offset in range(_TABLE_HEADER, length, size):
            table = point(_TABLES, root, (offset, size))
            if pointer is _RSDT_POINTER and tables[table : table + 4] == b"FACP":
                for of_fadt in _FADT_POINTERS:
                    point(_TABLES, table, of_fadt)
                fadt_length = int.from_bytes(
                    tables[table + _TABLE_LENGTH : table + _TABLE_LENGTH + 4], "little"
                )
                check(_TABLES, table + _TABLE_CHECKSUM, table, fadt_length)
        check(_TABLES, root + _TABLE_CHECKSUM, root, length)
    check(_RSDP, _RSDP_CHECKSUM, 0, _RSDP_V1_SIZE)
    check(_RSDP, _RSDP_EXTENDED_CHECKSUM, 0, _RSDP_SIZE)
    # An OS that looks for the RSDP must not find one that points nowhere.
    rest = bytes(_RSDP_SIZE) + tables[_RSDP_SIZE:]
    return Contents({}, {_TABLES: rest, _RSDP: tables[:_RSDP_SIZE], _LOADER: b"".join(script)})


def kernel(image: bytes, initrd: bytes | None, cmdline: str, memory: GuestMemory) -> Contents:
    """A bzImage with initrd and command line for firmware to boot, and where they go.

    Raises ImageError for what is no bzImage, or has no room; ConfigError for a command line that
    cannot be.
    """
    if not bzimage.is_bzimage(image):
        raise ImageError(
            "firmware boots a bzImage only, and the kernel is none; pass a vmlinuz, or leave out "
            "--firmware"
        )
    header = bzimage.parse(image)
    raw = cmdline.encode("utf-8", "surrogateescape")
    if b"\0" in raw or len(raw) > header.cmdline_size:
        raise ConfigError(
            f"the kernel takes a command line of {header.cmdline_size} bytes without zero bytes; "
            "use another --append"
        )
    place = real_mode.place(header)
    code = memoryview(image)[header.code.start : header.code.stop]
    items: dict[int, bytes | memoryview] = {}

    def add(keys: tuple[int, int, int], gpa: int, data: bytes | memoryview) -> None:
        address, size, content = keys
        items[address], items[size] = struct.pack("<I", gpa), struct.pack("<I", len(data))
        items[content] = data

    after = max(header.load + len(code), header.pref_address + header.init_size)
    _check_room(memory, after)
    initrd_range = None
    if initrd is not None:
        at = _initrd_place(memory, len(initrd), header.initrd_addr_max + 1, after)
        initrd_range = range(at, at + len(initrd))
        add((fw_cfg.INITRD_ADDR, fw_cfg.INITRD_SIZE, fw_cfg.INITRD_DATA), at, initrd)
    setup = bytes(real_mode.setup_code(image, header, place, initrd_range))
    add((fw_cfg.KERNEL_ADDR, fw_cfg.KERNEL_SIZE, fw_cfg.KERNEL_DATA), header.load, code)
    add((fw_cfg.SETUP_ADDR, fw_cfg.SETUP_SIZE, fw_cfg.SETUP_DATA), place.base, setup)
    add((fw_cfg.CMDLINE_ADDR, fw_cfg.CMDLINE_SIZE, fw_cfg.CMDLINE_DATA), place.cmdline, raw + b"\0")
    return Contents(items, {_ROM: option_rom(), "bootorder": f"/rom@{_ROM}\0".encode()})


def _tables_start(memory: GuestMemory) -> int:
    """Where the RAM below the hole ends for all but the firmware."""
    return min(memory.regions[0].end, MMIO_HOLE_START) - FIRMWARE_TABLES


def _check_room(memory: GuestMemory, kernel_end: int) -> None:
    """Raises ImageError unless RAM and the firmware's tables reach beyond the kernel."""
    if kernel_end > _tables_start(memory):
        raise ImageError(
            f"the kernel needs memory up to {kernel_end:#x}, and the firmware some above; "
            + _more_memory(kernel_end)
        )


def _more_memory(end: int) -> str:
    """The remedy, if what a kernel needs ends at `end`."""
    needed = end + FIRMWARE_TABLES
    if needed > MMIO_HOLE_START:
        return "use a smaller one"
    return f"use --memory {-(-needed >> 20)}M or more"


def _initrd_place(memory: GuestMemory, size: int, limit: int, after: int) -> int:
    """The highest page for `size` bytes below `limit` and the firmware's tables."""
    end = min(_tables_start(memory), limit)
    at = (end - size) // PAGE_SIZE * PAGE_SIZE
    if at < after:
        least = after + size + PAGE_SIZE
        raise ImageError(
            f"the initrd ({size} bytes) has no room between the kernel, which ends at {after:#x}, "
            f"and {end:#x}; " + (_more_memory(least) if least <= limit else "use a smaller one")
        )
    return at


def option_rom() -> bytes:
    """The ROM, built from linuxboot.S, by which SeaBIOS boots a kernel; its bytes add up to 0."""
    image = resources(__package__).joinpath("linuxboot.bin").read_bytes()
    return image[:-1] + bytes((-sum(image[:-1]) & 0xFF,))
