"""Multiboot 1: kernels that any boot loader can load (Multiboot Specification 0.6.96).

Those who write a kernel of their own begin with it. The kernel is an ELF file, or a flat one whose
header says where it goes; it starts in 32-bit protected mode with a pointer to what it is told.
"""

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from vmexit.arch.x86.e820 import E820Entry, memory_map
from vmexit.arch.x86.layout import (
    BDA_BASE_MEMORY_KIB,
    BDA_EBDA_SEGMENT,
    EBDA_START,
    HIGH_MEMORY,
    KERNEL_GDT,
    MULTIBOOT_INFORMATION,
)
from vmexit.arch.x86.registers import Table
from vmexit.arch.x86.segments import boot_gdt, general, protected_mode
from vmexit.boot import elf
from vmexit.boot.elf import ElfKernel
from vmexit.boot.entry import BootEntry
from vmexit.boot.image import find_multiboot
from vmexit.boot.placement import Placement
from vmexit.core.errors import ConfigError, ImageError
from vmexit.core.memory import PAGE_SIZE, GuestMemory

# 3.1.2: what a kernel asks for. Bits 0 to 15 it cannot do without, the others it can.
ALIGN_MODULES, WANT_MEMORY, WANT_VIDEO, HAS_ADDRESSES = 1 << 0, 1 << 1, 1 << 2, 1 << 16
_REQUIREMENTS = 0xFFFF
# There is no screen, so there is no video mode to tell of; kernels that want one run without.
_KNOWN = ALIGN_MODULES | WANT_MEMORY | WANT_VIDEO
_FLAGS = struct.Struct("<4xI")
_ADDRESSES = struct.Struct("<12x5I")  # 3.1.3: header, load, load end, bss end, entry

# 3.2: what EAX says to the kernel.
LOADED_BY_MULTIBOOT = 0x2BADB002
# 3.3: flags of the information: which of its fields there are.
_HAS_MEMORY, _HAS_CMDLINE, _HAS_MODULES, _HAS_MAP, _HAS_NAME = (1 << n for n in (0, 2, 3, 6, 9))
# flags, memory below and above 1 MiB in KiB, command line, modules: count and address, memory
# map: length and address, loader's name; what is left out is 0.
_INFORMATION = struct.Struct("<3I4x3I16x2I12xI48x")
_MODULE = struct.Struct("<3I4x")  # start, end, string
_MAP_ENTRY = struct.Struct("<IQQI")  # the size of what follows it, base, length, type
_NAME = "vmexit"
_BDA = range(BDA_EBDA_SEGMENT, BDA_BASE_MEMORY_KIB + 2)  # what is written of it


class Module(NamedTuple):
    """A file that the kernel gets beside itself, and the string that goes with it."""

    data: bytes
    string: str


class _Flat(NamedTuple):
    """The part of the file from `offset` on goes to GPA `load`, up to `load_end`.

    Up to `end`, memory is the kernel's and 0.
    """

    offset: int
    load: int
    load_end: int
    end: int


class MultibootKernel(NamedTuple):
    """What the headers of a multiboot kernel say; it is loaded by those of `elf` or by `flat`.

    `taken` is the range of GPAs that it takes.
    """

    flags: int
    entry: int
    taken: range
    elf: ElfKernel | None
    flat: _Flat | None


def parse(data: bytes) -> MultibootKernel:
    """Read the headers of a multiboot kernel. Raises ImageError for what cannot be loaded."""
    at = find_multiboot(data)
    if at is None:
        raise ImageError("the kernel has no multiboot header in its first 8 KiB; link it there")
    (flags,) = _FLAGS.unpack_from(data, at)
    if unknown := flags & _REQUIREMENTS & ~_KNOWN:
        raise ImageError(
            f"the kernel's multiboot header requires what there is not (flags {unknown:#x}); "
            "use flags 0x3"
        )
    if flags & HAS_ADDRESSES:  # then they count, even in an ELF file (3.1.2)
        flat, entry = _flat(data, at)
        return MultibootKernel(flags, entry, range(flat.load, flat.end), None, flat)
    if data[:4] != elf.MAGIC:
        raise ImageError(
            "the kernel is no ELF file, and its multiboot header has no addresses; "
            "set bit 16 of its flags and give them"
        )
    parts = elf.parse(data)
    entry = parts.physical_entry()
    if entry >> 32:
        raise ImageError(f"the kernel starts at {entry:#x}, above 4 GiB; link it below")
    return MultibootKernel(flags, entry, parts.span, parts, None)


def _flat(data: bytes, at: int) -> tuple[_Flat, int]:
    """What the address fields (3.1.3) of the header at offset `at` say, and the entry."""
    if at + _ADDRESSES.size > len(data):
        raise _damaged("it ends within the address fields")
    header, load, load_end, bss_end, entry = _ADDRESSES.unpack_from(data, at)
    offset = at - (header - load)
    if load > header or offset < 0:
        raise _damaged(
            f"its header is at {at:#x} of the file, and cannot be at {header:#x} "
            f"if it is loaded at {load:#x}"
        )
    load_end = load_end or load + len(data) - offset
    if load_end < load or offset + load_end - load > len(data):
        raise _damaged(f"what is loaded up to {load_end:#x} is not in the file")
    end = bss_end or load_end
    if end < load_end:
        raise _damaged(f"its bss ends at {end:#x}, before what is loaded up to {load_end:#x}")
    if not load <= entry < end:
        raise _damaged(f"its entry {entry:#x} lies outside of {load:#x}..{end - 1:#x}")
    return _Flat(offset, load, load_end, end), entry


