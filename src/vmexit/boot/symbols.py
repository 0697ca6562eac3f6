"""Symbols from files: an ELF file's table, a System.map, or what a kernel carries for itself."""

import os
import re

from vmexit.boot import bzimage, compression, elf, kallsyms, symtab
from vmexit.boot.image import read_image
from vmexit.core.errors import ImageError, shown
from vmexit.core.symbols import Symbol, SymbolTable

# A line of nm(1), System.map and /proc/kallsyms, which has the module behind it.
_LINE = re.compile(rb"([0-9a-fA-F]{1,16}) ([A-Za-z?]) (\S{1,512})(?:[ \t]+\[\S+\])?[ \t]*\r?")
_MAX_SYMBOLS = 1 << 21  # a bound for a hostile file
_UPPER_HALF = 1 << 63


def load_symbols(path: str | os.PathLike[str]) -> SymbolTable:
    """The symbols in the file at `path`.

    It is an ELF file with a symbol table, a System.map or a copy of /proc/kallsyms, or a Linux
    kernel (vmlinuz or vmlinux), whose own symbols are used. Raises ImageError if it is none of
    these, or has no symbols.
    """
    data = read_image(path, what="symbol file")
    try:
        symbols = _parse(data)
    except ImageError as error:
        raise ImageError(f"symbol file {shown(os.fsdecode(path))}: {error}") from error
    return _table(symbols)


def own_symbols(path: str | os.PathLike[str]) -> SymbolTable:
    """The symbol table of the kernel at `path` if it is an ELF file that has one; else empty."""
    data = read_image(path, what="kernel")
    return _table(symtab.read(data) if data[:4] == elf.MAGIC else [])


def with_symbols(path: str | os.PathLike[str]) -> bytes:
    """The kernel at `path`, unpacked, as an ELF file with a symbol table: what gdb can use.

    One that has a table stays as it is. Raises ImageError if it is no kernel or has no symbols.
    """
    data = read_image(path, what="kernel")
    try:
        vmlinux = _vmlinux(data)
        if vmlinux is None:
            raise ImageError("it is no kernel; pass a vmlinuz or a vmlinux")
        if symtab.read(vmlinux):
            return vmlinux
        return symtab.add(vmlinux, kallsyms.decode(vmlinux, elf.parse(vmlinux)))
    except ImageError as error:
        raise ImageError(f"kernel {shown(os.fsdecode(path))}: {error}") from error


def system_map(table: SymbolTable) -> str:
    """The symbols as lines of a System.map: address, kind, name."""
    return "\n".join(f"{symbol.address:016x} {symbol.kind} {symbol.name}" for symbol in table)


def _parse(data: bytes) -> list[Symbol]:
    vmlinux = _vmlinux(data)
    if vmlinux is None:
        return _parse_map(data)
    return symtab.read(vmlinux) or kallsyms.decode(vmlinux, elf.parse(vmlinux))


def _vmlinux(data: bytes) -> bytes | None:
    """The ELF file that `data` is or has in it, unpacked; None if it is something else."""
    if data[:4] == elf.MAGIC:
        return data
    if bzimage.is_bzimage(data):
        unpacked = bzimage.unpack(data, bzimage.parse(data))
    elif (packed := compression.detect(data)) is not None:
        unpacked = compression.unpack(data, packed)
    else:
        return None
    if unpacked[:4] != elf.MAGIC:
        raise ImageError("what is packed in it is not an ELF file; pass a vmlinux")
    return unpacked


def _parse_map(data: bytes) -> list[Symbol]:
    """The lines of a System.map or of /proc/kallsyms."""
    if b"real System.map is in" in data[:256]:  # Debian's linux-image packages
        package = data[:256].partition(b" is in the ")[2].partition(b" package")[0]
        where = package.decode("ascii", "replace")
        raise ImageError(
            f"it only says that the real System.map is in the package {shown(where)}; use the "
            "kernel image (vmlinuz) itself, which carries its symbols"
        )
    symbols: list[Symbol] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line)
        if found is None or number > _MAX_SYMBOLS:
            raise ImageError(
                f"line {number} is no symbol; use a System.map, a copy of /proc/kallsyms, an ELF "
                "file or a kernel"
            )
        address, kind, name = found.groups()
        text = name.decode("utf-8", "backslashreplace")
        symbols.append(Symbol(int(address, 16), text, kind.decode()))
    if symbols and not any(symbol.address for symbol in symbols):
        raise ImageError(
            "all its addresses are 0; copy /proc/kallsyms as root, after "
            "sysctl kernel.kptr_restrict=0"
        )
    return symbols


def _table(symbols: list[Symbol]) -> SymbolTable:
    """A table in which each name can be printed, and only places are places."""
    # In a kernel in the upper half of the address space, what is in the lower one is an offset in
    # a per-CPU area or another number, of which not all files tell that.
    upper = any(symbol.address >= _UPPER_HALF and symbol.is_code for symbol in symbols)
    return SymbolTable(_proper(symbol, upper=upper) for symbol in symbols)


def _proper(symbol: Symbol, *, upper: bool) -> Symbol:
    name = symbol.name if symbol.name.isprintable() else ascii(symbol.name)[1:-1]
    kind = "A" if upper and symbol.address < _UPPER_HALF else symbol.kind
    return symbol if (name, kind) == symbol[1:3] else symbol._replace(name=name, kind=kind)
