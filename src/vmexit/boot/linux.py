"""Booting Linux, and what boots like it: choose a protocol, place kernel and initrd, start.

From the kernel that was built to what is entered there are several ways. The shortest goes past
the kernel's own decompressor: unpack on the host, load the ELF file, enter it by PVH.
"""

from typing import NamedTuple

from vmexit.abi.linux_boot import ENTRY_64_OFFSET
from vmexit.arch.x86.e820 import memory_map
from vmexit.arch.x86.layout import (
    BDA_BASE_MEMORY_KIB,
    BDA_EBDA_SEGMENT,
    EBDA_START,
    HIGH_MEMORY,
    KERNEL_CMDLINE,
    KERNEL_CMDLINE_END,
    KERNEL_GDT,
    MMIO_HOLE_START,
    REAL_MODE_SETUP,
)
from vmexit.boot import boot_params, bzimage, compression, elf, pvh, real_mode
from vmexit.boot.bzimage import BzImage
from vmexit.boot.elf import ElfKernel
from vmexit.boot.entry import BootEntry, Linked
from vmexit.boot.placement import Placement
from vmexit.core.errors import ConfigError, ImageError
from vmexit.core.memory import GuestMemory

PROTOCOLS = ("auto", "pvh", "elf", "64", "32", "16")

# COMMAND_LINE_SIZE of Linux on x86, less the zero byte; a vmlinux does not tell.
_VMLINUX_CMDLINE_SIZE = 2047


class LinuxBoot(NamedTuple):
    """What `load()` did: registers to start with, and what it chose.

    `kernel` is the range of GPAs that the kernel takes until it runs, `initrd` where that is.
    `detail` says in a few words why it is this protocol.
    """

    entry: BootEntry
    protocol: str
    detail: str
    kernel: range
    initrd: range | None


class Kernel(NamedTuple):
    """A kernel file as it can be loaded: by its setup header, by its ELF headers, or either.

    `image` is the bzImage that `header` describes, `vmlinux` the bytes that `elf` describes.
    `problem` says why there is no ELF where one was looked for.
    """

    image: memoryview
    header: BzImage | None
    vmlinux: memoryview
    elf: ElfKernel | None
    problem: str

    def offers(self) -> list[str]:
        """The protocols that this kernel can be booted by, best first."""
        offered = []
        if self.elf is not None:
            if self.elf.pvh_entry is not None:
                offered.append("pvh")
            offered.append("elf")
        if self.header is not None:
            if self.header.offers_64:
                offered.append("64")
            if self.header.offers_32:
                offered.append("32")
            offered.append("16")
        return offered


def read(kernel: bytes | memoryview, *, unpack: bool = True) -> Kernel:
    """Read the headers of a bzImage, a vmlinux or a compressed vmlinux.

    The payload of a bzImage is unpacked only if `unpack`: it takes longest. Raises ImageError for
    what is no kernel; a bzImage whose payload cannot be used is one with a `problem`.
    """
    image = memoryview(kernel)
    nothing = memoryview(b"")
    if bzimage.is_bzimage(image):
        header = bzimage.parse(image)
        if not unpack:
            return Kernel(image, header, nothing, None, "its payload was not looked at")
        try:
            vmlinux = memoryview(bzimage.unpack(image, header))
            return Kernel(image, header, vmlinux, elf.parse(vmlinux), "")
        except ImageError as error:
            return Kernel(image, header, nothing, None, str(error).partition(";")[0])
    packed = compression.detect(image)
    if packed is not None:
        image = memoryview(compression.unpack(image, packed))
    if bytes(image[:4]) != elf.MAGIC:
        raise ImageError("the kernel is neither a bzImage nor an ELF file; pass vmlinuz or vmlinux")
    return Kernel(nothing, None, image, elf.parse(image), "")


