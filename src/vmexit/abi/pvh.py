"""The Xen PVH ("x86/HVM direct boot") ABI: start info, module list, memory map.

From Xen's `public/arch-x86/hvm/start_info.h` and docs/misc/pvh.pandoc. An address of 0 means that
the thing is not there.
"""

from ctypes import Structure, sizeof

from vmexit.abi.kvm_structs import u32, u64

XEN_HVM_START_MAGIC_VALUE = 0x336EC578  # "xEn3" with the highest bit of the "E" set
XEN_HVM_START_VERSION = 1  # the first with a memory map

XEN_HVM_MEMMAP_TYPE_RAM = 1
XEN_HVM_MEMMAP_TYPE_RESERVED = 2
XEN_HVM_MEMMAP_TYPE_ACPI = 3
XEN_HVM_MEMMAP_TYPE_NVS = 4

# The note in a kernel's ELF file that holds its 32-bit entry point (public/elfnote.h).
XEN_ELFNOTE_NAME = b"Xen\0"
XEN_ELFNOTE_PHYS32_ENTRY = 18


class hvm_start_info(Structure):
    _fields_ = (
        ("magic", u32),
        ("version", u32),
        ("flags", u32),
        ("nr_modules", u32),
        ("modlist_paddr", u64),
        ("cmdline_paddr", u64),
        ("rsdp_paddr", u64),
        ("memmap_paddr", u64),
        ("memmap_entries", u32),
        ("reserved", u32),
    )


class hvm_modlist_entry(Structure):
    _fields_ = (("paddr", u64), ("size", u64), ("cmdline_paddr", u64), ("reserved", u64))


class hvm_memmap_table_entry(Structure):
    _fields_ = (("addr", u64), ("size", u64), ("type", u32), ("reserved", u32))


START_INFO_SIZE = sizeof(hvm_start_info)
MODLIST_ENTRY_SIZE = sizeof(hvm_modlist_entry)
MEMMAP_ENTRY_SIZE = sizeof(hvm_memmap_table_entry)
