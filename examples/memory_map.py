#!/usr/bin/env python3
"""Three kinds of addresses, one byte: guest virtual, guest physical, host virtual.

    python examples/memory_map.py [kvm|soft]

docs/how-a-vm-runs.md explains what it prints.
"""

import ctypes
import os
import sys

from vmexit import Machine

GVA = 0x7FFF_0000_0000
GPA = 0x20_0000
PAGES = 16

# mov rax, GVA; mov ecx, PAGES; l: mov byte [rax], cl; add rax, 4096; dec ecx; jnz l; hlt
WRITE_PAGES = (
    b"\x48\xb8" + GVA.to_bytes(8, "little")
    + b"\xb9" + PAGES.to_bytes(4, "little")
    + b"\x88\x08" + b"\x48\x05\x00\x10\x00\x00" + b"\xff\xc9" + b"\x75\xf4" + b"\xf4"
)  # fmt: skip


def backed_pages(vm: Machine) -> int:
    """How many pages of guest RAM the host has given a page of its own."""
    return os.fstat(vm.memory.fd).st_blocks * 512 // 4096


def main(accel: str) -> None:
    with Machine(memory="4100M", accel=accel, mode="long") as vm:
        print("guest physical memory, and where it is in this process:")
        for region in vm.memory.regions:
            print(f"  GPA {region.gpa:#x}..{region.end - 1:#x} = HVA {region.hva:#x}...")

        # The guest's page tables: GVA 0x7fff00000000 is the 2 MiB page at GPA 0x200000.
        vm.load_bytes(WRITE_PAGES)
        vm.memory.write_u64(0x10000 + 8 * (GVA >> 39 & 511), 0x11003)
        vm.memory.write_u64(0x11000 + 8 * (GVA >> 30 & 511), 0x12003)
        vm.memory.write_u64(0x12000 + 8 * (GVA >> 21 & 511), GPA | 0x83)
        # And the first 2 MiB, where the code is, are themselves.
        vm.memory.write_u64(0x10000, 0x13003)
        vm.memory.write_u64(0x13000, 0x14003)
        vm.memory.write_u64(0x14000, 0x83)
        vm.vcpus[0].regs.cr3 = 0x10000

        before = backed_pages(vm)
        print(f"the guest halts: {vm.run(timeout=20).reason.value}")
        print(f"pages that the host had to find for it: {backed_pages(vm) - before}")

        gpa = vm.translate(GVA + 5)
        assert gpa is not None
        hva = vm.memory.hva(gpa)
        ctypes.c_char.from_address(hva).value = b"!"
        print(f"GVA {GVA + 5:#x} -> GPA {gpa:#x} -> HVA {hva:#x}")
        print(f"what is written at the HVA is at the GPA: {bytes(vm.memory[gpa : gpa + 1])!r}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "auto")
