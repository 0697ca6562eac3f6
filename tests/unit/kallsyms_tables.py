"""Kallsyms tables as scripts/kallsyms.c of several Linux releases lays them out."""

import struct
from collections.abc import Sequence

from vmexit.boot import kallsyms
from vmexit.boot.elf import ElfKernel, ElfSegment
from vmexit.core.symbols import Symbol

BASE = 0xFFFF_FFFF_8100_0000

# Most bytes mean themselves, some mean more: as the kernel's build makes them.
MEANINGS = {0x80 + n: text for n, text in enumerate([b"Tsys_", b"t__", b"init", b"_do_", b"start"])}


def meaning(byte: int) -> bytes:
    """What a byte of a packed name stands for."""
    if byte in MEANINGS:
        return MEANINGS[byte]
    # What is not needed for itself has more tokens in real tables; they are just any text here.
    return bytes((byte,)) if 0x20 < byte < 0x7F else b"x%02x" % byte


def pack(text: bytes) -> bytes:
    """`text` in tokens, with its length in front (one byte below 128, else two: Linux 6.1)."""
    for byte, token in MEANINGS.items():
        text = text.replace(token, bytes((byte,)))
    length = len(text)
    head = bytes((length,)) if length < 128 else bytes((length & 0x7F | 0x80, length >> 7))
    return head + text


def tables(
    symbols: Sequence[Symbol],
    *,
    since_6_4: bool = False,
    relative: bool = True,
    absolute_percpu: bool = True,
    sequences: bool = False,
    marker: int = 4,
    word: int = 8,
    alignment: int | None = None,
    place_relative: bool = False,
    decoys: int = 0,
    before: bytes = b"\x90" * 64,
) -> bytes:
    """The tables, behind `before` and with more behind them.

    `decoys` are so many words behind the markers that could be markers, too.
    """
    alignment = alignment or word

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % alignment)

    def unsigned_long(value: int) -> bytes:
        return value.to_bytes(word, "little")

    base = min(s.address for s in symbols if s.kind != "A")
    if not relative:
        addresses = b"".join(unsigned_long(s.address) for s in symbols)
    else:
        offsets = b""
        for s in symbols:
            if not absolute_percpu:
                offsets += struct.pack("<I", s.address - base)
            else:
                offsets += struct.pack("<i", s.address if s.kind == "A" else base - 1 - s.address)
        addresses = padded(offsets) + unsigned_long(base)
    names, markers = b"", b""
    for number, symbol in enumerate(symbols):
        if number % 256 == 0:
            markers += len(names).to_bytes(marker, "little")
        names += pack((symbol.kind + symbol.name).encode())
    token_table, token_index = b"", b""
    for byte in range(256):
        token_index += struct.pack("<H", len(token_table))
        token_table += meaning(byte) + b"\0"
    order = sorted(range(len(symbols)), key=lambda n: symbols[n].name)
    seqs = b"".join(n.to_bytes(3, "big") for n in order) if sequences else b""
    for number in range(decoys):
        seqs += struct.pack("<I", len(names) + 1000 * (number + 1))
    counted = len(symbols).to_bytes(alignment, "little")
    middle = [counted, names, markers]
    tokens = [token_table, token_index]
    if place_relative:
        place = BASE + len(b"".join(map(padded, [before, *middle, *tokens])))
        addresses = b"".join(
            struct.pack("<i", s.address - place - 4 * n) for n, s in enumerate(symbols)
        )
    if since_6_4:
        parts = [*middle, *tokens, addresses, seqs]
    else:
        parts = [addresses, *middle, seqs, *tokens]
    return padded(before) + b"".join(map(padded, parts)) + b"\xcc" * 32


def some_symbols(count: int, base: int = BASE, percpu: int = 20) -> list[Symbol]:
    """Symbols of which the first are per-CPU offsets; names with and without tokens."""
    symbols = [Symbol(n * 64, f"percpu_{n}", "A") for n in range(percpu)]
    for n in range(count - percpu):
        name = ("sys_read", "__init", "do_start", "plain.cold")[n % 4] + str(n)
        symbols.append(Symbol(base + n // 3 * 48, name, "TtDb"[n % 4]))
    return symbols


def decode_kernel(data: bytes, bits: int = 64) -> list[Symbol]:
    """What `kallsyms.decode()` makes of a kernel whose file is all one segment at BASE."""
    segment = ElfSegment(0, BASE, 0x100_0000, len(data), len(data))
    return kallsyms.decode(data, ElfKernel(bits, 0, (segment,), None))
