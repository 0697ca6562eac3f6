"""Small synthetic kernels: ELF files and bzImages, written from the specifications with struct."""

import bz2
import gzip
import lzma
import struct

XEN_NOTE = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x100_0040)


def elf(
    segments=((0x100_0000, b"kernel", 0x2000),),
    *,
    entry=0x100_0000,
    note=XEN_NOTE,
    bits=64,
    note_align=4,
    virtual=0,
    machine=None,
    kind=2,
) -> bytes:
    """An ELF file; a segment is (physical address, content, size in memory)."""
    count = len(segments) + (note is not None)
    head, entry_size = (64, 56) if bits == 64 else (52, 32)
    at = head + count * entry_size
    table, content = b"", b""

    def header(type_, offset, vaddr, paddr, filesz, memsz, align):
        if bits == 64:
            return struct.pack("<IIQQQQQQ", type_, 7, offset, vaddr, paddr, filesz, memsz, align)
        return struct.pack("<8I", type_, offset, vaddr, paddr, filesz, memsz, 7, align)

    for paddr, data, memsz in segments:
        vaddr = paddr + virtual
        table += header(1, at + len(content), vaddr, paddr, len(data), memsz, 0x1000)
        content += data
    if note is not None:
        table += header(4, at + len(content), 0, 0, len(note), len(note), note_align)
        content += note
    machine = machine or (62 if bits == 64 else 3)
    ident = b"\x7fELF" + bytes((2 if bits == 64 else 1, 1, 1)) + bytes(9)
    layout = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    fields = (kind, machine, 1, entry, head, 0, 0, head, entry_size, count, 0, 0, 0)
    return ident + struct.pack(layout, *fields) + table + content


def with_size(data: bytes, packed: bytes) -> bytes:
    """As Linux's build appends the size to what is packed."""
    return packed + struct.pack("<I", len(data))


def lz4_legacy(data: bytes) -> bytes:
    """A legacy frame of blocks of 8 MiB, each of literals only."""
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = data[at : at + (8 << 20)]
        count = len(block) - 15
        token = b"\xf0" + b"\xff" * (count // 255) + bytes((count % 255,))
        packed = (token if count >= 0 else bytes((len(block) << 4,))) + block
        out += struct.pack("<I", len(packed)) + packed
    return out


def zstd_raw(data: bytes) -> bytes:
    """A frame of raw blocks (RFC 8878, 3.1.1): magic, descriptor, window of 1 MiB, blocks."""
    out = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes((10 << 3,))
    blocks = [data[at : at + 0x1_0000] for at in range(0, len(data), 0x1_0000)] or [b""]
    for block in blocks:
        last = block is blocks[-1]
        out += struct.pack("<I", len(block) << 3 | last)[:3] + block
    return out


PACK = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "xz": lambda data: with_size(data, lzma.compress(data, check=lzma.CHECK_CRC32)),
    "lzma": lambda data: with_size(data, lzma.compress(data, lzma.FORMAT_ALONE)),
    "bzip2": lambda data: with_size(data, bz2.compress(data)),
    "lz4": lambda data: with_size(data, lz4_legacy(data)),
    "zstd": lambda data: with_size(data, zstd_raw(data)),
}


def bzimage(
    payload: bytes = b"",
    *,
    version=0x20F,
    sects=4,
    loadflags=1,
    relocatable=1,
    alignment=0x20_0000,
    xloadflags=1,
    cmdline_size=2047,
    initrd_addr_max=0x7FFF_FFFF,
    pref_address=0x100_0000,
    init_size=0x30_0000,
    name=b"6.1.0-test (me) #1",
    code=b"\x90" * 0x400,
) -> bytes:
    """A bzImage whose protected-mode part is `code` and then `payload` (boot.rst, the header)."""
    setup = bytearray(512 * ((sects or 4) + 1))
    if name:
        setup[0x400 : 0x400 + len(name)] = name
    struct.pack_into("<B", setup, 0x1F1, sects)
    struct.pack_into("<I", setup, 0x1F4, (len(code) + len(payload)) // 16)
    struct.pack_into("<HBB4sH", setup, 0x1FE, 0xAA55, 0xEB, 0x6A, b"HdrS", version)
    struct.pack_into("<H", setup, 0x20E, 0x200 if name else 0)
    struct.pack_into("<B", setup, 0x211, loadflags)
    struct.pack_into("<I", setup, 0x214, 0x10_0000 if loadflags & 1 else 0x1000)
    struct.pack_into("<II", setup, 0x22C, initrd_addr_max, alignment)
    struct.pack_into("<BBH", setup, 0x234, relocatable, 21, xloadflags)
    struct.pack_into("<I", setup, 0x238, cmdline_size)
    struct.pack_into("<II", setup, 0x248, len(code), len(payload))
    struct.pack_into("<QI", setup, 0x258, pref_address, init_size)
    return bytes(setup) + code + payload
