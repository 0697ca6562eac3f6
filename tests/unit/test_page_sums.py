"""The software CPU's dirty log: pages that have changed since the last look."""

import pytest

from vmexit.accel.soft import page_sums
from vmexit.accel.soft.page_sums import PageSums
from vmexit.core.memory import PAGE_SIZE, GuestMemory


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 64 * PAGE_SIZE), (1 << 32, 20 * PAGE_SIZE)])
    yield memory
    memory.close()


def pages(bitmap: bytes) -> list[int]:
    return [n for n in range(8 * len(bitmap)) if bitmap[n >> 3] >> (n & 7) & 1]


def test_only_what_has_changed_since_the_last_look_is_told(memory) -> None:
    low, high = memory.regions
    memory.write_u8(5 * PAGE_SIZE, 1)
    sums = PageSums(memory)
    assert pages(sums.changed(low)) == []
    memory.write_u8(5 * PAGE_SIZE + 7, 2)
    memory.write_u8(63 * PAGE_SIZE, 3)
    memory.write_u8((1 << 32) + 19 * PAGE_SIZE, 4)
    assert pages(sums.changed(low)) == [5, 63]
    assert pages(sums.changed(high)) == [19]
    assert pages(sums.changed(low)) == pages(sums.changed(high)) == []


def test_pages_that_were_never_written_cost_nothing(memory, monkeypatch) -> None:
    memory.write_u8(9 * PAGE_SIZE, 1)
    sums = PageSums(memory)
    looked: list[int] = []
    monkeypatch.setattr(page_sums.zlib, "crc32", lambda data: looked.append(len(data)) or 0)
    sums.changed(memory.regions[0])
    assert looked == [PAGE_SIZE]


def test_a_page_of_zeros_that_is_new_has_not_changed(memory) -> None:
    sums = PageSums(memory)
    memory.write(3 * PAGE_SIZE, bytes(PAGE_SIZE))
    assert pages(sums.changed(memory.regions[0])) == []


def test_what_a_look_costs_is_bounded(memory, monkeypatch) -> None:
    monkeypatch.setattr(page_sums, "_MOST_PAGES", 3)
    sums = PageSums(memory)
    for page in (0, 1, 10, 11, 12):
        memory.write_u8(page * PAGE_SIZE, 1)
    assert pages(sums.changed(memory.regions[0])) == [0, 1, 10]
