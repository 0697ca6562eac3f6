/* A virtual machine with one vCPU, made as directly as C can: the system calls and the KVM ioctls
 * that vmexit makes, each once, in the same order. */
#ifndef BENCHMARKS_VM_H
#define BENCHMARKS_VM_H

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define TSS_ADDRESS 0xfeffd000u
#define IDENTITY_MAP_ADDRESS 0xfeffc000ull
#define CPUID_ENTRIES 256

struct vm {
	int memory_fd, kvm, fd, vcpu;
	size_t size, run_size;
	uint8_t *memory;
	struct kvm_run *run;
};

static inline void fail(const char *what)
{
	perror(what);
	exit(1);
}

static inline int call(const char *what, int fd, unsigned long request, void *argument)
{
	int result = ioctl(fd, request, argument);
	if (result < 0)
		fail(what);
	return result;
}
#define CALL(fd, request, argument) call(#request, fd, request, (void *)(uintptr_t)(argument))

static inline int64_t now(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

/* The CPUID that KVM supports. It asks the processor hundreds of questions, so both sides ask once
 * in a process. */
static inline const struct kvm_cpuid2 *supported_cpuid(int kvm)
{
	static struct kvm_cpuid2 *known;
	if (!known) {
		known = calloc(1, sizeof *known + CPUID_ENTRIES * sizeof known->entries[0]);
		if (!known)
			fail("calloc");
		known->nent = CPUID_ENTRIES;
		CALL(kvm, KVM_GET_SUPPORTED_CPUID, known);
	}
	return known;
}

/* A machine with what is in `memory_fd`, which it closes; `sharing` is MAP_SHARED or MAP_PRIVATE. */
static inline void vm_open_with(struct vm *vm, size_t size, int memory_fd, int sharing)
{
	vm->size = size;
	vm->memory_fd = memory_fd;
	vm->memory = mmap(NULL, size, PROT_READ | PROT_WRITE, sharing, memory_fd, 0);
	if (vm->memory == MAP_FAILED)
		fail("mmap of the memory");
	vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm->kvm < 0)
		fail("/dev/kvm");
	if (CALL(vm->kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION ||
	    !CALL(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) ||
	    !CALL(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT))
		fail("this KVM is too old");
	vm->run_size = CALL(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	vm->fd = CALL(vm->kvm, KVM_CREATE_VM, 0);
	uint64_t identity_map = IDENTITY_MAP_ADDRESS;
	if (CALL(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_SET_IDENTITY_MAP_ADDR))
		CALL(vm->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
	if (CALL(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_SET_TSS_ADDR))
		CALL(vm->fd, KVM_SET_TSS_ADDR, TSS_ADDRESS);
	struct kvm_userspace_memory_region region = {
		.memory_size = size,
		.userspace_addr = (uintptr_t)vm->memory,
	};
	CALL(vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
	vm->vcpu = CALL(vm->fd, KVM_CREATE_VCPU, 0);
	vm->run = mmap(NULL, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
	if (vm->run == MAP_FAILED)
		fail("mmap of kvm_run");
	CALL(vm->vcpu, KVM_SET_CPUID2, supported_cpuid(vm->kvm));
}

static inline void vm_open(struct vm *vm, size_t size)
{
	int memory_fd = memfd_create("bench-ram", MFD_CLOEXEC);
	if (memory_fd < 0 || ftruncate(memory_fd, size) < 0)
		fail("memfd");
	vm_open_with(vm, size, memory_fd, MAP_SHARED);
}

static inline void vm_close(struct vm *vm)
{
	munmap(vm->run, vm->run_size);
	close(vm->vcpu);
	close(vm->fd);
	close(vm->kvm);
	munmap(vm->memory, vm->size);
	close(vm->memory_fd);
}

#endif
