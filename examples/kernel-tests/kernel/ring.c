#include "kernel.h"

bool ring_put(struct ring *ring, uint8_t byte)
{
    if (ring->head - ring->tail == RING_SIZE)
        return false;
    ring->bytes[ring->head % RING_SIZE] = byte;
    ring->head++;
    return true;
}

int ring_get(struct ring *ring)
{
    if (ring->head == ring->tail)
        return -1;
    return ring->bytes[ring->tail++ % RING_SIZE];
}

uint32_t ring_count(const struct ring *ring)
{
    return ring->head - ring->tail;
}
