// A split virtqueue as the device sees it, in C: what a request costs at the very least.
#include <stdint.h>

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct avail { uint16_t flags, idx, ring[]; };
struct used_elem { uint32_t id, len; };
struct used { uint16_t flags, idx; struct used_elem ring[]; };

// Serve all that was offered: each chain is walked and its bytes counted, which are within `size`
// bytes at `memory`. The number of requests; -1 for what is no request.
long serve(char *memory, uint64_t size, uint64_t desc_at, uint64_t avail_at, uint64_t used_at,
           uint16_t entries, uint16_t *next) {
    struct desc *table = (struct desc *)(memory + desc_at);
    volatile struct avail *avail = (struct avail *)(memory + avail_at);
    volatile struct used *used = (struct used *)(memory + used_at);
    uint16_t at = *next, end = avail->idx, done = used->idx;
    long count = 0;
    while (at != end) {
        uint16_t head = avail->ring[at++ % entries], index = head;
        uint32_t written = 0;
        for (int left = entries; ; left--) {
            if (index >= entries || !left) return -1;
            struct desc d = table[index];
            if (d.addr > size || d.len > size - d.addr) return -1;
            if (d.flags & 2) written += d.len;
            if (!(d.flags & 1)) break;
            index = d.next;
        }
        used->ring[done++ % entries] = (struct used_elem){head, written};
        __atomic_store_n(&used->idx, done, __ATOMIC_RELEASE);
        count++;
    }
    *next = at;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return count;
}
