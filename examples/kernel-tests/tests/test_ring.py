"""ring.c: the ring is made by the test."""

import struct

import pytest

SIZE = 64


@pytest.fixture
def ring(kernel):
    return kernel.room(8 + SIZE)


def put(kernel, ring, data):
    return [kernel.call_bool("ring_put", ring, byte) for byte in data]


def get(kernel, ring, count):
    return [kernel.call_int("ring_get", ring) for _ in range(count)]


def test_bytes_come_out_in_their_order_and_then_there_is_none(kernel, ring):
    put(kernel, ring, b"a\xff\0")
    assert kernel.call_int("ring_count", ring) == 3
    assert get(kernel, ring, 2) == [ord("a"), 0xFF]
    assert kernel.call_int("ring_count", ring) == 1
    assert get(kernel, ring, 2) == [0, -1]


def test_a_full_ring_takes_no_more_and_loses_nothing(kernel, ring):
    kernel.vm.memory.write(ring, struct.pack("<II", SIZE, 0) + bytes(range(SIZE)))
    assert put(kernel, ring, b"x") == [False]
    assert get(kernel, ring, 2) == [0, 1]
    assert put(kernel, ring, b"xyz") == [True, True, False]


def test_it_goes_on_where_its_counters_wrap_around(kernel, ring):
    kernel.vm.memory.write(ring, struct.pack("<II", 0xFFFF_FFFF, 0xFFFF_FFFF))
    assert put(kernel, ring, b"ab") == [True, True]
    assert kernel.vm.memory.read_u32(ring) == 1
    assert get(kernel, ring, 3) == [ord("a"), ord("b"), -1]
