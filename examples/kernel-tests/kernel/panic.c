#include "kernel.h"

#define DEBUG_EXIT 0xf4

void power_off(uint8_t status)
{
    out8(DEBUG_EXIT, status);
    for (;;)
        __asm__ volatile("cli; hlt");
}

void panic(const char *pattern, ...)
{
    char text[120];
    va_list list;
    __asm__ volatile("cli");
    va_start(list, pattern);
    format_list(text, sizeof text, pattern, list);
    va_end(list);
    print("panic: %s\n", text);
    power_off(0x7f);
}