def load(
    memory: GuestMemory,
    kernel: bytes | memoryview,
    initrd: bytes | memoryview | None,
    cmdline: str,
    *,
    protocol: str = "auto",
    rsdp: int,
) -> LinuxBoot:
    """Put `kernel`, `initrd` and `cmdline` into fresh `memory`, with what the protocol needs.

    `rsdp` is the GPA of the ACPI RSDP that the kernel is told; 0 if there is none. Raises
    ImageError for a kernel or initrd that cannot be loaded, ConfigError for a protocol that there
    is not or a command line that is too long.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"there is no boot protocol {protocol!r}; use {', '.join(PROTOCOLS)}")
    parts = read(kernel, unpack=protocol in ("auto", "pvh", "elf"))
    offered = parts.offers()
    if protocol == "auto":
        chosen, detail = _choose(parts, offered)
    elif protocol in offered:
        chosen, detail = protocol, "asked for"
    else:
        why = f" ({parts.problem})" if parts.problem and protocol in ("pvh", "elf") else ""
        raise ImageError(
            f"the kernel does not offer the boot protocol {protocol}{why}; use {', '.join(offered)}"
        )
    placement = Placement(memory)
    placement.claim(KERNEL_GDT, REAL_MODE_SETUP - KERNEL_GDT, "the boot tables")
    placement.claim(EBDA_START, HIGH_MEMORY - EBDA_START, "the BIOS area")
    memory.write_u16(BDA_EBDA_SEGMENT, EBDA_START >> 4)
    memory.write_u16(BDA_BASE_MEMORY_KIB, EBDA_START >> 10)

    header = parts.header
    setup = real_mode.place(header) if chosen == "16" and header is not None else None
    if setup is not None:
        placement.claim(setup.base, setup.heap_end, "the setup code")
    cmdline_at = KERNEL_CMDLINE if setup is None else setup.cmdline
    _put_cmdline(memory, placement, cmdline_at, cmdline, header)
    if chosen in ("pvh", "elf") and parts.elf is not None:
        elf.load(memory, parts.vmlinux, parts.elf, placement)
        taken = parts.elf.span
    else:
        taken = _load_code(memory, placement, parts, relocate=chosen != "16")
    ramdisk = _put_initrd(memory, placement, initrd, header) if initrd else None

    ram = memory_map(memory.regions)
    if setup is not None and header is not None:
        entry = real_mode.start(memory, parts.image, header, setup, initrd=ramdisk, memory_map=ram)
    elif chosen == "pvh" and parts.elf is not None and parts.elf.pvh_entry is not None:
        entry = pvh.start(
            memory,
            parts.elf.pvh_entry,
            cmdline=cmdline_at,
            initrd=ramdisk,
            rsdp=rsdp,
            memory_map=ram,
        )
    else:
        boot_params.write(
            memory, parts.image, header,
            load=taken.start, cmdline=cmdline_at, initrd=ramdisk, rsdp=rsdp, memory_map=ram,
        )  # fmt: skip
        if chosen == "64":
            entry = boot_params.start_64(memory, taken.start + ENTRY_64_OFFSET)
        elif chosen == "32":
            entry = boot_params.start_32(memory, taken.start)
        else:
            assert parts.elf is not None
            begin = boot_params.start_64 if parts.elf.bits == 64 else boot_params.start_32
            entry = begin(memory, parts.elf.physical_entry())
    if chosen in ("pvh", "elf") and parts.elf is not None:  # by the others it may move itself
        segments = parts.elf.segments
        entry = entry._replace(linked=tuple(Linked(s.vaddr, s.paddr, s.memsz) for s in segments))
    return LinuxBoot(entry, chosen, detail, taken, ramdisk)


def _choose(parts: Kernel, offered: list[str]) -> tuple[str, str]:
    """The first protocol of `offered`, and why it is that one."""
    first = offered[0]
    detail = {
        "pvh": "the kernel has a PVH note",
        "elf": "the kernel has no PVH note",
    }.get(first) or f"it is entered compressed: {parts.problem}"
    return first, detail


def _put_cmdline(
    memory: GuestMemory, placement: Placement, at: int, cmdline: str, header: BzImage | None
) -> None:
    raw = cmdline.encode("utf-8", "surrogateescape")
    limit = _VMLINUX_CMDLINE_SIZE if header is None else header.cmdline_size
    limit = min(limit, KERNEL_CMDLINE_END - KERNEL_CMDLINE - 1)
    if len(raw) > limit:
        raise ConfigError(
            f"the kernel command line has {len(raw)} bytes, and the kernel takes {limit}; "
            "use a shorter --append"
        )
    if b"\0" in raw:
        raise ConfigError("the kernel command line has a zero byte; leave it out of --append")
    placement.claim(at, len(raw) + 1, "the command line")
    memory.write(at, raw + b"\0")


def _load_code(
    memory: GuestMemory, placement: Placement, parts: Kernel, *, relocate: bool
) -> range:
    """Copy the protected-mode part of a bzImage; the GPAs that it takes until it is unpacked.

    It starts at the first of them. A relocatable kernel goes to its preferred address, where it
    need not move itself; in real mode it has to be where the setup code expects it.
    """
    header = parts.header
    assert header is not None
    at = header.load
    preferred = header.pref_address
    if relocate and header.relocatable and header.loaded_high:
        at = -(-HIGH_MEMORY // header.alignment) * header.alignment
        if preferred >= HIGH_MEMORY and preferred % header.alignment == 0:
            at = preferred
    size = len(header.code)
    # boot.rst, init_size: what it needs from the higher of where it is and where it prefers to be.
    end = at + size
    if header.loaded_high:
        end = max(end, max(at, preferred) + header.init_size)
    placement.claim(at, end - at, "the kernel")
    memory.write(at, parts.image[header.code.start : header.code.stop])
    return range(at, end)


def _put_initrd(
    memory: GuestMemory,
    placement: Placement,
    initrd: bytes | memoryview,
    header: BzImage | None,
) -> range:
    """Copy the initrd to the highest place that the kernel can reach."""
    limit = MMIO_HOLE_START if header is None else header.initrd_addr_max + 1
    at = placement.claim_highest(len(initrd), limit, "the initrd")
    memory.write(at, initrd)
    return range(at, at + len(initrd))
