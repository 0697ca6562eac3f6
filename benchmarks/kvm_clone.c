/* `kvm_clone STATE COUNT`: runs the machine in file STATE to its write to port 0x10, keeps all of it, and
 * then COUNT times makes another one: its memory a private mapping of that one's, all state of the vCPU
 * loaded. Prints for each the nanoseconds until its write to port 0x11; to take it apart is not counted.
 */
#define _GNU_SOURCE
#include "state.h"

static int64_t once(struct vm *first, struct state *state)
{
	struct vm vm;
	int64_t begin = now(CLOCK_MONOTONIC);
	vm_open_with(&vm, first->size, dup(first->memory_fd), MAP_PRIVATE);
	load(&vm, state);
	run_to(&vm, 0x11);
	int64_t end = now(CLOCK_MONOTONIC);
	vm_close(&vm);
	return end - begin;
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: kvm_clone STATE COUNT\n");
		return 2;
	}
	static struct state state;
	size_t size;
	FILE *file = state_file(argv[1], &size);
	struct vm vm;
	vm_open(&vm, size);
	begin(&vm, file, &state);
	once(&vm, &state); /* which pays for what a process does once */
	for (int i = atoi(argv[2]); i > 0; i--)
		printf("%lld\n", (long long)once(&vm, &state));
	vm_close(&vm);
	return 0;
}
