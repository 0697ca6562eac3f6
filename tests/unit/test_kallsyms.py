"""A kernel's own symbol tables, in the layouts of Linux 4.19 and later; and damaged ones."""

import random

import pytest
from kallsyms_tables import BASE, decode_kernel, some_symbols, tables

from vmexit.core.errors import ImageError
from vmexit.core.symbols import Symbol

LAYOUTS = {
    "4.19": {"marker": 8},
    "4.20": {},
    "5.10 without SMP": {"absolute_percpu": False},
    "5.10 with whole addresses": {"relative": False},
    "6.2": {"sequences": True},
    "6.4": {"since_6_4": True, "sequences": True},
    "6.10 with whole addresses": {"since_6_4": True, "relative": False, "sequences": True},
    "6.15": {"since_6_4": True, "sequences": True, "absolute_percpu": False},
    "7.3": {
        "since_6_4": True,
        "sequences": True,
        "absolute_percpu": False,
        "alignment": 4,
        "place_relative": True,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [300, 1023, 1024, 1025, 5000])
def test_each_layout_gives_back_what_was_put_in(layout, count) -> None:
    options = LAYOUTS[layout]
    percpu = 20 if options.get("absolute_percpu", True) else 0
    symbols = some_symbols(count, percpu=percpu)
    assert decode_kernel(tables(symbols, **options)) == symbols


@pytest.mark.parametrize("layout", ["4.20", "6.2", "6.4"])
def test_a_32_bit_kernel(layout) -> None:
    symbols = some_symbols(1500, base=0xC100_0000)
    assert decode_kernel(tables(symbols, word=4, **LAYOUTS[layout]), bits=32) == symbols


def test_names_of_more_than_127_bytes() -> None:
    symbols = some_symbols(1000)
    symbols.append(Symbol(BASE + 0x10_0000, "rust_" + "q" * 400, "T"))
    symbols.append(Symbol(BASE + 0x10_0010, "z" * 126, "T"))  # with its kind just 127
    symbols.append(Symbol(BASE + 0x10_0020, "z" * 127, "T"))
    assert decode_kernel(tables(symbols, since_6_4=True)) == symbols


@pytest.mark.parametrize("decoys", [1, 2])
def test_words_behind_the_markers_that_look_like_more_of_them(decoys) -> None:
    symbols = some_symbols(1000)  # 4 markers, so that nothing is between
    assert decode_kernel(tables(symbols, decoys=decoys)) == symbols


def test_other_things_before_the_tables_that_look_like_their_beginning() -> None:
    symbols = some_symbols(1000)
    digits = b"".join(b"%d\0" % n for n in range(10))
    assert decode_kernel(tables(symbols, before=digits * 3 + bytes(4096))) == symbols


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(1 << 16),
        b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00",
        b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00" * 100_000,
        b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00" + b"\0" * 4096,
        b"\xff" * 4096,
    ],
)
def test_a_kernel_without_symbols_is_refused_with_what_to_do(data) -> None:
    with pytest.raises(ImageError, match=r"carries no symbols.*; use its System\.map"):
        decode_kernel(data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_ends_early_is_refused(layout) -> None:
    options = LAYOUTS[layout]
    percpu = 20 if options.get("absolute_percpu", True) else 0
    data = tables(some_symbols(600, percpu=percpu), **options)
    for end in range(0, len(data) - 4096, 997):
        with pytest.raises(ImageError):
            decode_kernel(data[:end])


@pytest.mark.parametrize("layout", ["4.19", "6.2", "6.4"])
def test_damage_gives_symbols_or_an_error_and_nothing_else(layout) -> None:
    random_ = random.Random(layout)
    good = tables(some_symbols(700), **LAYOUTS[layout])
    for _ in range(150):
        data = bytearray(good)
        for _ in range(random_.randint(1, 8)):
            at = random_.randrange(len(data) - 8)
            size = random_.choice((1, 2, 4, 8))
            data[at : at + size] = random_.choice(
                (bytes(size), b"\xff" * size, random_.randbytes(size))
            )
        try:
            symbols = decode_kernel(bytes(data))
        except ImageError:
            continue
        assert all(0 <= s.address < 1 << 64 and len(s.name) <= 4 * 512 for s in symbols)
