"""The 16-bit Linux boot protocol: its setup code in real mode (boot.rst, "Running the Kernel").

The setup code asks a BIOS for the memory map, the video mode and the keyboard. There is no BIOS:
every interrupt leads to a stub that knows INT 15h E820 and says of everything else that it failed.
"""

import struct
from ctypes import sizeof
from typing import NamedTuple

from vmexit.abi.linux_boot import (
    CAN_USE_HEAP,
    CL_MAGIC,
    CL_MAGIC_OFFSET,
    CL_OFFSET_OFFSET,
    SETUP_HEADER_OFFSET,
    TYPE_OF_LOADER_UNDEFINED,
    setup_header,
)
from vmexit.arch.x86.e820 import E820Entry
from vmexit.arch.x86.layout import (
    BIOS_STUB,
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

_INTERRUPTS = 256
# Interrupts of devices; with them the carry flag is not the stub's to change.
_DEVICE_INTERRUPTS = (*range(0x08, 0x10), *range(0x70, 0x78))

# INT 15h AX=E820h as in ACPI 6.4, 15.1: EBX is the index of the next entry, ES:DI the buffer.
# In the segment of the stub are the number of entries at 0xfe, and the entries behind it.
_COUNT, _ENTRIES = 0xFE, 0x100
_STUB = bytes.fromhex(
    "55 89e5"  # push bp; mov bp, sp
    "3d20e8 753f"  # cmp ax, 0xe820; jne fail
    "6681fa50414d53 7536"  # cmp edx, "SMAP"; jne fail
    "2e3b1efe00 732f"  # cmp bx, cs:[0xfe]; jae fail
    "56 57 1e 0e 1f"  # push si; push di; push ds; push cs; pop ds
    "6bf314 81c60001"  # imul si, bx, 20; add si, 0x100
    "fc b90a00 f3a5"  # cld; mov cx, 10; rep movsw
    "1f 5f 5e"  # pop ds; pop di; pop si
    "6689d0 66b914000000"  # mov eax, edx; mov ecx, 20
    "43 2e3b1efe00 7203 6631db"  # inc bx; cmp bx, cs:[0xfe]; jb +3; xor ebx, ebx
    "806606fe 5d cf"  # and byte [bp+6], ~CF; pop bp; iret
    "804e0601 5d cf"  # fail: or byte [bp+6], CF; pop bp; iret
)
_IRET = len(_STUB) - 1


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
    """Copy the setup code, fill in its header, write the stub for the BIOS; registers to start."""
    setup = bytearray(image[: header.setup])
    hdr = setup_header.from_buffer_copy(setup, SETUP_HEADER_OFFSET)
    hdr.type_of_loader = TYPE_OF_LOADER_UNDEFINED
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
    memory.write(at.base, setup)
    _write_bios(memory, memory_map)
    segment = at.base >> 4
    system = real_mode(at.base + 16 * _ENTRY_SEGMENT)
    return BootEntry(general(0) | {"rsp": at.heap_end}, _data_segments(system, segment))


def _data_segments(system: SystemRegisters, segment: int) -> SystemRegisters:
    """DS, ES, FS, GS and SS at the setup code (boot.rst, "Running the Kernel")."""
    data = system.ds._replace(selector=segment, base=segment << 4)
    return system._replace(ds=data, es=data, fs=data, gs=data, ss=data)


def _write_bios(memory: GuestMemory, memory_map: list[E820Entry]) -> None:
    """The interrupt vector table, and the stub that it points to."""
    segment = BIOS_STUB >> 4
    vectors = [(_IRET if n in _DEVICE_INTERRUPTS else 0, segment) for n in range(_INTERRUPTS)]
    memory.write(0, b"".join(struct.pack("<HH", *vector) for vector in vectors))
    memory.write(BIOS_STUB, _STUB)
    memory.write_u16(BIOS_STUB + _COUNT, len(memory_map))
    table = b"".join(struct.pack("<QQI", *entry) for entry in memory_map)
    memory.write(BIOS_STUB + _ENTRIES, table)
