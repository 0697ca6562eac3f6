/* `kvm_reset STATE COUNT`: runs the machine in file STATE (struct kvm_sregs, struct kvm_regs, then
 * its memory) to its write to port 0x10, keeps all of it, and then COUNT times runs it on to its
 * write to port 0x11 and puts it back: the pages in KVM's dirty log by memcpy, and all state of the
 * vCPU. Prints for each the nanoseconds of both, and of going back alone.
 */
#define _GNU_SOURCE
#include "state.h"

static unsigned put_back(struct vm *vm, const uint8_t *image, uint64_t *bitmap)
{
	unsigned pages = 0;
	struct kvm_dirty_log log = { .dirty_bitmap = bitmap };
	CALL(vm->fd, KVM_GET_DIRTY_LOG, &log);
	for (size_t word = 0; word < vm->size / 4096 / 64; word++)
		for (uint64_t bits = bitmap[word]; bits; bits &= bits - 1, pages++) {
			size_t at = (word * 64 + __builtin_ctzll(bits)) * 4096;
			memcpy(vm->memory + at, image + at, 4096);
		}
	return pages;
}

int main(int argc, char **argv)
{
	static struct state state;
	struct vm vm;
	int count = begin(&vm, &state, argc, argv);
	size_t size = vm.size;
	uint8_t *image = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t *bitmap = calloc(size / 4096 / 64, 8);
	if (image == MAP_FAILED || !bitmap)
		fail("memory");
	memcpy(image, vm.memory, size);
	struct kvm_userspace_memory_region region = {
		.flags = KVM_MEM_LOG_DIRTY_PAGES,
		.memory_size = size,
		.userspace_addr = (uintptr_t)vm.memory,
	};
	CALL(vm.fd, KVM_SET_USER_MEMORY_REGION, &region);

	unsigned pages = 0;
	/* The first two are not printed: pages that are mapped as they are first read count as written. */
	for (int i = count + 1; i >= 0; i--) {
		int64_t begin = now(CLOCK_MONOTONIC);
		run_to(&vm, 0x11);
		int64_t ran = now(CLOCK_MONOTONIC);
		unsigned dirty = put_back(&vm, image, bitmap);
		load(&vm, &state);
		int64_t end = now(CLOCK_MONOTONIC);
		if (i < count)
			printf("%lld %lld\n", (long long)(end - begin), (long long)(end - ran));
		else
			pages = dirty;
		if (dirty != pages)
			return 1;
	}
	fprintf(stderr, "%u pages\n", pages);
	vm_close(&vm);
	return 0;
}
