/* What examples/fuzz.py fuzzes: a parser of a small format, 64-bit code without a system under it.
 *
 * A file is "VXI1", a version, and records: a letter, a length, so many bytes. Two mistakes are in it:
 * where a block is in memory is not checked, and a record that waits may wait for ever.
 */
#include <stdint.h>

#define DONE 0x10 /* the port that says that there was no crash */

static void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static uint32_t checksum(const uint8_t *data, uint32_t size)
{
    uint32_t sum = 1;
    while (size--)
        sum = sum * 31 + *data++;
    return sum;
}

static uint32_t read_block(const uint8_t *data, uint32_t size)
{
    if (size < 4)
        return 0;
    const uint64_t number = data[0] | data[1] << 8 | data[2] << 16 | (uint64_t)data[3] << 24;
    return *(volatile uint32_t *)(number << 12); /* the first mistake */
}

static void wait_for(uint8_t count)
{
    for (volatile uint8_t n = 0; n != count; n += 2) /* the second one */
        ;
}

uint32_t parse(const uint8_t *data, uint32_t size)
{
    uint32_t sum = 0, at = 5;
    if (size < 5)
        return 1;
    if (data[0] != 'V')
        return 2;
    if (data[1] != 'X')
        return 3;
    if (data[2] != 'I')
        return 4;
    if (data[3] != '1')
        return 5;
    if (data[4] > 2)
        return 6;
    while (at + 2 <= size) {
        const uint8_t kind = data[at], length = data[at + 1];
        at += 2;
        if (length > size - at)
            return 7;
        switch (kind) {
        case 'T':
            sum ^= checksum(data + at, length);
            break;
        case 'B':
            sum ^= read_block(data + at, length);
            break;
        case 'W':
            wait_for(length);
            break;
        default:
            return 8;
        }
        at += length;
    }
    return sum;
}

static uint8_t input[4096]; /* who fuzzes puts it here */

__attribute__((section(".text.start"), noreturn)) void start(void)
{
    __asm__ volatile("movq $0x80000, %rsp");
    parse(input, sizeof input);
    for (;;)
        out8(DONE, 0);
}
