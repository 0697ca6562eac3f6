"""The engine as C sees it: library functions, callbacks, and two pieces of machine code.

Stopping is the reason for the machine code. `uc_emu_stop` from another thread leaves RIP in the
middle of what has already happened, and from a hook it lets the rest of the translated block run.
These stops are exact:

- at the beginning of a block. A hook runs there, so it must cost next to nothing: it tests a word
  that a kick sets, and calls `uc_emu_stop` if it is not zero.
- in a port access. Unicorn has then written the whole CPU state back, so the block can be left by
  `cpu_loop_exit`, once the callback has finished the instruction by itself. That function never
  returns, so Python must not be on the stack: a stub calls the callback, then tests a second word.
- in MMIO likewise, but that the instruction is left where it began; see replay.py.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Callable
from typing import Protocol

from vmexit.core.errors import HostError

UNICORN_VERSION = "2.1.4"

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
# void (*)(uc, interrupt number, data): UC_HOOK_INTR.
InterruptCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
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
    def reg_write(self, reg_id: int, value: int | tuple[int, int, int, int]) -> object: ...
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
        self.get_cpu = self.cdll.qemu_get_cpu_x86_64
        self.get_cpu.restype = ctypes.c_void_p
        self.get_cpu.argtypes = [ctypes.c_void_p, ctypes.c_int]
        # A MemoryRegion by guest physical address.
        self.find_region = self.cdll.find_memory_mapping_x86_64
        self.find_region.restype = ctypes.c_void_p
        self.find_region.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
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
        self.emu_stop = self.cdll.uc_emu_stop
        self.emu_stop.argtypes = [ctypes.c_void_p]
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
    ) -> None:
        """Have `function` called; begin > end means at every address. Raises HostError."""
        handle = ctypes.c_size_t()
        error = self._hook_add(
            engine, ctypes.byref(handle), kind, function, None, begin, end, instruction
        )
        if error:
            raise HostError(f"Unicorn refused hook {kind} (error {error}); use --accel kvm")

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


class StopWords:
    """The words that the machine code tests; `view` indexes them as 32-bit integers."""

    KICK = 0  # not zero: stop at the next block
    STOPPED = 1  # the block hook did stop
    LEAVE = 2  # not zero after an access: leave the block at once
    HOLD = 3  # not zero: do not stop at a block, KICK or not
    BLOCKS = 4  # counts blocks: with RIP it names one execution of one instruction
    LOADS = 5  # not zero: an instruction is about to access MMIO, rather than the page walk


class Stubs:
    """A page of machine code made for one engine, and the words it tests.

    x86-64 System V calling convention: arguments in rdi, rsi, …; at entry rsp is 8 off 16.
    """

    def __init__(self, library: Library, engine: int, cpu: int) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        # The words live on a page of their own: the code page becomes read-only.
        self._words = mmap.mmap(-1, mmap.PAGESIZE)
        self._words_at = ctypes.addressof(ctypes.c_char.from_buffer(self._words))
        self.view = memoryview(self._words).cast("I")
        self._used = 0
        self._emu_stop = library.address("uc_emu_stop")
        self._loop_exit = library.address("cpu_loop_exit_x86_64")
        self._engine = engine
        self._cpu = cpu

    def _word(self, index: int) -> int:
        return self._words_at + 4 * index

    def _emit(self, code: bytes) -> int:
        at = self._used
        self._page[at : at + len(code)] = code
        self._used = -(-(at + len(code)) // 16) * 16
        return self._base + at

    def block_hook(self) -> int:
        """The hook at the beginning of each block; rdi is the engine already."""
        return self._emit(
            b"\x48\xb8" + _quad(self._word(StopWords.KICK))  # mov rax, &kick
            + b"\xff\x40\x10"  # inc dword [rax + 16]: blocks
            + b"\x83\x38\x00"  # cmp dword [rax], 0
            + b"\x75\x01"  # jne +1
            + b"\xc3"  # ret
            + b"\x83\x78\x0c\x00"  # cmp dword [rax + 12], 0: hold
            + b"\x74\x01"  # je +1
            + b"\xc3"  # ret
            + b"\xc7\x40\x04\x01\x00\x00\x00"  # mov dword [rax + 4], 1: stopped
            + b"\x48\xb8" + _quad(self._emu_stop)  # mov rax, uc_emu_stop
            + b"\xff\xe0"  # jmp rax
        )  # fmt: skip

    def leaving_hook(self, callback: int) -> int:
        """Call `callback` with the arguments as they are; leave the block if it asked to."""
        return self._emit(
            b"\x48\x83\xec\x08"  # sub rsp, 8
            + b"\x48\xb8" + _quad(callback)  # mov rax, callback
            + b"\xff\xd0"  # call rax: what it returns stays in rax
            + b"\x48\xb9" + _quad(self._word(StopWords.LEAVE))  # mov rcx, &leave
            + b"\x83\x39\x00"  # cmp dword [rcx], 0
            + b"\x75\x05"  # jne +5
            + b"\x48\x83\xc4\x08"  # add rsp, 8
            + b"\xc3"  # ret
            + b"\xc7\x01\x00\x00\x00\x00"  # mov dword [rcx], 0
            + b"\x48\xbf" + _quad(self._engine)  # mov rdi, engine
            + b"\x48\xb8" + _quad(self._emu_stop)  # mov rax, uc_emu_stop
            + b"\xff\xd0"  # call rax
            + b"\x48\xbf" + _quad(self._cpu)  # mov rdi, cpu
            + b"\x48\xb8" + _quad(self._loop_exit)  # mov rax, cpu_loop_exit
            + b"\xff\xd0"  # call rax: does not return
        )  # fmt: skip

    def unaligned_hook(self, callback: int) -> int:
        """A memory hook: handled, and for an access that is not aligned `callback` says so."""
        return self._emit(
            b"\x8d\x41\xff"  # lea eax, [rcx - 1]: the size is in ecx
            + b"\x85\xc2"  # test edx, eax: the address is in rdx
            + b"\x75\x13"  # jne +19
            + b"\x48\xb8" + _quad(self._word(StopWords.LOADS))  # mov rax, &loads
            + b"\xc7\x00\x01\x00\x00\x00"  # mov dword [rax], 1
            + b"\xb0\x01"  # mov al, 1
            + b"\xc3"  # ret
            + b"\x48\xb8" + _quad(callback)  # mov rax, callback
            + b"\xff\xe0"  # jmp rax
        )  # fmt: skip

    def seal(self) -> None:
        """Make the code executable and no longer writable."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self._base), ctypes.c_size_t(mmap.PAGESIZE), 5):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def close(self) -> None:
        """Unmap both pages."""
        self.view.release()
        self._words.close()
        self._page.close()


def _quad(value: int) -> bytes:
    return struct.pack("<Q", value)
