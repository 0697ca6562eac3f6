"""/dev/kvm: is KVM here, what can it do, and making VMs (KVM API 4.1 to 4.5)."""

import errno
import os
from ctypes import sizeof
from fcntl import ioctl

from vmexit.abi.kvm import (
    KVM_API_VERSION,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_MSR_INDEX_LIST,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_VCPU_MMAP_SIZE,
)
from vmexit.abi.kvm_caps import KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_USER_MEMORY
from vmexit.abi.kvm_structs import kvm_cpuid2, kvm_cpuid_entry2
from vmexit.accel.base import ANY_CPU
from vmexit.accel.kvm.registers import PowerOn
from vmexit.accel.kvm.vcpu import KvmVcpu
from vmexit.accel.kvm.vm import KvmVm
from vmexit.arch.x86.cpu_model import CpuModel
from vmexit.core.bus import Bus
from vmexit.core.errors import HostError
from vmexit.core.memory import GuestMemory

DEVICE = "/dev/kvm"

_CPUID_ENTRIES = 256
_MSRS = 1024  # more than any KVM lists

# The answers are the same for the life of the host's kvm module, and a machine asks a lot.
_extensions: dict[tuple[str, int], int] = {}
# KVM_GET_SUPPORTED_CPUID asks the processor hundreds of questions: 0.5 ms where CPUID itself is
# virtualized.
_supported_cpuid: dict[str, bytes] = {}
_power_on: dict[str, PowerOn] = {}


class System:
    """An open /dev/kvm of the one API version there is (12). Raises HostError with the remedy."""

    name = "kvm"

    def __init__(self, path: str = "") -> None:
        self.path = path or DEVICE
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(_why_not_open(self.path, error)) from error
        try:
            version = ioctl(self.fd, KVM_GET_API_VERSION)
            if version != KVM_API_VERSION:
                raise HostError(
                    f"{self.path} speaks KVM API version {version}, not {KVM_API_VERSION}; "
                    "use a Linux kernel newer than 2.6.22"
                )
            for name, cap in (
                ("KVM_CAP_USER_MEMORY", KVM_CAP_USER_MEMORY),
                ("KVM_CAP_IMMEDIATE_EXIT", KVM_CAP_IMMEDIATE_EXIT),
            ):
                if not self.check_extension(cap):
                    raise HostError(f"{self.path} lacks {name}; use Linux 4.11 or newer")
            self.vcpu_mmap_size = ioctl(self.fd, KVM_GET_VCPU_MMAP_SIZE)
        except OSError as error:
            os.close(self.fd)
            raise HostError(
                f"{self.path} is not a KVM device ({error.strerror}); load kvm_intel or kvm_amd, "
                "or use --accel soft"
            ) from error
        except HostError:
            os.close(self.fd)
            raise

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION (KVM API 4.4): 0 where KVM lacks it, else 1 or a quantity."""
        known = _extensions.get((self.path, capability))
        if known is None:
            known = ioctl(self.fd, KVM_CHECK_EXTENSION, capability)
            _extensions[self.path, capability] = known
        return known

    def supported_cpuid(self) -> bytes:
        """KVM_GET_SUPPORTED_CPUID (KVM API 4.46) as a `struct kvm_cpuid2` with its entries."""
        known = _supported_cpuid.get(self.path)
        if known is None:
            head = sizeof(kvm_cpuid2)
            buffer = bytearray(head + _CPUID_ENTRIES * sizeof(kvm_cpuid_entry2))
            request = kvm_cpuid2.from_buffer(buffer)
            request.nent = _CPUID_ENTRIES
            ioctl(self.fd, KVM_GET_SUPPORTED_CPUID, buffer, True)
            count = request.nent
            known = bytes(buffer[: head + count * sizeof(kvm_cpuid_entry2)])
            _supported_cpuid[self.path] = known
        return known

    def msr_indices(self) -> list[int]:
        """The MSRs that belong to a vCPU's state (KVM_GET_MSR_INDEX_LIST, KVM API 4.3)."""
        from vmexit.accel.kvm.state import unpack_indices

        buffer = bytearray(4 + 4 * _MSRS)
        buffer[:4] = _MSRS.to_bytes(4, "little")
        ioctl(self.fd, KVM_GET_MSR_INDEX_LIST, buffer, True)
        return unpack_indices(buffer)

    def power_on(self, vcpu: KvmVcpu) -> PowerOn:
        """What each vCPU has that was just made, as `vcpu` was. Raises HostError."""
        known = _power_on.get(self.path)
        if known is None:
            known = _power_on[self.path] = vcpu.power_on()
        return known

    def create_vm(
        self, memory: GuestMemory, pio: Bus, mmio: Bus, cpus: int = 1, model: CpuModel = ANY_CPU
    ) -> KvmVm:
        """KVM_CREATE_VM (KVM API 4.2), with `memory` in its slots. Raises HostError."""
        while True:
            try:
                fd = ioctl(self.fd, KVM_CREATE_VM, 0)
                break
            except InterruptedError:  # a signal came; KVM asks to try again
                continue
            except OSError as error:
                raise HostError(_why_no_vm(self.path, error)) from error
        return KvmVm(self, fd, memory, pio, mmio, cpus, model)

    def close(self) -> None:
        """Close the descriptor; VMs made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> "System":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _why_not_open(path: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return (
            f"{path} does not exist; load kvm_intel or kvm_amd, switch virtualization on in the "
            "firmware setup or (in a VM) nested virtualization, or use --accel soft"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"{path} may not be opened by this user; join its group (usermod -aG kvm USER, then "
            "log in again), or use --accel soft"
        )
    if error.errno == errno.EBUSY:
        return (
            f"{path} is busy: another hypervisor holds the processor's virtualization; "
            "stop it, or use --accel soft"
        )
    return f"cannot open {path}: {error.strerror}; use --accel soft"


def _why_no_vm(path: str, error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return (
            f"{path} cannot make a VM: another hypervisor holds the processor's virtualization; "
            "stop it, or use --accel soft"
        )
    if error.errno == errno.ENOMEM:
        return f"{path} cannot make a VM: not enough memory on the host; free some"
    return f"{path} cannot make a VM: {error.strerror}; try --accel soft"
