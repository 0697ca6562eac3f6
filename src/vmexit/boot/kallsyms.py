"""The symbols that a Linux kernel carries for itself (CONFIG_KALLSYMS), from its vmlinux.

A stripped vmlinux does not say where they are, but their shape tells: scripts/kallsyms.c writes
tables one behind the other. Up to Linux 6.3 these are

    offsets, relative_base | addresses; num_syms, names, markers, seqs_of_names (from 6.2 on),
    token_table, token_index

and from 6.4 on num_syms comes first, and what stands before it here follows token_index. In 7.3
there is no relative_base: an offset counts from the place where it stands itself. Each table was
aligned to a word, and in 7.3 is to 4 bytes. Names are made of tokens; `token_table` has what each
of the 256 bytes means. Those that are needed for themselves mean that, and of them the ten digits
are easy to find.
"""

import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import NamedTuple

from vmexit.boot.elf import ElfKernel
from vmexit.core.errors import ImageError
from vmexit.core.symbols import Symbol

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_TOKENS = 256
_NAMES_PER_MARKER = 256
# Bounds for a hostile file: Debian's kernels have 160,000 symbols with 4 MB of names; a name has
# at most 512 bytes (KSYM_NAME_LEN), the tokens 64 KiB in all, since their index has 16 bits.
_MAX_SYMBOLS = 1 << 21
_MAX_MARKERS = _MAX_SYMBOLS // _NAMES_PER_MARKER
_MAX_NAME = 512
_MAX_TEXT = 64 << 20
_MAX_TOKENS = 1 << 16
# So many things that look like a table are looked into, and so many like names are unpacked.
_MAX_TABLES, _MAX_WALKS = 8, 4
# How many bytes lie between two markers: a name has a byte or two for its length, then its own.
_MIN_STEP, _MAX_STEP = _NAMES_PER_MARKER * 2, _NAMES_PER_MARKER * (_MAX_NAME + 2)


class _Tokens(NamedTuple):
    """What each byte of a packed name means, and the range of both tables in the file."""

    meanings: Sequence[bytes]
    place: range


class _Names(NamedTuple):
    """The names, with the letter of its kind before each, and the offset of num_syms."""

    names: Sequence[bytes]
    count_at: int


def decode(vmlinux: bytes, kernel: ElfKernel) -> list[Symbol]:
    """The symbols of an unpacked kernel, whose headers `kernel` has, in the kernel's own order.

    For Linux 4.19 and later. Raises ImageError if it has no such tables, as one that is built
    without CONFIG_KALLSYMS, or if they are damaged.
    """
    word = kernel.bits // 8
    for alignment in sorted({word, 4}, reverse=True):
        for tokens in islice(_find_tokens(vmlinux, alignment), 2):
            names = _find_names(vmlinux, tokens, alignment, word)
            if names is None:
                continue
            addresses = _find_addresses(vmlinux, kernel, tokens, names, alignment)
            if addresses is not None:
                return [
                    Symbol(address, name[1:].decode("utf-8", "backslashreplace"), chr(name[0]))
                    for address, name in zip(addresses, names.names, strict=True)
                ]
    raise ImageError(
        "the kernel carries no symbols that could be read (kallsyms); use its System.map, or a "
        "vmlinux with a symbol table"
    )


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _find_tokens(data: bytes, alignment: int) -> Iterator[_Tokens]:
    at = -1
    for _ in range(_MAX_TABLES):
        at = data.find(_DIGITS, at + 1)
        if at < 0:
            return
        # The tokens from "0" on, then the index of all: that says where the first one is.
        rest = data[at : at + _MAX_TOKENS].split(b"\0", _TOKENS - ord("0"))[:-1]
        if len(rest) < _TOKENS - ord("0"):
            continue
        end = at + sum(map(len, rest)) + len(rest)
        index_at = _aligned(end, alignment)
        raw = data[index_at : index_at + 2 * _TOKENS]
        if len(raw) < 2 * _TOKENS:
            continue
        index = struct.unpack(f"<{_TOKENS}H", raw)
        start = at - index[ord("0")]
        if index[0] or start < 0 or any(b <= a for a, b in pairwise(index)):
            continue
        ends = [*index[1:], end - start]
        meanings = [data[start + a : start + b - 1] for a, b in zip(index, ends, strict=True)]
        if any(b"\0" in text or len(text) > _MAX_NAME for text in meanings):
            continue
        yield _Tokens(meanings, range(start, index_at + 2 * _TOKENS))


def _find_names(data: bytes, tokens: _Tokens, alignment: int, word: int) -> _Names | None:
    """The names before `tokens`: found by the markers, which say where each 256th name is."""
    candidates = _find_candidates(data, tokens.place.start, alignment, word)
    for at, markers, count_at, count in islice(candidates, _MAX_WALKS):
        stop, names = _unpack(data, count_at + alignment, count, markers, tokens)
        if _aligned(stop, alignment) == at:
            return _Names(names, count_at)
    return None


