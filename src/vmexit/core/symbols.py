"""Names for addresses: what is where in a kernel, for reports, debuggers and traces."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# How far behind a symbol of unknown size an address still belongs to it. Functions are shorter,
# and so are nearly all tables of a kernel.
MAX_DISTANCE = 1 << 20

_CODE = frozenset("tTwWiu")
_NO_PLACE = frozenset("aAU")


class Symbol(NamedTuple):
    """A name for an address. `size` is in bytes, 0 where it is not known.

    `kind` is the letter of nm(1): `t` code, `d` data, `r` constants, `b` what is zero at first,
    `w` and `v` what is weak, in upper case what other files can see. `A` is a number, not a place
    (an offset in a per-CPU area, for one), so no address is in it.
    """

    address: int
    name: str
    kind: str = "T"
    size: int = 0

    @property
    def is_code(self) -> bool:
        """Whether it names a function, or a label in code."""
        return self.kind in _CODE


class SymbolTable:
    """Symbols by address and by name; immutable.

    >>> table = SymbolTable([Symbol(0x1000, "start", size=0x20), Symbol(0x1020, "end")])
    >>> table.describe(0x1002)
    'start+0x2'
    >>> table.address("end") == 0x1020
    True
    """

    __slots__ = ("_addresses", "_by_name", "_kinds", "_names", "_places", "_sizes", "_sorted")

    def __init__(self, symbols: Iterable[Symbol] = ()) -> None:
        """Of several symbols with one address the first one counts, as with several of one name."""
        ordered = sorted(symbols, key=lambda symbol: symbol.address)  # stable
        # A list for each field: a hundred thousand tuples would take three times the memory.
        self._addresses = array("Q", (symbol.address for symbol in ordered))
        self._sizes = array("Q", (symbol.size for symbol in ordered))
        self._names = [symbol.name for symbol in ordered]
        self._kinds = "".join(symbol.kind[:1] or "?" for symbol in ordered)
        self._places: tuple[array[int], array[int]] | None = None
        self._by_name: dict[str, int] = {}
        self._sorted: list[str] = []

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Symbol]:
        """All symbols, by address."""
        for fields in zip(self._addresses, self._names, self._kinds, self._sizes, strict=True):
            yield Symbol(*fields)

    def __repr__(self) -> str:
        return f"<SymbolTable of {len(self)}>"

    def nearest(self, address: int) -> Symbol | None:
        """The symbol that `address` is in: the nearest one at or below it.

        None if there is none, if it ends before `address`, or, where its size is not known, if it
        begins more than `MAX_DISTANCE` bytes before.
        """
        starts, indices = self._index()
        at = bisect_right(starts, address) - 1
        if at < 0:
            return None
        index = indices[at]
        symbol = Symbol(
            self._addresses[index], self._names[index], self._kinds[index], self._sizes[index]
        )
        reach = symbol.size or MAX_DISTANCE
        return symbol if address - symbol.address < reach else None

    def find(self, address: int) -> tuple[str, int] | None:
        """The name of what `address` is in, and the offset in that; None as for `nearest()`."""
        symbol = self.nearest(address)
        return None if symbol is None else (symbol.name, address - symbol.address)

    def address(self, name: str) -> int | None:
        """The address of the symbol `name`; None if there is none."""
        index = self._names_index().get(name)
        return None if index is None else self._addresses[index]

    def describe(self, address: int) -> str:
        """`address` for people: `start_kernel+0x12`, or `0xffffffff81000012` without a symbol."""
        found = self.find(address)
        if found is None:
            return f"{address:#x}"
        name, offset = found
        return f"{name}+{offset:#x}" if offset else name

    def search(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, in order, each once."""
        if not self._sorted:
            self._sorted = sorted(self._names_index())
        first = bisect_left(self._sorted, prefix)
        last = bisect_right(self._sorted, prefix, lo=first, key=lambda name: name[: len(prefix)])
        return self._sorted[first:last]

    def _index(self) -> "tuple[array[int], array[int]]":
        """Each address that has a symbol, in order, and the index of its first one."""
        if self._places is None:
            starts, indices = array("Q"), array("L")
            previous = -1
            for index, address in enumerate(self._addresses):
                if address != previous and self._kinds[index] not in _NO_PLACE:
                    starts.append(address)
                    indices.append(index)
                    previous = address
            self._places = starts, indices
        return self._places

    def _names_index(self) -> dict[str, int]:
        if not self._by_name:
            # From the last to the first, which so is the one that stays.
            backwards = range(len(self._names) - 1, -1, -1)
            self._by_name = {self._names[index]: index for index in backwards}
        return self._by_name
