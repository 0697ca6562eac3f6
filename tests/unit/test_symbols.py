"""The table of symbols: which one an address is in, addresses of names, what begins so."""

import random

import pytest

from vmexit.core.symbols import MAX_DISTANCE, Symbol, SymbolTable

BASE = 0xFFFF_FFFF_8100_0000


def table() -> SymbolTable:
    return SymbolTable(
        [
            Symbol(BASE + 0x40, "panic"),
            Symbol(BASE, "_text"),
            Symbol(BASE, "_stext"),
            Symbol(BASE + 0x100, "sized", "t", 0x10),
            Symbol(BASE + 0x200, "twin", "t"),
            Symbol(BASE + 0x300, "twin", "t"),
            Symbol(0x4000, "percpu_counter", "A"),
        ]
    )


@pytest.mark.parametrize(
    ("offset", "found"),
    [
        (-1, None),
        (0, ("_text", 0)),  # of two the first
        (0x3F, ("_text", 0x3F)),
        (0x40, ("panic", 0)),
        (0x100, ("sized", 0)),
        (0x10F, ("sized", 0xF)),
        (0x110, None),  # behind its end
        (0x1FF, None),
        (0x2FF, ("twin", 0xFF)),
        (0x300 + MAX_DISTANCE - 1, ("twin", MAX_DISTANCE - 1)),
        (0x300 + MAX_DISTANCE, None),
    ],
)
def test_find_is_the_nearest_below_within_its_size(offset, found) -> None:
    assert table().find(BASE + offset) == found


def test_an_address_is_in_no_number() -> None:
    assert table().find(0x4000) is None and table().find(0x4001) is None
    assert table().address("percpu_counter") == 0x4000
    assert table().find((1 << 64) - 1) is None and table().find(1 << 64) is None


def test_addresses_of_names() -> None:
    assert table().address("panic") == BASE + 0x40
    assert table().address("twin") == BASE + 0x200
    assert table().address("pani") is None


def test_describe() -> None:
    assert table().describe(BASE + 0x52) == "panic+0x12"
    assert table().describe(BASE + 0x40) == "panic"
    assert table().describe(0x1000) == "0x1000"


def test_search() -> None:
    assert table().search("_") == ["_stext", "_text"]
    assert table().search("twin") == ["twin"]
    assert table().search("panic_") == [] and table().search("zz") == []
    assert len(table().search("")) == 6


def test_an_empty_table() -> None:
    empty = SymbolTable()
    assert not empty and empty.find(0) is None and empty.address("a") is None
    assert empty.search("") == [] and list(empty) == []


def test_symbols_come_out_by_address() -> None:
    symbols = [Symbol(n, f"s{n}", "d", n % 3) for n in range(100)]
    shuffled = symbols.copy()
    random.Random(1).shuffle(shuffled)
    assert list(SymbolTable(shuffled)) == symbols
    assert SymbolTable(shuffled).nearest(50) == symbols[50]
    assert not symbols[0].is_code and Symbol(0, "f").is_code
