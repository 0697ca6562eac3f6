"""What an image is: its kind, its size, and its first instructions."""

from io import BytesIO

from vmexit.arch.x86.code import disassemble
from vmexit.arch.x86.layout import FLAT_ENTRY, FLAT_LOAD_ADDRESS
from vmexit.boot.flat import check_entry
from vmexit.boot.image import ImageKind, detect, read_image

_INSTRUCTIONS = 8
_BITS = {"real": 16, "protected": 32, "long": 64}


def describe(path: str, load_address: int | None, entry: int | None, mode: str) -> str:
    """The report on the image at `path`, as if it were run with these options. ImageError if not.

    An address that is None has its default, or, where an image does not reach it, the image's
    beginning.
    """
    data = read_image(path)
    kind = detect(data)
    lines = [f"{path}: {kind.description}, {len(data)} bytes"]
    if kind.name == "elf":
        lines += _describe_elf(data)
    elif kind.name == "firmware":
        lines.append("run it with: vmexit run --firmware " + path)
        lines += _code(data, len(data) - 16, 0xFFFF_FFF0, 16, 1)
    elif kind.name in ("flat", "boot-sector"):
        lines += _describe_flat(path, data, kind, load_address, entry, mode)
    return "\n".join(lines)


def _describe_flat(
    path: str, data: bytes, kind: ImageKind, load: int | None, entry: int | None, mode: str
) -> list[str]:
    if kind.name == "boot-sector" and load is None and entry is None:
        load = entry = 0x7C00
    if load is None:
        load = FLAT_LOAD_ADDRESS
    if entry is None:
        reaches = load <= FLAT_ENTRY < load + len(data)
        entry = FLAT_ENTRY if reaches else load
    check_entry(entry, len(data), load)
    command = f"vmexit run {path}"
    if load != FLAT_LOAD_ADDRESS:
        command += f" --load-address {load:#x}"
    if entry != FLAT_ENTRY:
        command += f" --entry {entry:#x}"
    if mode != "real":
        command += f" --mode {mode}"
    lines = [f"run it with: {command}", f"entry {entry:#x}, {mode} mode:"]
    return lines + _code(data, entry - load, entry, _BITS[mode], _INSTRUCTIONS)


def _describe_elf(data: bytes) -> list[str]:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(BytesIO(data))
        lines = [f"machine {elf['e_machine']}, type {elf['e_type']}, entry {elf['e_entry']:#x}"]
        lines.extend(
            f"load {segment['p_filesz']:#x} bytes at physical {segment['p_paddr']:#x}, "
            f"virtual {segment['p_vaddr']:#x}"
            for segment in elf.iter_segments()
            if segment["p_type"] == "PT_LOAD"
        )
    except (ELFError, ValueError, KeyError, OverflowError) as error:
        return [f"its headers are damaged: {error}"]
    lines.append("vmexit runs it once it is flat: objcopy -O binary FILE.elf FILE.bin")
    return lines


def _code(data: bytes, offset: int, address: int, bits: int, count: int) -> list[str]:
    found = disassemble(data[offset : offset + 15 * count], address, bits, count)
    if not found:
        return [f"  {address:#010x}  {data[offset : offset + 8].hex(' ')}  (no instruction)"]
    return [f"  {at:#010x}  {raw.hex(' '):<24} {text}" for at, raw, text in found]
