/* The loop around KVM_RUN in C: the yardstick for vmexit's.
 *
 * As a program, `kvm_loop STATE COUNT` runs the machine in file STATE (struct kvm_sregs, struct
 * kvm_regs, then its memory) until it has written COUNT bytes to port 0x10 and ends, and prints the
 * nanoseconds that took: wall-clock time and the thread's CPU time.
 *
 * As a shared object, run_loop() runs a vCPU that somebody else has made.
 */
#define _GNU_SOURCE
#include "vm.h"

#define COUNTED_PORT 0x10
#define END_PORT 0xf4

/* KVM finishes an access when it is entered again (KVM API 5): enter without running the guest. */
static void finish_access(int fd, struct kvm_run *run)
{
	run->immediate_exit = 1;
	if (ioctl(fd, KVM_RUN, 0) == 0)
		fprintf(stderr, "KVM_RUN ignored immediate_exit\n");
	run->immediate_exit = 0;
}

/* Runs until HLT or a write to port 0xf4, or, with a limit, until so many writes to port 0x10.
 * Returns the number of these, or -1 with what went wrong on stderr. `request` is KVM_RUN. */
int64_t run_loop(int fd, struct kvm_run *run, unsigned long request, int64_t limit)
{
	int64_t count = 0;
	for (;;) {
		if (ioctl(fd, request, 0) < 0) {
			perror("KVM_RUN");
			return -1;
		}
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			if (run->io.direction == KVM_EXIT_IO_OUT) {
				if (run->io.port == COUNTED_PORT) {
					if (++count == limit)
						return count;
					break;
				}
				if (run->io.port == END_PORT) {
					finish_access(fd, run);
					return count;
				}
			}
			fprintf(stderr, "access to port %#x\n", run->io.port);
			return -1;
		case KVM_EXIT_HLT:
			return count;
		default:
			fprintf(stderr, "exit reason %u\n", run->exit_reason);
			return -1;
		}
	}
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: kvm_loop STATE COUNT\n");
		return 2;
	}
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	FILE *file = fopen(argv[1], "rb");
	if (!file || fseek(file, 0, SEEK_END) < 0)
		fail(argv[1]);
	size_t size = ftell(file) - sizeof sregs - sizeof regs;
	rewind(file);
	struct vm vm;
	vm_open(&vm, size);
	if (fread(&sregs, sizeof sregs, 1, file) != 1 || fread(&regs, sizeof regs, 1, file) != 1 ||
	    fread(vm.memory, size, 1, file) != 1)
		fail(argv[1]);
	fclose(file);
	CALL(vm.vcpu, KVM_SET_SREGS, &sregs);
	CALL(vm.vcpu, KVM_SET_REGS, &regs);

	int64_t wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);
	int64_t count = run_loop(vm.vcpu, vm.run, KVM_RUN, 0);
	cpu = now(CLOCK_THREAD_CPUTIME_ID) - cpu;
	wall = now(CLOCK_MONOTONIC) - wall;
	vm_close(&vm);
	if (count != atoll(argv[2])) {
		fprintf(stderr, "%lld exits, not %s\n", (long long)count, argv[2]);
		return 1;
	}
	printf("%lld %lld\n", (long long)wall, (long long)cpu);
	return 0;
}
