"""The engine as C sees it: library functions, and the types of callbacks."""

import ctypes
from collections.abc import Callable, Iterable
from typing import Protocol

from vmexit.core.errors import HostError

UNICORN_VERSION = "2.1.4"


# How check_exit_request() begins: mov rsi, [rdi + 0x9970]: the engine; cmp byte [rsi + …], 0.
_CHECK_BEGINS = bytes.fromhex("48 8b b7 70 99 00 00 80 be")
_ENGINE_SIZE = 0x3A00  # a lower limit, in bytes

# Where an engine has the function that finds a MemoryRegion by guest physical address.
_MEMORY_MAPPING = 0x120

# BP_GDB of QEMU: a breakpoint of the debugger rather than of the guest.
_BP_GDB = 0x10

# uc_ctl() requests without arguments: the number, and "write" in the two highest bits.
_CTL_TB_FLUSH = 10 | 1 << 30
_CTL_TLB_FLUSH = 11 | 1 << 30

# void (*)(uc, port, size, value, data) and uint32_t (*)(uc, port, size, data): UC_HOOK_INSN.
OutCallback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p
)
InCallback = ctypes.CFUNCTYPE(
    ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p
)
# void (*)(uc, data): UC_HOOK_INSN for SYSCALL and SYSENTER.
SyscallCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
# int (*)(uc, data): UC_HOOK_INSN for CPUID; not 0: done.
CpuidCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
# bool (*)(uc, type, address, size, value, data): UC_HOOK_MEM_WRITE_PROT and its like.
MemoryCallback = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
)
# uint64_t (*)(uc, offset, size, data), void (*)(uc, offset, size, value, data): uc_mmio_map.
MmioReadCallback = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_void_p
)
MmioWriteCallback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p
)


class Engine(Protocol):
    """What vmexit uses of `unicorn.Uc`."""

    _uch: ctypes.c_void_p

    def reg_read(self, reg_id: int) -> int: ...
    def reg_write(self, reg_id: int, value: int | tuple[int, ...]) -> object: ...
    def msr_read(self, msr_id: int) -> int: ...
    def msr_write(self, msr_id: int, value: int) -> None: ...
    def mem_map_ptr(self, address: int, size: int, perms: int, ptr: int) -> None: ...
    def mem_protect(self, address: int, size: int, perms: int) -> None: ...
    def ctl_exits_enabled(self, enable: bool) -> None: ...
    def ctl_set_exits(self, exits: list[int]) -> None: ...