def _damaged(what: str) -> ImageError:
    return ImageError(f"the multiboot header is wrong: {what}; mend its addresses")


def module_files(spec: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Path and string of each module in `FILE ARGUMENTS,FILE,…`.

    A comma in them is written twice. The string is the whole, as the first word of a command line
    is the program. Raises ConfigError where a file is not named.
    """
    pieces = os.fsdecode(spec).replace(",,", "\0").split(",")
    strings = [piece.replace("\0", ",").strip() for piece in pieces]
    if not all(strings):
        if not any(strings) and len(strings) == 1:
            raise ConfigError("--initrd names no file; name one, or leave it out")
        raise ConfigError(
            "--initrd has a comma with no file beside it; name one, or write a comma twice"
        )
    return [(string.partition(" ")[0], string) for string in strings]


def room_for_modules(memory: GuestMemory, kernel: bytes) -> int:
    """How many bytes all modules may have, at most, behind `kernel`. Raises ImageError."""
    return max(0, memory.regions[0].end - max(parse(kernel).taken.stop, HIGH_MEMORY))


def load(memory: GuestMemory, kernel: bytes, modules: Sequence[Module], cmdline: str) -> BootEntry:
    """Put `kernel` and `modules` into fresh `memory`, with what they are told; the registers.

    Raises ImageError for a kernel or modules that cannot be loaded, ConfigError for a command
    line or module string that cannot be.
    """
    parts = parse(kernel)
    placement = Placement(memory)
    gdt = boot_gdt()
    placement.claim(KERNEL_GDT, len(gdt), "the boot tables")
    placement.claim(EBDA_START, HIGH_MEMORY - EBDA_START, "the BIOS area")
    memory.write(KERNEL_GDT, gdt)
    if parts.taken.stop <= _BDA.start or parts.taken.start >= _BDA.stop:  # else its bss is 0 there
        memory.write_u16(BDA_EBDA_SEGMENT, EBDA_START >> 4)
        memory.write_u16(BDA_BASE_MEMORY_KIB, EBDA_START >> 10)
    if parts.elf is not None:
        elf.load(memory, kernel, parts.elf, placement)
    elif (flat := parts.flat) is not None:
        placement.claim(flat.load, flat.end - flat.load, "the kernel")
        end = flat.offset + flat.load_end - flat.load
        memory.write(flat.load, memoryview(kernel)[flat.offset : end])

    strings = [_string(cmdline), _string(_NAME), *(_string(m.string) for m in modules)]
    ram = memory_map(memory.regions)
    size = _INFORMATION.size + _MAP_ENTRY.size * len(ram) + _MODULE.size * len(modules)
    size += sum(map(len, strings))
    at = _place_information(parts.taken, size)
    placement.claim(at, size, "the multiboot information")
    ranges = []
    after = max(parts.taken.stop, HIGH_MEMORY, at + size)
    for module in modules:
        start = _page_up(after)
        after = start + len(module.data)
        placement.claim(start, len(module.data), "a module of the kernel")
        memory.write(start, module.data)
        ranges.append(range(start, after))
    memory.write(at, _information(at, memory, ram, ranges, strings))
    registers = general(parts.entry) | {"rax": LOADED_BY_MULTIBOOT, "rbx": at}
    return BootEntry(registers, protected_mode(Table(KERNEL_GDT, len(gdt) - 1)))


def _place_information(kernel: range, size: int) -> int:
    """A GPA for `size` bytes of information: low memory, or behind the kernel if it is there."""
    end = MULTIBOOT_INFORMATION + size
    if end <= EBDA_START and (end <= kernel.start or kernel.stop <= MULTIBOOT_INFORMATION):
        return MULTIBOOT_INFORMATION
    return _page_up(max(kernel.stop, HIGH_MEMORY))


def _information(
    at: int,
    memory: GuestMemory,
    ram: Sequence[E820Entry],
    modules: Sequence[range],
    strings: Sequence[bytes],
) -> bytes:
    """The information (3.3) for GPA `at`: structure, memory map, modules, strings.

    The strings are the command line, the name of the loader, and one for each module.
    """
    table = b"".join(_MAP_ENTRY.pack(_MAP_ENTRY.size - 4, *entry) for entry in ram)
    map_at = at + _INFORMATION.size
    modules_at = map_at + len(table)
    places, place = [], modules_at + _MODULE.size * len(modules)
    for string in strings:
        places.append(place)
        place += len(string)
    structure = _INFORMATION.pack(
        _HAS_MEMORY | _HAS_CMDLINE | _HAS_MODULES | _HAS_MAP | _HAS_NAME,
        EBDA_START >> 10,
        memory.regions[0].end - HIGH_MEMORY >> 10,  # up to the first hole
        places[0],
        len(modules),
        modules_at,
        len(table),
        map_at,
        places[1],
    )
    entries = [
        _MODULE.pack(module.start, module.stop, string)
        for module, string in zip(modules, places[2:], strict=True)
    ]
    return b"".join((structure, table, *entries, *strings))


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise ConfigError("a string for the kernel has a zero byte; leave it out of --append")
    return raw + b"\0"


def _page_up(gpa: int) -> int:
    return -(-gpa // PAGE_SIZE) * PAGE_SIZE
