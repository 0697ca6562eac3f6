/* `kvm_create COUNT MEMORY`: COUNT times makes a machine of MEMORY bytes whose guest is one HLT,
 * runs it to that exit and takes it apart; prints the nanoseconds of each, one a line.
 *
 * One more, the first, is not printed: it pays for what a process does once.
 */
#define _GNU_SOURCE
#include "vm.h"

#define ENTRY 0x1000

static void once(size_t size)
{
	struct vm vm;
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rflags = 2 };
	vm_open(&vm, size);
	vm.memory[ENTRY] = 0xf4; /* hlt */
	CALL(vm.vcpu, KVM_GET_SREGS, &sregs);
	sregs.cs.base = ENTRY;
	sregs.cs.selector = ENTRY >> 4;
	CALL(vm.vcpu, KVM_SET_SREGS, &sregs);
	CALL(vm.vcpu, KVM_SET_REGS, &regs);
	/* struct kvm_signal_mask: how vmexit gets its vCPUs to stop. */
	struct {
		uint32_t length;
		uint64_t blocked;
	} __attribute__((packed)) mask = { 8, 0 };
	CALL(vm.vcpu, KVM_SET_SIGNAL_MASK, &mask);
	CALL(vm.vcpu, KVM_RUN, 0);
	if (vm.run->exit_reason != KVM_EXIT_HLT) {
		fprintf(stderr, "exit reason %u\n", vm.run->exit_reason);
		exit(1);
	}
	vm_close(&vm);
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: kvm_create COUNT MEMORY\n");
		return 2;
	}
	size_t size = strtoull(argv[2], NULL, 0);
	once(size);
	for (int i = atoi(argv[1]); i > 0; i--) {
		int64_t start = now(CLOCK_MONOTONIC);
		once(size);
		printf("%lld\n", (long long)(now(CLOCK_MONOTONIC) - start));
	}
	return 0;
}
