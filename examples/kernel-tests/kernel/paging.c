/* Pages of 4 KiB above the first GiB, which boot.S has mapped to itself. */
#include "kernel.h"

#define PRESENT 1ul
#define LARGE 0x80ul
#define ADDRESS 0x000ffffffffff000ul

extern uint64_t boot_pml4[];
uint64_t demand_count;

/* The entry for a page; NULL if there is no table for it, or if it is within a large page. */
static uint64_t *entry_of(uint64_t virtual, bool make)
{
    uint64_t *table = boot_pml4;
    for (int shift = 39; shift > 12; shift -= 9) {
        uint64_t *entry = &table[virtual >> shift & 511];
        if (*entry & PRESENT && *entry & LARGE)
            return NULL;
        if (!(*entry & PRESENT)) {
            void *page = make ? page_alloc() : NULL;
            if (!page)
                return NULL;
            memset(page, 0, PAGE);
            *entry = (uint64_t)page | PRESENT | MAP_WRITE;
        }
        table = (uint64_t *)(*entry & ADDRESS);
    }
    return &table[virtual >> 12 & 511];
}

bool map_page(uint64_t virtual, uint64_t physical, uint64_t flags)
{
    if (virtual % PAGE || physical % PAGE)
        return false;
    uint64_t *entry = entry_of(virtual, true);
    if (!entry || *entry & PRESENT)
        return false;
    *entry = physical | PRESENT | (flags & MAP_WRITE);
    return true;
}

bool unmap_page(uint64_t virtual)
{
    uint64_t *entry = entry_of(virtual, false);
    if (!entry || !(*entry & PRESENT))
        return false;
    *entry = 0;
    __asm__ volatile("invlpg (%0)" : : "r"(virtual) : "memory");
    return true;
}

bool page_fault(uint64_t address, uint64_t error)
{
    if (error & PRESENT || address < DEMAND_START || address >= DEMAND_END)
        return false;
    void *page = page_alloc();
    if (!page)
        return false;
    memset(page, 0, PAGE);
    if (!map_page(address & ~(PAGE - 1), (uint64_t)page, MAP_WRITE)) {
        page_free(page);
        return false;
    }
    demand_count++;
    return true;
}
