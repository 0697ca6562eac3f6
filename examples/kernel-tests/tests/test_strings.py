"""string.c: functions called one at a time, with arguments that the test has put into memory."""

import pytest

BYTES = bytes(range(64))


def test_memset_writes_just_its_bytes(kernel):
    at = kernel.put(BYTES)
    assert kernel.call("memset", at + 8, 0xAA, 5) == at + 8
    assert kernel.vm.memory.read(at, 64) == BYTES[:8] + b"\xaa" * 5 + BYTES[13:]


@pytest.mark.parametrize(("source", "target"), [(0, 10), (10, 0)])
def test_memmove_copies_ranges_that_overlap(kernel, source, target):
    at = kernel.put(BYTES)
    kernel.call("memmove", at + target, at + source, 32)
    wanted = bytearray(BYTES)
    wanted[target : target + 32] = BYTES[source : source + 32]
    assert kernel.vm.memory.read(at, 64) == wanted


def test_memcmp_tells_which_is_less_by_unsigned_bytes(kernel):
    low, high = kernel.put(b"same\x01"), kernel.put(b"same\xff")
    assert kernel.call_int("memcmp", low, high, 5) < 0
    assert kernel.call_int("memcmp", high, low, 5) > 0
    assert kernel.call_int("memcmp", low, high, 4) == 0


def test_strcmp_and_strlen_stop_at_the_zero(kernel):
    short, long = kernel.put("page"), kernel.put("pages")
    assert kernel.call("strlen", long) == 5
    assert kernel.call_int("strcmp", short, long) < 0 < kernel.call_int("strcmp", long, short)
    assert kernel.call_int("strcmp", short, kernel.put("page")) == 0


@pytest.mark.parametrize(
    ("text", "size", "value"),
    [("4096 rest", 4, 4096), ("0xfeeDface", 10, 0xFEEDFACE), ("0x", 0, None)],
)
def test_parse_number(kernel, text, size, value):
    into = kernel.put(b"\xee" * 8)
    assert kernel.call("parse_number", kernel.put(text), into) == size
    wanted = 0xEEEE_EEEE_EEEE_EEEE if value is None else value
    assert kernel.vm.memory.read_u64(into) == wanted


@pytest.mark.parametrize(
    ("pattern", "value", "text"),
    [
        ("%d|", -(10**12), "-1000000000000|"),
        ("100%% %x", 0xDEADBEEF, "100% deadbeef"),
    ],
)
def test_format(kernel, pattern, value, text):
    into = kernel.room(64)
    assert kernel.call("format", into, 64, kernel.put(pattern), value) == len(text)
    assert kernel.text(into) == text


def test_format_cuts_what_does_not_fit_and_tells_how_long_it_was(kernel):
    into = kernel.put(b"\xee" * 16)
    assert kernel.call("format", into, 8, kernel.put("a long %s"), kernel.put("text")) == 11
    assert kernel.vm.memory.read(into, 9) == b"a long \0\xee"
