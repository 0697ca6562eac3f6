/* A UART: what is typed comes by interrupts, what is printed waits for the transmitter. */
#include "kernel.h"

#define COM1 0x3f8
#define DATA COM1
#define INTERRUPTS (COM1 + 1)
#define FIFO (COM1 + 2)
#define LINE (COM1 + 3)
#define MODEM (COM1 + 4)
#define STATUS (COM1 + 5)
#define HAS_DATA 1
#define CAN_TRANSMIT 0x20

struct ring serial_typed;
uint64_t serial_lost;

void serial_init(void)
{
    out8(LINE, 3);       /* 8 bits, no parity */
    out8(FIFO, 7);       /* on and empty, an interrupt for each byte */
    out8(MODEM, 0xb);    /* DTR, RTS, OUT2: which lets the interrupt through */
    out8(INTERRUPTS, 1); /* of received data */
}

void serial_received(void)
{
    while (in8(STATUS) & HAS_DATA)
        if (!ring_put(&serial_typed, in8(DATA)))
            serial_lost++;
}

int serial_get(void)
{
    return ring_get(&serial_typed);
}

void serial_put(char byte)
{
    while (!(in8(STATUS) & CAN_TRANSMIT))
        ;
    out8(DATA, (uint8_t)byte);
}

void print(const char *pattern, ...)
{
    char text[160];
    va_list list;
    va_start(list, pattern);
    format_list(text, sizeof text, pattern, list);
    va_end(list);
    for (const char *at = text; *at; at++)
        serial_put(*at);
}