class Library:
    """libunicorn, with the types of the functions that vmexit calls by itself."""

    def __init__(self, path: str) -> None:
        """`path` is where the Python package has loaded it from."""
        self.cdll = ctypes.CDLL(path)
        # It returns at once, so that to let other Python threads run would only cost time.
        self.cpu_exit = ctypes.PyDLL(path).cpu_exit
        self.cpu_exit.argtypes = [ctypes.c_void_p]
        self.get_cpu = self.cdll.qemu_get_cpu_x86_64
        self.get_cpu.restype = ctypes.c_void_p
        self.get_cpu.argtypes = [ctypes.c_void_p, ctypes.c_int]
        # A MemoryRegion by guest physical address.
        self.find_region = self.cdll.find_memory_mapping_x86_64
        self.find_region.restype = ctypes.c_void_p
        self.find_region.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        # RAM has numbers of the engine's own: the first makes one of a host address.
        self.ram_offset = self.cdll.qemu_ram_addr_from_host_x86_64
        self.ram_offset.restype = ctypes.c_uint64
        self.ram_offset.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self.drop_translations = self.cdll.tb_invalidate_phys_range_x86_64
        self.drop_translations.restype = None
        self.drop_translations.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
        # Of breakpoints that QEMU's debugger has set.
        self._break_at = self.cdll.cpu_breakpoint_insert_x86_64
        self._break_at.argtypes = [
            ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p,
        ]  # fmt: skip
        self._break_nowhere = self.cdll.cpu_breakpoint_remove_all_x86_64
        self._break_nowhere.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._hook_del = self.cdll.uc_hook_del
        self._hook_del.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        # Variadic in C; the one argument that may follow is an int.
        self._hook_add = self.cdll.uc_hook_add
        self._hook_add.argtypes = [
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_size_t),
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_int,
        ]
        self.emu_start = self.cdll.uc_emu_start
        self.emu_start.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_size_t,
        ]
        self.mmio_map = self.cdll.uc_mmio_map
        self.mmio_map.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]

        # Four results by address: eax, ebx, ecx, edx of a leaf and a sub-leaf.
        self.cpuid = self.cdll.cpu_x86_cpuid_x86_64
        result = ctypes.POINTER(ctypes.c_uint32)
        self.cpuid.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_uint32,
            result,
            result,
            result,
            result,
        ]
        self.get_tsc = self.cdll.cpu_get_tsc_x86_64
        self.get_tsc.restype = ctypes.c_uint64
        self.get_tsc.argtypes = [ctypes.c_void_p]
        # CPUX86State, and the new value.
        self.update_dr7 = self.cdll.cpu_x86_update_dr7_x86_64
        self.update_dr7.restype = None
        self.update_dr7.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self.reset_interrupt = self.cdll.cpu_reset_interrupt
        self.reset_interrupt.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self.context_alloc = self.cdll.uc_context_alloc
        self.context_alloc.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]
        self.context_save = self.cdll.uc_context_save
        self.context_restore = self.cdll.uc_context_restore
        self.context_save.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.context_restore.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.context_free = self.cdll.uc_context_free
        self.context_free.argtypes = [ctypes.c_void_p]

        self._no_check = self._find_no_check()
        self.ctl = self.cdll.uc_ctl
        self.ctl.argtypes = [ctypes.c_void_p, ctypes.c_int]

    def hook(
        self,
        engine: int,
        kind: int,
        function: int,
        *,
        begin: int = 1,
        end: int = 0,
        instruction: int = 0,
        data: int = 0,
    ) -> int:
        """Have `function` called; begin > end means at every address.

        It gets `data` for its last argument. Returns what `unhook` takes. Raises HostError.
        """
        handle = ctypes.c_size_t()
        error = self._hook_add(
            engine, ctypes.byref(handle), kind, function, data, begin, end, instruction
        )
        if error:
            raise HostError(f"Unicorn refused hook {kind} (error {error}); use --accel kvm")
        return handle.value

    def unhook(self, engine: int, handle: int) -> None:
        """Undo `hook()`."""
        self._hook_del(engine, handle)

    def break_at(self, cpu: int, addresses: Iterable[int]) -> None:
        """Stop before the instructions at these linear addresses, and nowhere else any more."""
        self._break_nowhere(cpu, _BP_GDB)
        for address in addresses:
            self._break_at(cpu, address & 0xFFFF_FFFF_FFFF_FFFF, _BP_GDB, None)

    def check_at_accesses(self, engine: int, wanted: bool) -> None:
        """Whether to translate a test for a stop behind each memory access and instruction, too.

        There a stop comes too late to undo what the instruction did, and too early to go on behind
        it. At the beginning of a block the test is always.
        """
        ctypes.c_uint8.from_address(engine + self._no_check).value = not wanted

    def _find_no_check(self) -> int:
        """Where in an engine the byte is that leaves those tests out; the code that reads it says.

        Raises HostError if it is not that of the release which is known.
        """
        code = ctypes.string_at(self.address("check_exit_request_x86_64"), len(_CHECK_BEGINS) + 5)
        begin, at, end = code[:-5], int.from_bytes(code[-5:-1], "little"), code[-1]
        if begin != _CHECK_BEGINS or end != 0 or at > _ENGINE_SIZE:
            raise HostError(
                "this Unicorn tests for a stop otherwise than release 2.1.4 does; "
                "install unicorn==2.1.4, or use --accel kvm"
            )
        return at

    def replace_find_region(self, engine: int, function: int) -> None:
        """Have `engine` call this in place of find_memory_mapping(). Raises HostError."""
        entry = ctypes.c_uint64.from_address(engine + _MEMORY_MAPPING)
        if entry.value != address_of(self.find_region):
            raise HostError(
                "this Unicorn finds its memory otherwise than release 2.1.4 does; "
                "install unicorn==2.1.4, or use --accel kvm"
            )
        entry.value = function

    def resume_clears(self, offset: int) -> bool:
        """Whether resume_all_vcpus() begins by clearing the word at `offset` in CPUState."""
        code = ctypes.string_at(self.address("resume_all_vcpus_x86_64"), 64)
        return b"\x41\xc7\x85" + offset.to_bytes(4, "little") + bytes(4) in code

    def flush_translations(self, engine: int) -> None:
        """Forget all translated code: memory may have changed under it."""
        self.ctl(engine, _CTL_TB_FLUSH)

    def flush_tlb(self, engine: int) -> None:
        """Forget all address translations: paging may have changed."""
        self.ctl(engine, _CTL_TLB_FLUSH)

    def address(self, name: str) -> int:
        """Where the function `name` is."""
        return address_of(getattr(self.cdll, name))


def address_of(function: Callable[..., object]) -> int:
    """The address of a C function, or of a Python one made callable from C."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
