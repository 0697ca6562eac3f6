"""What an image is: its kind, its size, and its first instructions."""

from io import BytesIO

from vmexit.arch.x86.code import disassemble
from vmexit.arch.x86.layout import FLAT_ENTRY, FLAT_LOAD_ADDRESS
from vmexit.boot.describe import describe as describe_kernel
from vmexit.boot.describe import is_kernel_elf
from vmexit.boot.flat import check_entry
from vmexit.boot.image import COMPRESSIONS, ImageKind, detect, read_image
from vmexit.core.errors import ImageError

_INSTRUCTIONS = 8
_SHF_ALLOC = 0x2
# Segments times sections: Linux has some 300.
_MOST = 100_000
_UNPACK = {"gzip": "gunzip", "xz": "unxz", "lz4": "unlz4", "zstd": "unzstd"}
_BITS = {"real": 16, "protected": 32, "long": 64}


def describe(
    path: str, load_address: int | None, entry: int | None, segment: int | None, mode: str
) -> str:
    """The report on the image at `path`, as if it were run with these options. ImageError if not.

    An address that is None has its default, or, where an image does not reach it, the image's
    beginning.
    """
    data = read_image(path)
    kind = detect(data)
    lines = [f"{path}: {kind.description}, {len(data)} bytes"]
    if kind.name in ("bzimage", "multiboot") or (kind.name == "elf" and is_kernel_elf(data)):
        lines += _describe_kernel(path, data)
    elif kind.name == "elf":
        lines += _describe_elf(path, data)
    elif kind.name == "firmware":
        lines.append("run it with: vmexit run --firmware " + path)
        lines += _code(data, len(data) - 16, 0xFFFF_FFF0, 16, 1)
    elif kind.name in COMPRESSIONS:
        lines += _describe_compressed(path, data, kind.name)
    elif kind.name in ("flat", "boot-sector"):
        lines += _describe_flat(path, data, kind, load_address, entry, segment, mode)
    return "\n".join(lines)


def _describe_kernel(path: str, data: bytes) -> list[str]:
    try:
        return describe_kernel(data, path)
    except ImageError as error:
        return [f"it cannot be booted: {error}"]


def _describe_compressed(path: str, data: bytes, compression: str) -> list[str]:
    try:
        return describe_kernel(data, path)
    except ImageError:  # then it is not a kernel, or one that this host cannot unpack
        return [f"unpack it with: {_UNPACK[compression]} {path}"]


def _describe_flat(
    path: str,
    data: bytes,
    kind: ImageKind,
    load: int | None,
    entry: int | None,
    segment: int | None,
    mode: str,
) -> list[str]:
    if kind.name == "boot-sector" and load is None and entry is None:
        load, entry, segment = 0x7C00, 0x7C00, 0
    if load is None:
        load = FLAT_LOAD_ADDRESS
        if entry is None and not load <= FLAT_ENTRY < load + len(data):
            load = FLAT_ENTRY
    if entry is None:
        entry = FLAT_ENTRY if load <= FLAT_ENTRY < load + len(data) else load
    check_entry(entry, len(data), load)
    lines = [
        f"run it with: {_command(path, load, entry, segment, mode)}",
        f"entry {entry:#x}, {mode} mode:",
    ]
    return lines + _code(data, entry - load, entry, _BITS[mode], _INSTRUCTIONS)


def _command(path: str, load: int, entry: int, segment: int | None, mode: str) -> str:
    command = f"vmexit run {path}"
    if load != FLAT_LOAD_ADDRESS:
        command += f" --load-address {load:#x}"
    if segment is not None:
        command += f" --entry {segment:#x}:{entry - (segment << 4):#x}"
    elif entry != FLAT_ENTRY:
        command += f" --entry {entry:#x}"
    if mode != "real":
        command += f" --mode {mode}"
    return command


def _describe_elf(path: str, data: bytes) -> list[str]:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(BytesIO(data))
        lines = [f"machine {elf['e_machine']}, type {elf['e_type']}, entry {elf['e_entry']:#x}"]
        if elf.num_segments() * max(elf.num_sections(), 1) > _MOST:
            counts = f"{elf.num_segments()} segments and {elf.num_sections()} sections"
            return [*lines, f"it has {counts}, more than any program"]
        segments = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        lines += [
            f"load {s['p_filesz']:#x} bytes at physical {s['p_paddr']:#x}, "
            f"virtual {s['p_vaddr']:#x}"
            for s in segments
        ]
        if not segments:
            return [*lines, "it has nothing to load: link it first, with ld -Ttext 0x1000"]
        if any(s["p_type"] == "PT_INTERP" for s in elf.iter_segments()):
            return [*lines, "it is a program for an operating system: it cannot run without one"]
        # objcopy leaves out what belongs to no section, as the headers.
        starts = [
            (segment["p_paddr"] - segment["p_vaddr"] + section["sh_addr"])
            for section in elf.iter_sections()
            for segment in segments
            if section["sh_flags"] & _SHF_ALLOC
            and section["sh_type"] != "SHT_NOBITS"
            and segment.section_in_segment(section)
        ]
        entries = [
            s["p_paddr"] - s["p_vaddr"] + elf["e_entry"]
            for s in segments
            if s["p_vaddr"] <= elf["e_entry"] < s["p_vaddr"] + s["p_memsz"]
        ]
    except (ELFError, ValueError, KeyError, OverflowError) as error:
        return [f"its headers are damaged: {error}"]
    if not starts or not entries:
        return [*lines, "it has no code that a flat image could begin with"]
    mode = {"EM_X86_64": "long", "EM_386": "protected"}.get(elf["e_machine"])
    if mode is None:
        return [*lines, "it is for another processor"]
    flat = f"{path}.bin"
    return [
        *lines,
        f"convert it with: objcopy -O binary {path} {flat}",
        f"run it with: {_command(flat, min(starts), entries[0], None, mode)}",
    ]


def _code(data: bytes, offset: int, address: int, bits: int, count: int) -> list[str]:
    found = disassemble(data[offset : offset + 15 * count], address, bits, count)
    if not found:
        return [f"  {address:#010x}  {data[offset : offset + 8].hex(' ')}  (no instruction)"]
    return [f"  {at:#010x}  {raw.hex(' '):<24} {text}" for at, raw, text in found]
