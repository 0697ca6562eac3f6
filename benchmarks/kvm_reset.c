/* `kvm_reset STATE COUNT`: runs the machine in file STATE (struct kvm_sregs, struct kvm_regs, then
 * its memory) to its write to port 0x10, keeps all of it, and then COUNT times runs it on to its
 * write to port 0x11 and puts it back: the pages in KVM's dirty log by memcpy, and all state of the
 * vCPU. Prints for each the nanoseconds of both, and of going back alone.
 */
#define _GNU_SOURCE
#include "vm.h"

#define MOST_MSRS 1024

struct msrs {
	struct kvm_msrs head;
	struct kvm_msr_entry entries[MOST_MSRS];
};

struct state {
	struct kvm_sregs sregs;
	struct kvm_xcrs xcrs;
	struct kvm_xsave xsave;
	struct kvm_vcpu_events events;
	struct kvm_debugregs debugregs;
	struct kvm_mp_state mp_state;
	struct kvm_regs regs;
	struct kvm_clock_data clock;
	struct msrs msrs;
};

static void run_to(struct vm *vm, unsigned port)
{
	do {
		CALL(vm->vcpu, KVM_RUN, 0);
		if (vm->run->exit_reason != KVM_EXIT_IO) {
			fprintf(stderr, "exit reason %u\n", vm->run->exit_reason);
			exit(1);
		}
	} while (vm->run->io.port != port);
	/* KVM finishes an access when it is entered again (KVM API 5). */
	vm->run->immediate_exit = 1;
	ioctl(vm->vcpu, KVM_RUN, 0);
	vm->run->immediate_exit = 0;
}

/* Those that KVM gives and takes. */
static void save_msrs(struct vm *vm, struct msrs *msrs)
{
	static struct { struct kvm_msr_list head; __u32 indices[MOST_MSRS]; } list;
	list.head.nmsrs = MOST_MSRS;
	CALL(vm->kvm, KVM_GET_MSR_INDEX_LIST, &list);
	for (unsigned i = 0; i < list.head.nmsrs; i++) {
		struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = {
			.head.nmsrs = 1, .entry.index = list.indices[i] };
		if (ioctl(vm->vcpu, KVM_GET_MSRS, &one) == 1 && ioctl(vm->vcpu, KVM_SET_MSRS, &one) == 1)
			msrs->entries[msrs->head.nmsrs++] = one.entry;
	}
}

static void save(struct vm *vm, struct state *s)
{
	CALL(vm->vcpu, KVM_GET_MP_STATE, &s->mp_state);
	CALL(vm->vcpu, KVM_GET_SREGS, &s->sregs);
	CALL(vm->vcpu, KVM_GET_XCRS, &s->xcrs);
	CALL(vm->vcpu, KVM_GET_XSAVE, &s->xsave);
	CALL(vm->vcpu, KVM_GET_VCPU_EVENTS, &s->events);
	CALL(vm->vcpu, KVM_GET_DEBUGREGS, &s->debugregs);
	CALL(vm->vcpu, KVM_GET_REGS, &s->regs);
	CALL(vm->fd, KVM_GET_CLOCK, &s->clock);
	s->clock.flags = 0;
	save_msrs(vm, &s->msrs);
}

static void load(struct vm *vm, struct state *s)
{
	CALL(vm->vcpu, KVM_SET_SREGS, &s->sregs);
	CALL(vm->vcpu, KVM_SET_XCRS, &s->xcrs);
	CALL(vm->vcpu, KVM_SET_XSAVE, &s->xsave);
	CALL(vm->vcpu, KVM_SET_MSRS, &s->msrs);
	CALL(vm->vcpu, KVM_SET_VCPU_EVENTS, &s->events);
	CALL(vm->vcpu, KVM_SET_DEBUGREGS, &s->debugregs);
	CALL(vm->vcpu, KVM_SET_MP_STATE, &s->mp_state);
	CALL(vm->vcpu, KVM_SET_REGS, &s->regs);
	CALL(vm->fd, KVM_SET_CLOCK, &s->clock);
}

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
	if (argc != 3) {
		fprintf(stderr, "usage: kvm_reset STATE COUNT\n");
		return 2;
	}
	static struct state state;
	FILE *file = fopen(argv[1], "rb");
	if (!file || fseek(file, 0, SEEK_END) < 0)
		fail(argv[1]);
	size_t size = ftell(file) - sizeof state.sregs - sizeof state.regs;
	rewind(file);
	struct vm vm;
	vm_open(&vm, size);
	if (fread(&state.sregs, sizeof state.sregs, 1, file) != 1 ||
	    fread(&state.regs, sizeof state.regs, 1, file) != 1 ||
	    fread(vm.memory, size, 1, file) != 1)
		fail(argv[1]);
	fclose(file);
	CALL(vm.vcpu, KVM_SET_SREGS, &state.sregs);
	CALL(vm.vcpu, KVM_SET_REGS, &state.regs);
	run_to(&vm, 0x10);
	save(&vm, &state);
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
	for (int i = atoi(argv[2]) + 1; i >= 0; i--) {
		int64_t begin = now(CLOCK_MONOTONIC);
		run_to(&vm, 0x11);
		int64_t ran = now(CLOCK_MONOTONIC);
		unsigned dirty = put_back(&vm, image, bitmap);
		load(&vm, &state);
		int64_t end = now(CLOCK_MONOTONIC);
		if (i < atoi(argv[2]))
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
