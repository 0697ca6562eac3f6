"""ELF kernels: reading the headers, finding the PVH entry, loading the segments.

Own parsing, not pyelftools: it takes 30 ms to import and copies, and a kernel is 60 MB.
"""

import struct
from itertools import pairwise
from typing import NamedTuple

from vmexit.abi.pvh import XEN_ELFNOTE_NAME, XEN_ELFNOTE_PHYS32_ENTRY
from vmexit.boot.placement import Placement
from vmexit.core.errors import ImageError
from vmexit.core.memory import GuestMemory

MAGIC = b"\x7fELF"
_PT_LOAD, _PT_NOTE = 1, 4
_ET_EXEC, _ET_DYN = 2, 3
_EM_386, _EM_X86_64 = 3, 62
# Bounds for a hostile file: kernels have a dozen segments, and some hundred bytes of notes.
_MAX_SEGMENTS = 512
_MAX_NOTES = 1 << 14
_ADDRESS_END = 1 << 52  # what an x86 CPU can have at most (Intel SDM vol. 3, 4.1.4)

# The header behind e_ident, and a program header (System V gABI, chapters 4 and 5).
EHDR = {32: struct.Struct("<HHIIIIIHHHHHH"), 64: struct.Struct("<HHIQQQIHHHHHH")}
_PHDR = {32: struct.Struct("<8I"), 64: struct.Struct("<IIQQQQQQ")}
_NOTE = struct.Struct("<III")


class ElfSegment(NamedTuple):
    """A PT_LOAD segment: `filesz` bytes at `offset` of the file go to GPA `paddr`.

    `memsz` bytes of memory are its own, those behind `filesz` being 0.
    """

    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int

    @property
    def end(self) -> int:
        """The first GPA behind the segment."""
        return self.paddr + self.memsz


class ElfKernel(NamedTuple):
    """What the headers of an ELF kernel say. `bits` is 32 or 64; `entry` is as in the header.

    `pvh_entry` is the physical address of the PVH note, None without one.
    """

    bits: int
    entry: int
    segments: tuple[ElfSegment, ...]
    pvh_entry: int | None

    @property
    def span(self) -> range:
        """From the first to the last GPA of all segments."""
        return range(min(s.paddr for s in self.segments), max(s.end for s in self.segments))

    def virtual_address(self, offset: int) -> int | None:
        """Where the byte at `offset` of the file is in memory; None if it is not loaded."""
        for segment in self.segments:
            if segment.offset <= offset < segment.offset + segment.filesz:
                return segment.vaddr + offset - segment.offset
        return None

    def physical_entry(self) -> int:
        """`entry` as a physical address. ImageError if it is in no segment.

        Linux's vmlinux has it so already; other linkers put the virtual address there.
        """
        for segment in self.segments:
            if segment.paddr <= self.entry < segment.end:
                return self.entry
        for segment in self.segments:
            if segment.vaddr <= self.entry < segment.vaddr + segment.memsz:
                return self.entry - segment.vaddr + segment.paddr
        raise ImageError(
            f"the entry {self.entry:#x} of the ELF file lies in none of its segments; link it again"
        )


