#include "kernel.h"

void *memset(void *to, int byte, size_t size)
{
    char *at = to;
    while (size--)
        *at++ = (char)byte;
    return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
    char *target = to;
    const char *source = from;
    while (size--)
        *target++ = *source++;
    return to;
}

void *memmove(void *to, const void *from, size_t size)
{
    char *target = to;
    const char *source = from;
    if (target <= source)
        return memcpy(to, from, size);
    while (size--)
        target[size] = source[size];
    return to;
}

int memcmp(const void *a, const void *b, size_t size)
{
    const uint8_t *one = a, *other = b;
    for (; size; size--, one++, other++)
        if (*one != *other)
            return *one - *other;
    return 0;
}

size_t strlen(const char *text)
{
    size_t size = 0;
    while (text[size])
        size++;
    return size;
}

int strcmp(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return (uint8_t)*a - (uint8_t)*b;
}

static int digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : 16;
}

size_t parse_number(const char *text, uint64_t *value)
{
    const bool hex = text[0] == '0' && (text[1] | 0x20) == 'x';
    const size_t first = hex ? 2 : 0;
    const int base = hex ? 16 : 10;
    size_t at = first;
    uint64_t number = 0;
    for (; digit(text[at]) < base; at++)
        number = number * (uint64_t)base + (uint64_t)digit(text[at]);
    if (at == first)
        return 0;
    *value = number;
    return at;
}

struct out {
    char *to;
    size_t size, used;
};

static void put(struct out *out, char c)
{
    if (out->used + 1 < out->size)
        out->to[out->used] = c;
    out->used++;
}

static void put_number(struct out *out, uint64_t number, unsigned base)
{
    char digits[20];
    int count = 0;
    do
        digits[count++] = "0123456789abcdef"[number % base];
    while (number /= base);
    while (count)
        put(out, digits[--count]);
}

size_t format_list(char *to, size_t size, const char *pattern, va_list list)
{
    struct out out = {to, size, 0};
    for (; *pattern; pattern++) {
        if (*pattern != '%') {
            put(&out, *pattern);
            continue;
        }
        switch (*++pattern) {
        case 'd': {
            const int64_t number = va_arg(list, int64_t);
            if (number < 0)
                put(&out, '-');
            put_number(&out, number < 0 ? -(uint64_t)number : (uint64_t)number, 10);
            break;
        }
        case 'u':
            put_number(&out, va_arg(list, uint64_t), 10);
            break;
        case 'x':
            put_number(&out, va_arg(list, uint64_t), 16);
            break;
        case 's':
            for (const char *text = va_arg(list, const char *); *text; text++)
                put(&out, *text);
            break;
        case 'c':
            put(&out, (char)va_arg(list, int));
            break;
        default:
            put(&out, *pattern);
        }
    }
    if (size)
        to[out.used < size ? out.used : size - 1] = 0;
    return out.used;
}

size_t format(char *to, size_t size, const char *pattern, ...)
{
    va_list list;
    va_start(list, pattern);
    const size_t used = format_list(to, size, pattern, list);
    va_end(list);
    return used;
}
