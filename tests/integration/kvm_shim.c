/* Stands before ioctl() and open() and lets /dev/kvm fail as the environment says:
 *   SHIM=version   KVM_GET_API_VERSION answers 11
 *   SHIM=busy      KVM_CREATE_VM fails with EBUSY, as beside another hypervisor
 *   SHIM=memory    KVM_CREATE_VM fails with ENOMEM
 *   SHIM=slot      KVM_SET_USER_MEMORY_REGION fails with EINVAL
 *   SHIM=vcpu      KVM_CREATE_VCPU fails with ENOMEM
 *   SHIM=run       KVM_RUN fails with EFAULT
 *   SHIM=denied    opening /dev/kvm fails with EACCES
 *   SHIM=openbusy  opening /dev/kvm fails with EBUSY
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static int asked(const char *what)
{
	const char *shim = getenv("SHIM");
	return shim && !strcmp(shim, what);
}

static int fail(int number)
{
	errno = number;
	return -1;
}

int ioctl(int fd, unsigned long request, ...)
{
	int (*real)(int, unsigned long, void *) = dlsym(RTLD_NEXT, "ioctl");
	va_list list;
	va_start(list, request);
	void *argument = va_arg(list, void *);
	va_end(list);
	if (request == KVM_GET_API_VERSION && asked("version"))
		return 11;
	if (request == KVM_CREATE_VM && asked("busy"))
		return fail(EBUSY);
	if (request == KVM_CREATE_VM && asked("memory"))
		return fail(ENOMEM);
	if (request == KVM_SET_USER_MEMORY_REGION && asked("slot"))
		return fail(EINVAL);
	if (request == KVM_CREATE_VCPU && asked("vcpu"))
		return fail(ENOMEM);
	if (request == KVM_RUN && asked("run"))
		return fail(EFAULT);
	return real(fd, request, argument);
}

static int open_as_asked(const char *name, const char *path, int flags, mode_t mode)
{
	int (*real)(const char *, int, mode_t) = dlsym(RTLD_NEXT, name);
	if (!strcmp(path, "/dev/kvm")) {
		if (asked("denied"))
			return fail(EACCES);
		if (asked("openbusy"))
			return fail(EBUSY);
	}
	return real(path, flags, mode);
}

int open(const char *path, int flags, ...)
{
	va_list list;
	va_start(list, flags);
	mode_t mode = va_arg(list, mode_t);
	va_end(list);
	return open_as_asked("open", path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
	va_list list;
	va_start(list, flags);
	mode_t mode = va_arg(list, mode_t);
	va_end(list);
	return open_as_asked("open64", path, flags, mode);
}
