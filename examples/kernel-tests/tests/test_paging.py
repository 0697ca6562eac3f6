"""paging.c, seen from both sides: what the kernel can access, and what its tables say."""

import pytest

VIRTUAL = 0x80_0000_0000
WRITE = 2
DEMAND = 0x40_0000_0000


@pytest.fixture
def page(kernel):
    return kernel.call("page_alloc")


def test_what_is_mapped_is_translated(kernel, page):
    assert kernel.vm.translate(VIRTUAL + 5) is None
    assert kernel.call_bool("map_page", VIRTUAL, page, WRITE)
    assert kernel.vm.translate(VIRTUAL + 5) == page + 5


def test_a_write_by_the_virtual_address_arrives_in_the_page(kernel, page):
    kernel.call("map_page", VIRTUAL, page, WRITE)
    kernel.call("memset", VIRTUAL + 100, 0x5A, 8)
    assert kernel.vm.memory.read(page + 100, 9) == b"\x5a" * 8 + b"\0"


@pytest.mark.parametrize(("virtual", "offset"), [(VIRTUAL, 1), (0x20_0000, 0)])
def test_what_cannot_be_mapped_is_refused(kernel, page, virtual, offset):
    """What is no page, and what is within a large page."""
    assert not kernel.call_bool("map_page", virtual, page + offset, WRITE)


def test_what_was_unmapped_cannot_be_accessed(kernel, page):
    kernel.call("map_page", VIRTUAL, page, WRITE)
    kernel.call("strlen", VIRTUAL)  # now the processor knows the page
    assert kernel.call_bool("unmap_page", VIRTUAL)
    assert kernel.vm.translate(VIRTUAL) is None
    assert f"page fault at {VIRTUAL:x}, error 0," in kernel.panic("strlen", VIRTUAL)


def test_a_page_that_is_read_only_can_be_read_and_not_written(kernel, page):
    kernel.call("map_page", VIRTUAL, page, 0)
    kernel.vm.memory.write(page, b"text\0")
    assert kernel.call("strlen", VIRTUAL) == 4
    assert f"page fault at {VIRTUAL:x}, error 3," in kernel.panic("memset", VIRTUAL, 0, 1)


def test_pages_appear_on_demand_once_each(kernel):
    free = kernel.call("pages_free_count")
    kernel.call("memset", DEMAND + 4090, 0x11, 12)
    assert kernel.variable("demand_count") == 2
    assert kernel.vm.read_virtual(DEMAND + 4090, 13) == b"\x11" * 12 + b"\0"
    assert (
        kernel.call("pages_free_count") == free - 2 - 2
    )  # two pages, and a table of each of two levels
