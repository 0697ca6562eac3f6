"""Symbol tables of ELF files: reading one, and giving a file one (System V gABI, chapter 4)."""

import struct
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from vmexit.boot.elf import EHDR, MAGIC
from vmexit.core.errors import ImageError
from vmexit.core.symbols import Symbol

_SHT_SYMTAB, _SHT_STRTAB, _SHT_NOBITS, _SHT_DYNSYM = 2, 3, 8, 11
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR = 1, 2, 4
_SHN_UNDEF, _SHN_LORESERVE, _SHN_ABS = 0, 0xFF00, 0xFFF1
_STB_LOCAL, _STB_GLOBAL, _STB_WEAK = 0, 1, 2
_STT_NOTYPE, _STT_OBJECT, _STT_FUNC = 0, 1, 2
_GNU_IFUNC = 10

# Section headers and symbols of both classes.
_SHDR = {32: struct.Struct("<10I"), 64: struct.Struct("<IIQQQQIIQQ")}
_SYM = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}
# Bounds for a hostile file: a kernel with debug information has 80 sections and 300,000 symbols.
_MAX_SECTIONS = 4096
_MAX_SYMBOLS = 1 << 21
_MAX_NAME = 4096
_MAX_TEXT = 256 << 20  # names may share their bytes in the file


