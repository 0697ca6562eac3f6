/* What the parts of the kernel offer each other. */
#pragma once

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cpu: what C has no words for */
static inline void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint64_t interrupts_off(void)
{
    uint64_t flags;
    __asm__ volatile("pushfq; popq %0; cli" : "=r"(flags) : : "memory");
    return flags;
}

static inline void interrupts_restore(uint64_t flags)
{
    if (flags & 0x200)
        __asm__ volatile("sti" : : : "memory");
}

/* string.c */
void *memset(void *to, int byte, size_t size);
void *memcpy(void *to, const void *from, size_t size);
void *memmove(void *to, const void *from, size_t size);
int memcmp(const void *a, const void *b, size_t size);
size_t strlen(const char *text);
int strcmp(const char *a, const char *b);
/* A number, decimal or with 0x; how many characters it has, 0 if it is none. */
size_t parse_number(const char *text, uint64_t *value);
/* Like snprintf, with %d %u %x %s %c %%: numbers have 64 bits. */
size_t format(char *to, size_t size, const char *pattern, ...);
size_t format_list(char *to, size_t size, const char *pattern, va_list list);

/* pages.c: physical memory, a page at a time */
#define PAGE 4096ul
#define MEMORY_END (16ul << 20)
void pages_init(void);
void *page_alloc(void); /* NULL where there is none */
bool page_free(void *page); /* false for what was not allocated */
uint64_t pages_free_count(void);

/* heap.c */
void *heap_alloc(size_t size);
void heap_free(void *block);
uint64_t heap_used(void);

/* paging.c */
#define MAP_WRITE 2ul
bool map_page(uint64_t virtual, uint64_t physical, uint64_t flags);
bool unmap_page(uint64_t virtual);
#define DEMAND_START 0x4000000000ul /* pages appear here when they are touched */
#define DEMAND_END 0x4000100000ul
extern uint64_t demand_count;
bool page_fault(uint64_t address, uint64_t error); /* false: it cannot be resolved */

/* ring.c: bytes from one producer to one consumer */
#define RING_SIZE 64u
struct ring {
    uint32_t head, tail; /* only ever count up */
    uint8_t bytes[RING_SIZE];
};
bool ring_put(struct ring *ring, uint8_t byte);
int ring_get(struct ring *ring); /* -1 if it is empty */
uint32_t ring_count(const struct ring *ring);

/* tasks.c: each runs until it yields */
int task_create(void (*function)(uint64_t), uint64_t argument); /* -1 if there are too many */
void task_yield(void);
void task_exit(void);
uint64_t tasks_alive(void);

/* interrupts.c */
struct frame {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    uint64_t vector, error, rip, cs, rflags, rsp, ss;
};
void interrupts_init(void);
extern uint64_t ticks, interrupt_counts[48];

/* serial.c */
void serial_init(void);
void serial_received(void);
void serial_put(char byte);
void print(const char *pattern, ...);
int serial_get(void); /* -1 if nothing was typed */

/* panic.c */
__attribute__((noreturn)) void panic(const char *pattern, ...);
__attribute__((noreturn)) void power_off(uint8_t status);

/* shell.c */
void shell_run(const char *line);
__attribute__((noreturn)) void shell(void);
