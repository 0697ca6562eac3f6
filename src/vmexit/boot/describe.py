"""What a Linux kernel file says of itself, in lines for people."""

import re

from vmexit.boot import bzimage, linux, multiboot
from vmexit.boot.bzimage import BzImage
from vmexit.boot.elf import ElfKernel
from vmexit.boot.image import find_multiboot
from vmexit.core.errors import ImageError

# `linux_banner` of init/version.c; the other strings that begin so have no number there.
_BANNER = re.compile(rb"Linux version \d[ -~]{,500}")


def describe(data: bytes, path: str) -> list[str]:
    """Lines on the kernel `data`, read from `path`. Raises ImageError if it is none."""
    if find_multiboot(data) is not None:
        return _multiboot_lines(data, path)
    kernel = linux.read(data)
    banner = _BANNER.search(kernel.vmlinux)
    lines = []
    if banner is not None:
        lines.append(banner[0].decode("ascii"))
    elif kernel.header is not None and kernel.header.name:
        lines.append(f"Linux version {kernel.header.name}")
    if kernel.header is not None:
        lines += _header_lines(data, kernel.header)
        if kernel.problem:
            lines.append(f"entered compressed only: {kernel.problem}")
        elif kernel.vmlinux:
            lines[-1] += f", unpacks to {len(kernel.vmlinux)} bytes"
    if kernel.elf is not None:
        lines += _elf_lines(kernel.elf)
    lines.append(f"it can be booted by: {', '.join(kernel.offers())}")
    is_linux = banner is not None or kernel.header is not None
    more = " --initrd INITRD --append console=ttyS0" if is_linux else ""
    lines.append(f"run it with: vmexit run --kernel {path}{more}")
    return lines


def is_kernel_elf(data: bytes) -> bool:
    """Whether an ELF file is a kernel: a multiboot header, a PVH note, or Linux's banner."""
    if find_multiboot(data) is not None:
        return True
    try:
        kernel = linux.read(data)
    except ImageError:
        return False
    if kernel.elf is not None and kernel.elf.pvh_entry is not None:
        return True
    return _BANNER.search(kernel.vmlinux) is not None


def _multiboot_lines(data: bytes, path: str) -> list[str]:
    kernel = multiboot.parse(data)
    if kernel.elf is not None:
        lines = _elf_lines(kernel.elf)
    else:
        taken = kernel.taken
        lines = [f"loaded at {taken.start:#x}..{taken.stop - 1:#x}, entry {kernel.entry:#x}"]
    if kernel.flags & multiboot.WANT_VIDEO:
        lines.append("it asks for a video mode, which there is not")
    offered = ["multiboot"]
    if kernel.elf is not None and kernel.elf.pvh_entry is not None:
        offered.append("pvh")
    lines.append(f"it can be booted by: {', '.join(offered)}")
    lines.append(f"run it with: vmexit run --kernel {path}")
    return lines


def _header_lines(data: bytes, header: BzImage) -> list[str]:
    lines = [f"boot protocol {header.protocol_version}"]
    place = f"loaded at {header.load:#x}"
    if header.relocatable:
        place = f"relocatable, aligned to {header.alignment:#x}"
        if header.min_alignment:
            place += f" (at least {1 << min(header.min_alignment, 63):#x})"
    if header.pref_address:
        place += f", prefers {header.pref_address:#x}"
    if header.init_size:
        place += f", needs {header.init_size:#x} bytes there"
    lines.append(place)
    lines.append(
        f"command line of up to {header.cmdline_size} bytes, "
        f"initrd up to {header.initrd_addr_max:#x}"
    )
    packed = bzimage.payload_compression(data, header) or "of unknown kind"
    if header.payload:
        lines.append(f"payload {packed}, {len(header.payload)} bytes")
    return lines


def _elf_lines(elf: ElfKernel) -> list[str]:
    lines = [f"{elf.bits}-bit, entry {elf.entry:#x}"]
    if elf.pvh_entry is not None:
        lines[0] += f", PVH entry {elf.pvh_entry:#x}"
    lines += [
        f"load {s.filesz:#x} bytes at physical {s.paddr:#x}, virtual {s.vaddr:#x}"
        for s in elf.segments
    ]
    return lines