class ElfSection(NamedTuple):
    """A section header, as far as it is needed here; `name` is an offset in the string table."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int

    @property
    def loaded(self) -> bool:
        """Whether it is somewhere in memory."""
        return bool(self.flags & _SHF_ALLOC)


def read(data: bytes) -> list[Symbol]:
    """The functions, objects and labels of an ELF file, of .symtab or else of .dynsym.

    Of several at one address the one comes first that names it best. None at all for a file without
    a symbol table. Raises ImageError if the file is damaged.
    """
    bits, sections = _sections(data)
    for wanted in (_SHT_SYMTAB, _SHT_DYNSYM):
        for section in sections:
            if section.type == wanted and section.size:
                return _symbols(data, bits, sections, section)
    return []


def add(data: bytes, symbols: Iterable[Symbol]) -> bytes:
    """The 64-bit ELF file `data`, all of it as it is, with `symbols` as its .symtab.

    Raises ImageError for a file that has no sections, which its symbols could be in.
    """
    bits, sections = _sections(data)
    if bits != 64:
        raise ImageError("the kernel is a 32-bit ELF file; symbols can be added to 64-bit ones")
    names_index = EHDR[64].unpack_from(data, 16)[12]
    if not sections or names_index >= len(sections):
        raise ImageError("the ELF file has no sections; use one that is not stripped of them")
    # Local symbols have to come first, and sh_info says where the others begin.
    ordered = sorted(symbols, key=lambda symbol: not symbol.kind.islower())
    first_global = 1 + sum(symbol.kind.islower() for symbol in ordered)
    strings, entries = bytearray(1), bytearray(_SYM[64].size)
    places = _Places(sections)
    for symbol in ordered:
        index = _SHN_ABS if symbol.kind == "A" else places.index(symbol.address)
        entries += _SYM[64].pack(len(strings), _info(symbol), 0, index, symbol.address, symbol.size)
        strings += symbol.name.encode() + b"\0"

    old_names = sections[names_index]
    names = bytearray(data[old_names.offset : old_names.offset + old_names.size])
    output = bytearray(data)

    def append(content: bytes | bytearray) -> int:
        output.extend(bytes(-len(output) % 8))
        output.extend(content)
        return len(output) - len(content)

    def name(text: bytes) -> int:
        names.extend(text + b"\0")
        return len(names) - len(text) - 1

    count = len(sections)
    symtab = ElfSection(
        name(b".symtab"), _SHT_SYMTAB, 0, 0, append(entries), len(entries),
        count + 1, first_global, 8, _SYM[64].size,
    )  # fmt: skip
    strtab = ElfSection(
        name(b".strtab"), _SHT_STRTAB, 0, 0, append(strings), len(strings), 0, 0, 1, 0
    )
    sections[names_index] = old_names._replace(offset=append(names), size=len(names))
    table = append(b"".join(_SHDR[64].pack(*s) for s in (*sections, symtab, strtab)))
    header = list(EHDR[64].unpack_from(output, 16))
    header[5], header[10], header[11] = table, _SHDR[64].size, count + 2
    EHDR[64].pack_into(output, 16, *header)
    return bytes(output)


def _info(symbol: Symbol) -> int:
    """Binding and type."""
    if symbol.kind == "A":
        return _STB_GLOBAL << 4 | _STT_NOTYPE
    binding = _STB_LOCAL if symbol.kind.islower() else _STB_GLOBAL
    if symbol.kind in "WV":
        binding = _STB_WEAK
    return binding << 4 | (_STT_FUNC if symbol.is_code else _STT_OBJECT)


def _sections(data: bytes) -> tuple[int, list[ElfSection]]:
    """The class of an ELF file, 32 or 64, and its section headers."""
    bits = {1: 32, 2: 64}.get(data[4] if len(data) > 4 else 0)
    if data[:4] != MAGIC or bits is None or len(data) < 16 + EHDR[bits].size or data[5] != 1:
        raise _damaged("its header is cut short or of no known kind")
    _, _, _, _, _, at, _, _, _, _, size, count, _ = EHDR[bits].unpack_from(data, 16)
    if not at or not count:
        return bits, []
    layout = _SHDR[bits]
    if count > _MAX_SECTIONS or size < layout.size or at + count * size > len(data):
        raise _damaged(f"{count} section headers of {size} bytes at {at:#x}")
    return bits, [ElfSection(*layout.unpack_from(data, at + n * size)) for n in range(count)]


def _content(data: bytes, section: ElfSection) -> memoryview:
    if section.type == _SHT_NOBITS or section.offset + section.size > len(data):
        raise _damaged(f"a section of {section.size} bytes at {section.offset:#x} is not in it")
    return memoryview(data)[section.offset : section.offset + section.size]


def _symbols(data: bytes, bits: int, sections: list[ElfSection], table: ElfSection) -> list[Symbol]:
    layout = _SYM[bits]
    raw = _content(data, table)
    count = len(raw) // layout.size
    if count > _MAX_SYMBOLS or table.link >= len(sections):
        raise _damaged(f"a symbol table of {count} entries")
    strings = bytes(_content(data, sections[table.link]))
    symbols: list[Symbol] = []
    room = _MAX_TEXT
    for entry in layout.iter_unpack(raw[: count * layout.size]):
        if bits == 64:
            name_at, info, _, index, value, size = entry
        else:
            name_at, value, size, info, _, index = entry
        kind = _kind(info, index, sections)
        if not kind or not 0 < name_at < len(strings):
            continue
        end = strings.find(b"\0", name_at, name_at + _MAX_NAME)
        room -= max(end - name_at, 0)
        if room < 0:
            raise _damaged(f"names of more than {_MAX_TEXT} bytes")
        name = strings[name_at : max(end, name_at)].decode("utf-8", "backslashreplace")
        if name and not name.startswith(".L"):  # what an assembler makes for itself
            symbols.append(Symbol(value, name, kind, size))
    symbols.sort(key=_rank)
    return symbols


def _rank(symbol: Symbol) -> tuple[int, bool, bool, int]:
    """By address; then first what has a size, is seen from outside, has fewer underscores."""
    name = symbol.name
    underscores = len(name) - len(name.lstrip("_"))
    return symbol.address, not symbol.size, symbol.kind.islower(), underscores


def _kind(info: int, index: int, sections: list[ElfSection]) -> str:
    """The letter of nm(1) for a symbol; empty for what is none of ours: files, sections, TLS."""
    type_, binding = info & 0xF, info >> 4
    if type_ not in (_STT_NOTYPE, _STT_OBJECT, _STT_FUNC, _GNU_IFUNC) or index == _SHN_UNDEF:
        return ""
    if index >= _SHN_LORESERVE:
        return "A" if index == _SHN_ABS else ""
    if index >= len(sections):
        return ""
    section = sections[index]
    if binding == _STB_WEAK:
        return "V" if type_ == _STT_OBJECT else "W"
    if section.flags & _SHF_EXECINSTR:
        letter = "t"
    elif section.type == _SHT_NOBITS:
        letter = "b"
    else:
        letter = "d" if section.flags & _SHF_WRITE else "r"
    return letter if binding == _STB_LOCAL else letter.upper()


class _Places:
    """Which section an address is in."""

    def __init__(self, sections: list[ElfSection]) -> None:
        self._loaded = sorted(
            (section.address, section.address + section.size, index)
            for index, section in enumerate(sections)
            if section.loaded
        )
        self._starts = [start for start, _, _ in self._loaded]

    def index(self, address: int) -> int:
        """The index of the section, also for the address of its end (`_etext`); else SHN_ABS."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return _SHN_ABS
        _, end, index = self._loaded[at]
        return index if address <= end else _SHN_ABS


def _damaged(what: str) -> ImageError:
    return ImageError(f"the ELF file is damaged: {what}; build it again")