def parse(data: bytes | memoryview) -> ElfKernel:
    """Read the headers of an x86 ELF file. Raises ImageError for what cannot be loaded."""
    if bytes(data[:4]) != MAGIC:
        raise ImageError("the kernel is not an ELF file; pass a vmlinux")
    bits = {1: 32, 2: 64}.get(data[4] if len(data) > 4 else 0)
    if bits is None or len(data) < 16 + EHDR[bits].size:
        raise _damaged("its header is cut short or of no known class")
    if data[5] != 1:
        raise ImageError("the ELF file is big-endian; pass a kernel for x86")
    kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = EHDR[bits].unpack_from(data, 16)
    if machine not in (_EM_386, _EM_X86_64):
        raise ImageError(f"the ELF file is for machine {machine}; pass a kernel for x86")
    if kind not in (_ET_EXEC, _ET_DYN):
        raise ImageError("the ELF file is not linked; link it first, with ld")
    layout = _PHDR[bits]
    if phnum > _MAX_SEGMENTS or (phnum and phentsize < layout.size):
        raise _damaged(f"{phnum} program headers of {phentsize} bytes")
    if phoff + phnum * phentsize > len(data):
        raise _damaged(f"its {phnum} program headers at {phoff:#x} reach behind its end")
    segments: list[ElfSegment] = []
    pvh_entry = None
    for index in range(phnum):
        fields = layout.unpack_from(data, phoff + index * phentsize)
        if bits == 64:
            type_, _, offset, vaddr, paddr, filesz, memsz, align = fields
        else:
            type_, offset, vaddr, paddr, filesz, memsz, _, align = fields
        if type_ not in (_PT_LOAD, _PT_NOTE):
            continue
        if offset + filesz > len(data):
            raise _damaged(
                f"segment {index} ({filesz:#x} bytes at {offset:#x}) reaches behind its end"
            )
        if type_ == _PT_NOTE:
            if pvh_entry is None:
                pvh_entry = _pvh_entry(
                    data[offset : offset + min(filesz, _MAX_NOTES)], 8 if align == 8 else 4
                )
        elif memsz:
            segments.append(_checked(ElfSegment(offset, vaddr, paddr, filesz, memsz), index))
    if not segments:
        raise ImageError("the ELF file has nothing to load; link it first, with ld")
    _check_apart(segments)
    if pvh_entry is not None and not any(s.paddr <= pvh_entry < s.end for s in segments):
        raise _damaged(f"its PVH entry {pvh_entry:#x} lies in none of its segments")
    return ElfKernel(bits, entry, tuple(segments), pvh_entry)


def load(
    memory: GuestMemory, data: bytes | memoryview, kernel: ElfKernel, placement: Placement
) -> None:
    """Copy the segments of `kernel`, which `data` is, to their places in `memory`.

    Memory is taken to be fresh: the zeros behind a segment's bytes are there already, and are
    not written, which would make the host find pages for them. Raises ImageError where there is
    no RAM, or something else has its place.
    """
    view = memoryview(data)
    # The last one first: if memory ends too early, that says how much is needed in all.
    for segment in sorted(kernel.segments, key=lambda s: s.paddr, reverse=True):
        placement.claim(segment.paddr, segment.memsz, "a segment of the kernel")
    for segment in kernel.segments:
        memory.write(segment.paddr, view[segment.offset : segment.offset + segment.filesz])


def _checked(segment: ElfSegment, index: int) -> ElfSegment:
    if segment.filesz > segment.memsz:
        raise _damaged(f"segment {index} has more bytes in the file than in memory")
    if segment.end > _ADDRESS_END:
        raise _damaged(f"segment {index} ends at {segment.end:#x}, which no x86 CPU can reach")
    return segment


def _check_apart(segments: list[ElfSegment]) -> None:
    in_order = sorted(segments, key=lambda segment: segment.paddr)
    for before, after in pairwise(in_order):
        if before.end > after.paddr:
            raise _damaged(f"its segments at {before.paddr:#x} and {after.paddr:#x} overlap")


def _pvh_entry(notes: bytes | memoryview, alignment: int) -> int | None:
    """The address in the Xen note "PHYS32_ENTRY" (Xen docs/misc/pvh.pandoc) of a PT_NOTE."""
    at = 0
    while at + _NOTE.size <= len(notes):
        namesz, descsz, type_ = _NOTE.unpack_from(notes, at)
        name = at + _NOTE.size
        desc = -(-(name + namesz) // alignment) * alignment
        at = -(-(desc + descsz) // alignment) * alignment
        if type_ != XEN_ELFNOTE_PHYS32_ENTRY or notes[name : name + namesz] != XEN_ELFNOTE_NAME:
            continue
        if descsz not in (4, 8) or desc + descsz > len(notes):
            raise _damaged(f"its PVH note has {descsz} bytes, not 4 or 8")
        entry = int.from_bytes(notes[desc : desc + descsz], "little")
        if entry >> 32:
            raise _damaged(f"its PVH entry {entry:#x} is above 4 GiB")
        return entry
    return None


def _damaged(what: str) -> ImageError:
    return ImageError(f"the ELF file is damaged: {what}; build it again")
