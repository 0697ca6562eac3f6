/* First fit in a list of blocks, in the order of their addresses; free neighbours become one. */
#include "kernel.h"

struct block {
    struct block *next;
    size_t size; /* behind the header */
    bool used;
} __attribute__((aligned(16)));

static char arena[64 << 10] __attribute__((aligned(16)));
static struct block *first;

void *heap_alloc(size_t size)
{
    if (!first) {
        first = (struct block *)arena;
        first->size = sizeof arena - sizeof *first;
    }
    if (!size || size > sizeof arena)
        return NULL;
    size = (size + 15) & ~15ul;
    for (struct block *block = first; block; block = block->next) {
        if (block->used || block->size < size)
            continue;
        if (block->size >= size + sizeof *block + 16) {
            struct block *rest = (struct block *)((char *)(block + 1) + size);
            rest->next = block->next;
            rest->size = block->size - size - sizeof *block;
            rest->used = false;
            block->next = rest;
            block->size = size;
        }
        block->used = true;
        return block + 1;
    }
    return NULL;
}

void heap_free(void *memory)
{
    if (!memory)
        return;
    struct block *freed = (struct block *)memory - 1;
    if ((char *)freed < arena || (char *)memory >= arena + sizeof arena || !freed->used)
        panic("heap_free of %x, which is not allocated", (uint64_t)memory);
    freed->used = false;
    for (struct block *block = first; block; block = block->next)
        while (!block->used && block->next && !block->next->used) {
            block->size += sizeof *block + block->next->size;
            block->next = block->next->next;
        }
}

uint64_t heap_used(void)
{
    uint64_t used = 0;
    for (struct block *block = first; block; block = block->next)
        if (block->used)
            used += block->size;
    return used;
}
