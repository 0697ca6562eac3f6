"""The 16-bit Linux boot protocol: its setup code in real mode (boot.rst, "Running the Kernel").

The setup code, and loaders that look like one to be booted so, ask a BIOS for memory map, video and
keyboard. Here it is bios.bin, built from bios.S beside it: it starts first, and then starts them.
"""

import struct
from collections.abc import Iterable
from ctypes import sizeof
from importlib.resources import files
from typing import NamedTuple

from vmexit.abi.linux_boot import (
    CAN_USE_HEAP,
    CL_MAGIC,
    CL_MAGIC_OFFSET,
    CL_OFFSET_OFFSET,
    SETUP_HEADER_OFFSET,
    TYPE_OF_LOADER_UNDEFINED,
    VIDEO_CURRENT_MODE,
    setup_header,
)
from vmexit.arch.x86.e820 import RAM, E820Entry
from vmexit.arch.x86.layout import (
    BIOS_STUB,
    HIGH_MEMORY,
    KERNEL_CMDLINE,
    REAL_MODE_SETUP,
    REAL_MODE_SETUP_OLD,
)
from vmexit.arch.x86.registers import SystemRegisters
from vmexit.arch.x86.segments import general, real_mode
from vmexit.boot.bzimage import BzImage
from vmexit.boot.entry import BootEntry
from vmexit.core.errors import ImageError
from vmexit.core.memory import GuestMemory

# boot.rst, "Sample Boot Configuration": where the heap and, from there down, the stack end.
_HEAP_END = 0xE000
_HEAP_END_OLD = 0x9800
_MIN_STACK = 0x400
_ENTRY_SEGMENT = 0x20  # the setup code begins behind the boot sector

_16_MIB = 16 << 20
_MAX_EXTENDED_KIB = 0xFC00  # a BIOS tells of 64 MiB at most by INT 15h AH=88h

# bios.S, `parameters`: the entry point (IP, CS), extended memory as INT 15h AH=88h and AX=E801h
# tell it, and the number of E820 entries, which follow.
_PARAMETERS = struct.Struct("<6H")
_PARAMETERS_AT = 0xA00
_MAP_ENTRY = struct.Struct("<QQI")
_MAP_END = 0xFF0  # where a processor starts after reset


class SetupPlace(NamedTuple):
    """Where the real-mode part goes: its GPA, the offset of its heap's end, the command line."""

    base: int
    heap_end: int
    cmdline: int


def place(header: BzImage) -> SetupPlace:
    """Where the setup code of `header` can run. Raises ImageError if it is too large."""
    if header.version >= 0x202 and header.loaded_high:
        at = SetupPlace(REAL_MODE_SETUP, _HEAP_END, KERNEL_CMDLINE)
    else:
        # Found by its offset from the setup code, so it comes behind its heap.
        at = SetupPlace(REAL_MODE_SETUP_OLD, _HEAP_END_OLD, REAL_MODE_SETUP_OLD + _HEAP_END_OLD)
    if header.setup > at.heap_end - _MIN_STACK:
        raise ImageError(
            f"the kernel's setup code has {header.setup} bytes, and in real mode there is room "
            f"for {at.heap_end - _MIN_STACK}; build it again"
        )
    return at


def start(
    memory: GuestMemory,
    image: bytes | memoryview,
    header: BzImage,
    at: SetupPlace,
    *,
    initrd: range | None,
    memory_map: list[E820Entry],
) -> BootEntry:
    """Copy the setup code, fill in its header, write the BIOS; registers to start that with."""
    memory.write(at.base, setup_code(image, header, at, initrd))
    segment = at.base >> 4
    memory.write(BIOS_STUB, bios((0, segment + _ENTRY_SEGMENT), memory_map))
    system = real_mode(BIOS_STUB)
    return BootEntry(general(0) | {"rsp": at.heap_end}, _data_segments(system, segment))


def setup_code(
    image: bytes | memoryview, header: BzImage, at: SetupPlace, initrd: range | None
) -> bytearray:
    """The setup code of `image` for `at`, its header filled in as a loader does (boot.rst)."""
    setup = bytearray(image[: header.setup])
    hdr = setup_header.from_buffer_copy(setup, SETUP_HEADER_OFFSET)
    hdr.type_of_loader = TYPE_OF_LOADER_UNDEFINED
    hdr.vid_mode = VIDEO_CURRENT_MODE  # as there is no screen to set one on
    hdr.ramdisk_image = hdr.ramdisk_size = 0
    if initrd is not None:
        hdr.ramdisk_image, hdr.ramdisk_size = initrd.start, len(initrd)
    if header.version >= 0x201:
        hdr.heap_end_ptr = at.heap_end - 0x200
        hdr.loadflags = header.loadflags | CAN_USE_HEAP
    if header.version >= 0x202:
        hdr.cmd_line_ptr = at.cmdline
    else:
        struct.pack_into("<H", setup, CL_MAGIC_OFFSET, CL_MAGIC)
        struct.pack_into("<H", setup, CL_OFFSET_OFFSET, at.cmdline - at.base)
    setup[SETUP_HEADER_OFFSET : SETUP_HEADER_OFFSET + sizeof(hdr)] = bytes(hdr)
    return setup


def bios(entry: tuple[int, int], memory_map: list[E820Entry]) -> bytes:
    """The BIOS for BIOS_STUB. It starts at its first byte and goes on to `entry`, its IP and CS.

    Registers and data segments are then as it has found them; it needs a stack.
    """
    image = bytearray(files(__package__).joinpath("bios.bin").read_bytes())
    table = b"".join(_MAP_ENTRY.pack(*entry) for entry in memory_map)
    at = _PARAMETERS_AT + _PARAMETERS.size
    if at + len(table) > _MAP_END:
        raise ValueError(f"the BIOS has room for {(_MAP_END - at) // 20} memory ranges")
    extended = _extended_memory(memory_map)
    _PARAMETERS.pack_into(
        image,
        _PARAMETERS_AT,
        *entry,
        min(extended >> 10, _MAX_EXTENDED_KIB),
        min(extended, _16_MIB - HIGH_MEMORY) >> 10,
        max(extended - (_16_MIB - HIGH_MEMORY), 0) >> 16,
        len(memory_map),
    )
    image[at : at + len(table)] = table
    return bytes(image)


def _extended_memory(memory_map: Iterable[E820Entry]) -> int:
    """The bytes of RAM from 1 MiB on, up to the first hole."""
    return sum(e.size for e in memory_map if e.type == RAM and e.gpa == HIGH_MEMORY)


def _data_segments(system: SystemRegisters, segment: int) -> SystemRegisters:
    """DS, ES, FS, GS and SS at the setup code (boot.rst, "Running the Kernel")."""
    data = system.ds._replace(selector=segment, base=segment << 4)
    return system._replace(ds=data, es=data, fs=data, gs=data, ss=data)