def _find_candidates(
    data: bytes, end: int, alignment: int, word: int
) -> Iterator[tuple[int, Sequence[int], int, int]]:
    """Where markers may be, and what they are; where num_syms may be, and what it is."""
    # A marker is an int, up to Linux 4.19 an unsigned long.
    found = (islice(_find_markers(data, end, size), _MAX_TABLES) for size in (4, word))
    for at, markers in chain.from_iterable(found):
        # The words behind the markers may look like more of them.
        for known in range(len(markers), max(len(markers) - 3, 0), -1):
            for count_at, count in _find_counts(data, at - markers[known - 1], known, alignment):
                yield at, markers, count_at, count


def _find_markers(data: bytes, end: int, size: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Where markers of `size` bytes may begin before `end`, the last place first: 0, then more."""
    # seqs_of_names, which may be between, has 3 bytes for each name.
    start = max(0, end - 3 * _MAX_SYMBOLS - size * _MAX_MARKERS)
    start += (end - start) % 4
    words = memoryview(data)[start:end].cast("I")
    step = size // 4
    for index in range(len(words) - step - 1, -1, -1):
        if words[index] or not _MIN_STEP <= words[index + step] <= _MAX_STEP:
            continue
        markers = [0]
        for value in words[index + step : index + step * _MAX_MARKERS : step]:
            if not _MIN_STEP <= value - markers[-1] <= _MAX_STEP:
                break
            markers.append(value)
        yield start + 4 * index, markers


def _find_counts(data: bytes, last: int, markers: int, size: int) -> Iterator[tuple[int, int]]:
    """Where num_syms may be, and its value, if the last marked name is `last` bytes behind it.

    With what fills it up it has `size` bytes.
    """
    most = _NAMES_PER_MARKER * markers
    for at in range(last // size * size - size, max(last - _MAX_STEP - 2 * size, -1), -size):
        count = int.from_bytes(data[at : at + size], "little")
        if most - _NAMES_PER_MARKER < count <= most:
            yield at, count


def _unpack(
    data: bytes, at: int, count: int, markers: Sequence[int], tokens: _Tokens
) -> tuple[int, Sequence[bytes]]:
    """The end of the `count` names that begin at `at`, and the names; fewer if they are none."""
    meaning = tokens.meanings.__getitem__
    start, room = at, _MAX_TEXT
    names: list[bytes] = []
    try:
        for number in range(count):
            if (
                not number % _NAMES_PER_MARKER
                and at - start != markers[number // _NAMES_PER_MARKER]
            ):
                break
            length = data[at]
            at += 1
            if length & 0x80:  # from Linux 6.1 on
                length = length & 0x7F | data[at] << 7
                at += 1
            name = b"".join(map(meaning, data[at : at + length]))
            at += length
            room -= len(name)
            if not 1 < len(name) <= _MAX_NAME or room < 0:
                break
            names.append(name)
    except IndexError:
        pass
    return (at if len(names) == count else -1), names


def _find_addresses(
    data: bytes, kernel: ElfKernel, tokens: _Tokens, names: _Names, alignment: int
) -> Sequence[int] | None:
    """The addresses of the symbols; None if they are at no place where they may be."""
    word = kernel.bits // 8
    count = len(names.names)
    size = _aligned(4 * count, alignment)
    behind = _aligned(tokens.place.stop, alignment)
    before = names.count_at - word - size
    for at in (behind, before):
        base = int.from_bytes(data[max(at + size, 0) : max(at + size + word, 0)], "little")
        offsets = _array("i", data, at, count)
        if offsets is not None and base:
            addresses = _from_base(offsets, base)
            if _plausible(addresses, word):
                return addresses
    offsets = _array("i", data, behind, count)
    place = kernel.virtual_address(behind)
    if offsets is not None and place is not None:
        addresses = [place + 4 * n + offset for n, offset in enumerate(offsets)]
        if _plausible(addresses, word):
            return addresses
    for at in (behind, names.count_at - word * count):
        values = _array("Q" if word == 8 else "I", data, at, count)
        if values is not None and _plausible(values, word):
            return values
    return None


def _from_base(offsets: Sequence[int], base: int) -> Sequence[int]:
    """CONFIG_KALLSYMS_BASE_RELATIVE."""
    if min(offsets) < 0:  # CONFIG_KALLSYMS_ABSOLUTE_PERCPU: what is not negative is no offset
        return [offset if offset >= 0 else base - 1 - offset for offset in offsets]
    return [base + offset for offset in offsets]


def _array(code: str, data: bytes, at: int, count: int) -> "array[int] | None":
    values = array(code)
    raw = data[max(at, 0) : max(at, 0) + values.itemsize * count]
    if at < 0 or len(raw) != values.itemsize * count:
        return None
    values.frombytes(raw)
    return values


def _plausible(addresses: Sequence[int], word: int) -> bool:
    """They are sorted, have a word at most, and are not all the same, as zeros are."""
    first, last = addresses[0], addresses[-1]
    if not 0 <= first < last < 1 << 8 * word:
        return False
    return all(a <= b for a, b in pairwise(addresses))
