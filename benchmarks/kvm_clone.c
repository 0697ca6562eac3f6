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
	static struct state state;
	struct vm vm;
	int count = begin(&vm, &state, argc, argv);
	once(&vm, &state); /* which pays for what a process does once */
	while (count-- > 0)
		printf("%lld\n", (long long)once(&vm, &state));
	vm_close(&vm);
	return 0;
}
