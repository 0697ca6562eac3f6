#!/usr/bin/env python3
"""A virtual machine monitor in nine steps: KVM's own interface, with nothing between.

    python examples/minikvm.py [IMAGE]

Without IMAGE it runs a guest of six instructions that counts on port 0x10. An image is loaded at
guest address 0 and started at 0x1000 in real mode, as `vmexit run IMAGE` does. It uses only
`vmexit.abi`: the numbers and structures of <linux/kvm.h>. docs/how-a-vm-runs.md explains each step.
"""

import ctypes
import mmap
import os
import sys
import threading
from ctypes import sizeof
from fcntl import ioctl

from vmexit.abi import kvm
from vmexit.abi.kvm_run import kvm_run
from vmexit.abi.kvm_structs import kvm_regs, kvm_sregs, kvm_userspace_memory_region

RAM_SIZE = 128 << 20
ENTRY = 0x1000

# mov al, '0'; again: out 0x10, al; inc al; cmp al, '9'; jbe again; hlt
COUNTER = b"\xb0\x30\xe6\x10\xfe\xc0\x3c\x39\x76\xf8\xf4"


def exit_io(run: kvm_run, pages: mmap.mmap) -> None:
    """An IN or OUT instruction: the data lie in the shared pages, at `data_offset`."""
    io = run.io
    start, size = io.data_offset, io.size * io.count
    if io.direction == kvm.KVM_EXIT_IO_OUT:
        print(f"io: out port {io.port:#x} data {pages[start : start + size].hex()}")
    else:
        pages[start : start + size] = b"\xff" * size  # nobody answers
        print(f"io: in port {io.port:#x}")


def exit_mmio(run: kvm_run) -> None:
    """An access to memory that no slot answers: the data lie in `run` itself."""
    access = run.mmio
    if access.is_write:
        print(f"mmio: write {access.phys_addr:#x} data {bytes(access.data[: access.len]).hex()}")
    else:
        access.data[: access.len] = b"\xff" * access.len
        print(f"mmio: read {access.phys_addr:#x}")


def run_vcpu(vcpu: int, run: kvm_run, pages: mmap.mmap) -> str:
    """Steps 7 and 8; returns how the guest ended."""
    while True:
        # 7. Run guest code until the processor, or KVM, needs us.
        ioctl(vcpu, kvm.KVM_RUN)
        # 8. Why did it exit?
        reason = run.exit_reason
        if reason == kvm.KVM_EXIT_IO:
            exit_io(run, pages)
        elif reason == kvm.KVM_EXIT_MMIO:
            exit_mmio(run)
        elif reason == kvm.KVM_EXIT_HLT:
            return "halt"
        elif reason == kvm.KVM_EXIT_SHUTDOWN:
            return "shutdown: a triple fault"
        elif reason == kvm.KVM_EXIT_INTERNAL_ERROR:
            return f"KVM gave up: suberror {run.internal.suberror}"
        elif reason == kvm.KVM_EXIT_FAIL_ENTRY:
            return f"entry failed: {run.fail_entry.hardware_entry_failure_reason:#x}"
        else:
            return f"exit reason {reason}, which is not handled"


def main(image: bytes) -> None:
    """Steps 1 to 9."""
    # 1. Open KVM.
    try:
        system = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        sys.exit(f"cannot open /dev/kvm: {error.strerror}; `vmexit doctor` says what to do")
    # 2. Is it the one version of the interface that there is?
    assert ioctl(system, kvm.KVM_GET_API_VERSION) == kvm.KVM_API_VERSION
    # 3. Create a VM: a file descriptor that has no memory and no processor yet.
    vm = ioctl(system, kvm.KVM_CREATE_VM, 0)
    # 4. Memory: guest physical address 0 on is this piece of our own address space (GPA → HVA).
    ram = mmap.mmap(-1, RAM_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(ram))
    slot = kvm_userspace_memory_region(0, 0, 0, RAM_SIZE, hva)
    ioctl(vm, kvm.KVM_SET_USER_MEMORY_REGION, bytes(slot))
    # 5. Put the image into that memory.
    ram[: len(image)] = image
    # 6. Create a vCPU, and map what it shares with us: `struct kvm_run`.
    vcpu = ioctl(vm, kvm.KVM_CREATE_VCPU, 0)
    pages = mmap.mmap(vcpu, ioctl(system, kvm.KVM_GET_VCPU_MMAP_SIZE))
    run = kvm_run.from_buffer(pages)
    sregs = kvm_sregs.from_buffer_copy(ioctl(vcpu, kvm.KVM_GET_SREGS, bytes(sizeof(kvm_sregs))))
    sregs.cs.base, sregs.cs.selector = ENTRY, ENTRY >> 4
    ioctl(vcpu, kvm.KVM_SET_SREGS, bytes(sregs))
    ioctl(vcpu, kvm.KVM_SET_REGS, bytes(kvm_regs(rip=0, rflags=0x2)))
    # 9. A thread for each vCPU: KVM_RUN keeps the thread that calls it.
    thread = threading.Thread(target=lambda: print(run_vcpu(vcpu, run, pages)))
    thread.start()
    thread.join()
    # Everything is freed with its descriptor.
    for descriptor in (vcpu, vm, system):
        os.close(descriptor)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with open(sys.argv[1], "rb") as file:
            main(file.read(RAM_SIZE))
    else:
        main(bytes(ENTRY) + COUNTER)
