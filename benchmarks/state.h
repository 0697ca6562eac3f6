/* All state of a vCPU, and a machine that begins from a file: struct kvm_sregs, struct kvm_regs, then
 * its memory. Its guest writes to port 0x10 where it is kept, and to port 0x11 at its end. */
#ifndef BENCHMARKS_STATE_H
#define BENCHMARKS_STATE_H

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

static inline void run_to(struct vm *vm, unsigned port)
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
static inline void save_msrs(struct vm *vm, struct msrs *msrs)
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

static inline void save(struct vm *vm, struct state *s)
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

static inline void load(struct vm *vm, struct state *s)
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

/* For a program that is given STATE COUNT: runs the machine in the file to where it is kept. Returns
 * COUNT. */
static inline int begin(struct vm *vm, struct state *state, int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: %s STATE COUNT\n", argv[0]);
		exit(2);
	}
	FILE *file = fopen(argv[1], "rb");
	if (!file || fseek(file, 0, SEEK_END) < 0)
		fail(argv[1]);
	vm_open(vm, ftell(file) - sizeof state->sregs - sizeof state->regs);
	rewind(file);
	if (fread(&state->sregs, sizeof state->sregs, 1, file) != 1 ||
	    fread(&state->regs, sizeof state->regs, 1, file) != 1 ||
	    fread(vm->memory, vm->size, 1, file) != 1)
		fail(argv[1]);
	fclose(file);
	CALL(vm->vcpu, KVM_SET_SREGS, &state->sregs);
	CALL(vm->vcpu, KVM_SET_REGS, &state->regs);
	run_to(vm, 0x10);
	save(vm, state);
	return atoi(argv[2]);
}

#endif
