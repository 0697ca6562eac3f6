"""Flat images: bytes put into memory, and a CPU mode to start in."""

from vmexit.arch.x86.layout import GDT_PAGES, IDENTITY_MAP_MAX, IDENTITY_MAP_MIN, MMIO_HOLE_END
from vmexit.arch.x86.paging import identity_map, identity_map_pages
from vmexit.arch.x86.registers import Table
from vmexit.arch.x86.segments import boot_gdt, general, long_mode, protected_mode, real_mode
from vmexit.boot.entry import BootEntry
from vmexit.core.errors import ConfigError, GuestAddressError, ImageError
from vmexit.core.memory import PAGE_SIZE, GuestMemory

MODES = ("real", "protected", "long")


def load(memory: GuestMemory, data: bytes, at: int) -> None:
    """Copy `data` to GPA `at`. Raises ImageError if it does not fit there."""
    try:
        memory.write(at, data)
    except GuestAddressError as error:
        region = memory.regions[0]
        raise ImageError(
            f"the image ({len(data)} bytes at {at:#x}) does not fit into memory, "
            f"whose first {region.size} bytes begin at 0x0; use more --memory or another "
            "--load-address"
        ) from error


def check_entry(entry: int, size: int, at: int) -> None:
    """Raises ImageError unless the image, `size` bytes at `at`, reaches the entry point."""
    if not at <= entry < at + size:
        remedy = f"--entry {at:#x}" if at else f"--load-address {entry:#x}"
        raise ImageError(
            f"entry {entry:#x} lies outside the image ({size} bytes at {at:#x}); use {remedy}"
        )


def start(
    memory: GuestMemory,
    entry: int,
    mode: str,
    image: range | None = None,
    segment: int | None = None,
) -> BootEntry:
    """Registers to start at `entry` in `mode`; protected and long get tables in memory.

    In real mode the base of CS is `entry`, and IP 0, unless `segment` gives CS its value.

    General registers are 0. The tables take the last pages of low RAM: a GDT (code 0x08, data
    0x10, 64-bit code 0x18), and in long mode page tables that map at least the first 4 GiB to
    themselves. Raises ConfigError if RAM is too small for them, or `image` reaches into them.
    """
    if mode == "real":
        if entry >> 32:
            raise ConfigError(f"real mode cannot start at {entry:#x}; use --mode long")
        base = entry if segment is None else segment << 4
        if not 0 <= entry - base <= 0xFFFF:
            raise ConfigError(
                f"real mode cannot reach {entry:#x} from segment {segment:#x}; "
                f"use --entry {entry >> 4:#x}:{entry & 0xF:#x}"
            )
        return BootEntry(general(entry - base), real_mode(base))
    if mode == "protected" and entry >> 32:
        raise ConfigError(f"protected mode cannot start at {entry:#x}; use --mode long")
    ram_end = memory.regions[-1].end
    span = max(IDENTITY_MAP_MIN, ram_end) if ram_end > MMIO_HOLE_END else IDENTITY_MAP_MIN
    if mode == "long" and span > IDENTITY_MAP_MAX:
        raise ConfigError(
            f"long mode starts with a map of at most {IDENTITY_MAP_MAX >> 30} GiB, and memory ends "
            f"at {ram_end >> 30} GiB; use a smaller --memory"
        )
    pages = GDT_PAGES + (identity_map_pages(span) if mode == "long" else 0)
    low = next(region for region in memory.regions if not region.readonly)
    gdt = low.end - pages * PAGE_SIZE
    if gdt < low.gpa:
        raise ConfigError(
            f"{mode} mode needs {pages} pages for its tables, and memory has "
            f"{low.size // PAGE_SIZE}; use a larger --memory"
        )
    if image is not None and image.start < low.end and image.stop > gdt:
        raise ConfigError(
            f"the image reaches into the {mode}-mode tables at {gdt:#x}..{low.end - 1:#x}; "
            "use a larger --memory"
        )
    table = boot_gdt()
    memory.write(gdt, table)
    gdtr = Table(gdt, len(table) - 1)
    if mode == "protected":
        return BootEntry(general(entry), protected_mode(gdtr))
    cr3 = gdt + GDT_PAGES * PAGE_SIZE
    memory.write(cr3, identity_map(cr3, span))
    return BootEntry(general(entry), long_mode(gdtr, cr3))
