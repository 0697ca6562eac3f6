/* Interrupt descriptors, the two PICs, and the PIT that ticks a hundred times a second. */
#include "kernel.h"

#define PIC_MASTER 0x20
#define PIC_SLAVE 0xa0
#define END_OF_INTERRUPT 0x20
#define FIRST_IRQ 32
#define PIT_HZ 1193182
#define TIMER 0
#define SERIAL 4

extern const uint64_t vectors[48];
uint64_t ticks, interrupt_counts[48];

static struct {
    uint16_t low, selector, kind, middle;
    uint32_t high, zero;
} gates[48];

static void pic_init(void)
{
    static const uint8_t words[][2] = {
        {0x11, 0x11}, {FIRST_IRQ, FIRST_IRQ + 8}, {1 << 2, 2}, {1, 1},
    };
    for (int word = 0; word < 4; word++) {
        out8(PIC_MASTER + (word > 0), words[word][0]);
        out8(PIC_SLAVE + (word > 0), words[word][1]);
    }
    out8(PIC_MASTER + 1, (uint8_t) ~(1 << TIMER | 1 << SERIAL));
    out8(PIC_SLAVE + 1, 0xff);
}

static void pit_init(unsigned hz)
{
    const unsigned divisor = PIT_HZ / hz;
    out8(0x43, 0x34); /* channel 0, both bytes, rate generator */
    out8(0x40, (uint8_t)divisor);
    out8(0x40, (uint8_t)(divisor >> 8));
}

void interrupts_init(void)
{
    for (int n = 0; n < 48; n++) {
        gates[n].low = (uint16_t)vectors[n];
        gates[n].selector = 8;
        gates[n].kind = 0x8e00; /* present, interrupt gate */
        gates[n].middle = (uint16_t)(vectors[n] >> 16);
        gates[n].high = (uint32_t)(vectors[n] >> 32);
    }
    struct {
        uint16_t limit;
        void *base;
    } __attribute__((packed)) pointer = {sizeof gates - 1, gates};
    __asm__ volatile("lidt %0" : : "m"(pointer));
    pic_init();
    pit_init(100);
    __asm__ volatile("sti");
}

static void irq(uint64_t number)
{
    if (number == TIMER)
        ticks++;
    else if (number == SERIAL)
        serial_received();
    if (number >= 8)
        out8(PIC_SLAVE, END_OF_INTERRUPT);
    out8(PIC_MASTER, END_OF_INTERRUPT);
}

void interrupt(struct frame *frame)
{
    interrupt_counts[frame->vector]++;
    if (frame->vector >= FIRST_IRQ)
        return irq(frame->vector - FIRST_IRQ);
    if (frame->vector == 14) {
        uint64_t address;
        __asm__("movq %%cr2, %0" : "=r"(address));
        if (page_fault(address, frame->error))
            return;
        panic("page fault at %x, error %x, rip %x", address, frame->error, frame->rip);
    }
    panic("exception %u, error %x, rip %x", frame->vector, frame->error, frame->rip);
}
