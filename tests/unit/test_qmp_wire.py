"""Where a JSON value ends in a stream, and what is none: whatever comes, in whatever pieces."""

import json
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.control.qmp.wire import MAX_DEPTH, MAX_MESSAGE, Malformed, MessageReader, encode

texts = st.text(max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab{[\"\\\n]}'é", max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=3)


def read(*pieces: bytes) -> list:
    reader = MessageReader()
    return [message for piece in pieces for message in reader.feed(piece)]


def reason(message) -> str:
    assert isinstance(message, Malformed), message
    return message.reason


@given(st.lists(objects | st.lists(values, max_size=3), max_size=4), st.data())
def test_values_are_found_however_they_are_cut(messages, data):
    text = b""
    for message in messages:
        indent = data.draw(st.sampled_from([None, 1]))
        ascii_only = data.draw(st.booleans())
        text += json.dumps(message, indent=indent, ensure_ascii=ascii_only).encode()
        text += data.draw(st.sampled_from([b"", b"\n", b"\r\n \t"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(*pieces) == messages


@given(objects)
def test_what_is_encoded_is_one_line_of_ascii(value):
    line = encode(value)
    assert line.endswith(b"\r\n") and line.isascii()
    assert not set(line[:-2]) & set(b"\r\n")
    assert read(line) == [value]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"garbage", "stray 'g'"),
        (b"3", "stray '3'"),
        (b'"text"', "stray"),
        (b"]", "stray ']'"),
        (b"\xff\xfe", "stray byte 0xff"),
        (b"\x00", "stray byte 0x00"),
        (b'{"a":\x01}', "stray byte 0x01"),
        (b'{"a":"\x00"}', "stray byte 0x00"),
        (b'{"a":\xff}', "stray byte 0xff"),
        (b'{"a":"\xff"}', "UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "UTF-8"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"a":"\\x"}', "escape"),
        (b'{"a":1,"a":2}', "duplicate key"),
        (b'{"a":{"b":1,"b":1}}', "duplicate key"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":1e999}', "out of range"),
        (b'{"a":' + b"9" * 5000 + b"}", "out of range"),
        (b"{]", "property name"),
        (b"[}", "Expecting value"),
        (b'{"a":1,}', "property name"),
        (b"{'a':1}", "property name"),
        (b'{"a" 1}', "delimiter"),
        (b"[" * (MAX_DEPTH + 1), "nested"),
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'["' + b"x" * MAX_MESSAGE + b'"]', "longer"),
        (b'["' + b"\\\\" * MAX_MESSAGE, "longer"),
        (b"[" + b" " * MAX_MESSAGE + b"]", "longer"),
        (b'{"a":"b', "stray byte 0x0a"),
    ],
)
def test_after_what_is_no_message_the_next_line_is_read(line, why):
    stream = line + b'\n{"next":1}\n'
    for size in (len(stream), 7 if len(stream) < 10_000 else 40_009):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        first, *rest = read(*pieces)
        assert why in reason(first)
        assert rest == [{"next": 1}]


def test_as_deep_and_as_long_as_may_be():
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert read(deep) == [json.loads(deep)]
    long = b'["' + b"x" * (MAX_MESSAGE - 4) + b'"]'
    assert len(long) == MAX_MESSAGE and read(long) == [json.loads(long)]


@pytest.mark.parametrize("byte", [b"x", b"{", b'"', b"\\", b"\xff", b" ", b"["])
def test_memory_is_bounded(byte):
    reader = MessageReader()
    tracemalloc.start()
    try:
        for start in (b"", b'{"'):
            for _ in range(64):
                for _ in reader.feed(start + byte * (1 << 16)):
                    pass
                start = b""
            _, peak = tracemalloc.get_traced_memory()
        assert peak < 8 * MAX_MESSAGE
    finally:
        tracemalloc.stop()
    assert list(reader.feed(b'\n"]}\n{"next":1}\n'))[-1] == {"next": 1}


@given(st.binary())
def test_any_bytes_are_taken(data):
    read(data, b'\n"]}\n{"next":1}')


def test_random_mixtures_end():
    dice = random.Random(1)
    words = [b'{"', b'":', b"1", b"}", b"]", b"[", b"\\", b"\n", b" ", b"\xff", b"\x00", b"x,"]
    for _ in range(2000):
        reader = MessageReader()
        for _ in range(dice.randrange(20)):
            list(reader.feed(b"".join(dice.choices(words, k=dice.randrange(8)))))
