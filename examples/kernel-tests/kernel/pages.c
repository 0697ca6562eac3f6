/* A bit for each page of memory: 1 if it is taken. */
#include "kernel.h"

#define COUNT (MEMORY_END / PAGE)

extern char kernel_end[];
static uint64_t taken[COUNT / 64];
static uint64_t free_pages, first_page, look_from;

void pages_init(void)
{
    first_page = (uint64_t)kernel_end / PAGE;
    free_pages = COUNT - first_page;
    look_from = first_page / 64;
    for (uint64_t page = 0; page < first_page; page++)
        taken[page / 64] |= 1ul << page % 64;
}

void *page_alloc(void)
{
    const uint64_t flags = interrupts_off();
    void *page = NULL;
    for (uint64_t word = look_from; word < COUNT / 64 && !page; word++) {
        if (taken[word] == ~0ul)
            continue;
        const unsigned bit = (unsigned)__builtin_ctzl(~taken[word]);
        taken[word] |= 1ul << bit;
        free_pages--;
        look_from = word;
        page = (void *)((word * 64 + bit) * PAGE);
    }
    interrupts_restore(flags);
    return page;
}

bool page_free(void *page)
{
    const uint64_t number = (uint64_t)page / PAGE;
    if ((uint64_t)page % PAGE || number < first_page || number >= COUNT)
        return false;
    const uint64_t flags = interrupts_off(), bit = 1ul << number % 64;
    const bool was = taken[number / 64] & bit;
    if (was) {
        taken[number / 64] &= ~bit;
        free_pages++;
        if (number / 64 < look_from)
            look_from = number / 64;
    }
    interrupts_restore(flags);
    return was;
}

uint64_t pages_free_count(void)
{
    return free_pages;
}
