"""The PVH protocol: an ELF kernel entered in 32-bit protected mode (Xen docs/misc/pvh.pandoc)."""

from vmexit.abi.pvh import (
    MEMMAP_ENTRY_SIZE,
    MODLIST_ENTRY_SIZE,
    START_INFO_SIZE,
    XEN_HVM_START_MAGIC_VALUE,
    XEN_HVM_START_VERSION,
    hvm_memmap_table_entry,
    hvm_modlist_entry,
    hvm_start_info,
)
from vmexit.arch.x86.e820 import E820Entry
from vmexit.arch.x86.layout import KERNEL_GDT, PVH_START_INFO
from vmexit.arch.x86.registers import Table
from vmexit.arch.x86.segments import boot_gdt, general, protected_mode
from vmexit.boot.entry import BootEntry
from vmexit.core.memory import PAGE_SIZE, GuestMemory

_MODULES = PVH_START_INFO + START_INFO_SIZE
_MEMORY_MAP = _MODULES + MODLIST_ENTRY_SIZE
MAX_MEMORY_MAP = (PVH_START_INFO + PAGE_SIZE - _MEMORY_MAP) // MEMMAP_ENTRY_SIZE

_TSS_LIMIT = 0x67


def start(
    memory: GuestMemory,
    entry: int,
    *,
    cmdline: int,
    initrd: range | None,
    rsdp: int,
    memory_map: list[E820Entry],
) -> BootEntry:
    """Write the start info page and a GDT; registers to enter the kernel at `entry`.

    `cmdline` and `rsdp` are GPAs; an rsdp of 0 means that there is none.
    """
    if len(memory_map) > MAX_MEMORY_MAP:
        raise ValueError(f"the start info page has room for {MAX_MEMORY_MAP} memory ranges")
    info = hvm_start_info(
        magic=XEN_HVM_START_MAGIC_VALUE,
        version=XEN_HVM_START_VERSION,
        cmdline_paddr=cmdline,
        rsdp_paddr=rsdp,
        memmap_paddr=_MEMORY_MAP,
        memmap_entries=len(memory_map),
    )
    if initrd is not None:
        info.nr_modules, info.modlist_paddr = 1, _MODULES
        memory.write(_MODULES, bytes(hvm_modlist_entry(paddr=initrd.start, size=len(initrd))))
    memory.write(PVH_START_INFO, bytes(info))
    memory.write(
        _MEMORY_MAP,
        b"".join(bytes(hvm_memmap_table_entry(addr=a, size=s, type=t)) for a, s, t in memory_map),
    )
    gdt = boot_gdt()
    memory.write(KERNEL_GDT, gdt)
    system = protected_mode(Table(KERNEL_GDT, len(gdt) - 1))
    system = system._replace(tr=system.tr._replace(limit=_TSS_LIMIT))
    return BootEntry(general(entry) | {"rbx": PVH_START_INFO}, system)
