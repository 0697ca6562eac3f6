"""pages.c and heap.c."""

PAGE = 4096
MEMORY = 16 << 20


def test_pages_are_aligned_and_differ(kernel):
    pages = [kernel.call("page_alloc") for _ in range(8)]
    assert len(set(pages)) == 8
    assert all(page % PAGE == 0 and kernel.address("kernel_end") <= page < MEMORY for page in pages)


def test_each_page_behind_the_kernel_is_free_at_first(kernel):
    free = (MEMORY - kernel.address("kernel_end")) // PAGE
    assert kernel.call("pages_free_count") == free
    kernel.call("page_alloc")
    assert kernel.call("pages_free_count") == free - 1


def test_a_page_can_be_freed_once_and_is_the_next_one_then(kernel):
    pages = [kernel.call("page_alloc") for _ in range(3)]
    free = kernel.call("pages_free_count")
    assert kernel.call_bool("page_free", pages[1])
    assert not kernel.call_bool("page_free", pages[1])
    assert kernel.call("pages_free_count") == free + 1
    assert kernel.call("page_alloc") == pages[1]


def test_what_is_no_page_of_the_allocator_is_refused(kernel):
    page = kernel.call("page_alloc")
    assert page == kernel.address("kernel_end")
    for wrong in (page + 1, page - PAGE, MEMORY):  # within it, of the kernel itself, none
        assert not kernel.call_bool("page_free", wrong)


def test_when_all_pages_are_taken_there_is_none_and_the_last_one_is_found(kernel):
    taken, last = kernel.address("taken"), MEMORY // PAGE - 1
    kernel.vm.memory.write(taken, b"\xff" * (last // 8) + b"\x7f")
    assert kernel.call("page_alloc") == last * PAGE
    assert kernel.call("page_alloc") == 0
    first = kernel.address("kernel_end")
    assert kernel.call_bool("page_free", first)
    assert kernel.call("page_alloc") == first


def test_blocks_of_the_heap_do_not_overlap(kernel):
    sizes = [1, 16, 17, 100, 1000]
    blocks = [kernel.call("heap_alloc", size) for size in sizes]
    assert all(block % 16 == 0 for block in blocks)
    for (a, size), b in zip(zip(blocks, sizes, strict=True), blocks[1:], strict=False):
        assert a + size <= b
    assert kernel.call("heap_used") == sum(-(-size // 16) * 16 for size in sizes)


def test_free_neighbours_become_one_block(kernel):
    blocks = [kernel.call("heap_alloc", 20 << 10) for _ in range(3)]
    assert kernel.call("heap_alloc", 20 << 10) == 0
    for n in (2, 0, 1):
        kernel.call("heap_free", blocks[n])
    assert kernel.call("heap_alloc", 60 << 10) == blocks[0]


def test_the_heap_panics_at_what_was_freed_already(kernel):
    block = kernel.call("heap_alloc", 64)
    kernel.call("heap_free", block)
    assert kernel.panic("heap_free", block) == f"heap_free of {block:x}, which is not allocated"
