"""The engine as C sees it: library functions, callbacks, and a page of machine code.

Stopping is one reason for the machine code. `uc_emu_stop` from another thread leaves RIP in the
middle of what has already happened, and from a hook it lets the rest of the translated block run.
These stops are exact:

- at the beginning of a block. A hook runs there, so it must cost next to nothing: it tests a word
  that a kick sets, and calls `uc_emu_stop` if it is not zero.
- in a port access. Unicorn has then written the whole CPU state back, so the block can be left by
  `cpu_loop_exit`, once the callback has finished the instruction by itself. That function never
  returns, so Python must not be on the stack: a stub calls the callback, then tests a second word.
- in MMIO likewise, but that the instruction is left where it began; see replay.py.

Exceptions are the other. Unicorn reports them and delivers none, but QEMU's function for that is
still in it. It leaves by longjmp where the delivery faults, so it, too, must not have Python above
it on the stack: a stub notes the exception and calls it.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Callable
from typing import Protocol

from vmexit.core.errors import HostError

UNICORN_VERSION = "2.1.4"

# Byte offsets in CPUX86State that machine code uses; see cpu_state.py.
EIP = 0x80
ERROR_CODE = 0x1508

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

    KICK = 0  # not zero: stop at the next block, or after the access under way
    ATTENTION = 1  # not zero: stop at the next block
    STOPPED = 2  # the block hook did stop
    LEAVE = 3  # after an access, 1: leave the block at once; 2: raise an exception instead
    HOLD = 4  # not zero: do not stop at a block
    BLOCKS = 5  # counts blocks: with RIP it names one execution of one instruction
    LOADS = 6  # not zero: an instruction is about to access MMIO, rather than the page walk
    SLICE_END = 7  # stop at the block with this number
    VECTOR = 8  # of the exception to raise
    ERROR = 9  # and its error code
    EXCEPTIONS = 10  # counts exceptions that were delivered
    # The last ones: vector (u32), error code (u32), RIP (u64).
    RING = 16
    RING_SIZE = 4


LEAVE_BLOCK, RAISE = 1, 2  # values of LEAVE


class Stubs:
    """A page of machine code made for one engine, and the words it tests.

    x86-64 System V calling convention: arguments in rdi, rsi, …; at entry rsp is 8 off 16.
    """

    def __init__(self, library: Library, engine: int, cpu: int, state: int) -> None:
        """`cpu` is the engine's CPUState, `state` its CPUX86State."""
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        # The words live on a page of their own: the code page becomes read-only.
        self._words = mmap.mmap(-1, mmap.PAGESIZE)
        self._words_at = ctypes.addressof(ctypes.c_char.from_buffer(self._words))
        self.view = memoryview(self._words).cast("I")
        self._used = 0
        self._emu_stop = library.address("uc_emu_stop")
        self._loop_exit = library.address("cpu_loop_exit_x86_64")
        self._raise = library.address("raise_exception_err_x86_64")
        self._deliver = library.address("x86_cpu_do_interrupt_x86_64")
        self._engine = engine
        self._cpu = cpu
        self._state = state
        self.block_hook = self._block_hook()
        self.exception_hook = self._exception_hook()
        self.invalid_hook = self._invalid_hook()

    def _emit(self, code: bytes) -> int:
        at = self._used
        assert at + len(code) <= mmap.PAGESIZE
        self._page[at : at + len(code)] = code
        self._used = -(-(at + len(code)) // 16) * 16
        return self._base + at

    def _block_hook(self) -> int:
        """The hook at the beginning of each block; rdi is the engine already."""
        return self._emit(
            b"\x48\xb8" + _quad(self._words_at)  # mov rax, words
            + b"\xff\x40\x14"  # inc dword [rax + 20]: blocks
            + b"\x48\x83\x38\x00"  # cmp qword [rax], 0: kick, attention
            + b"\x75\x09"  # jne +9
            + b"\x8b\x48\x14"  # mov ecx, [rax + 20]
            + b"\x3b\x48\x1c"  # cmp ecx, [rax + 28]: slice end
            + b"\x74\x01"  # je +1
            + b"\xc3"  # ret
            + b"\x83\x78\x10\x00"  # cmp dword [rax + 16], 0: hold
            + b"\x74\x01"  # je +1
            + b"\xc3"  # ret
            + b"\xc7\x40\x08\x01\x00\x00\x00"  # mov dword [rax + 8], 1: stopped
            + b"\x48\xb8" + _quad(self._emu_stop)  # mov rax, uc_emu_stop
            + b"\xff\xe0"  # jmp rax
        )  # fmt: skip

    def _exception_hook(self) -> int:
        """UC_HOOK_INTR: note the exception (vector in esi) and deliver it; then as for a block.

        An endless chain of exceptions may never reach a block.
        """
        return self._emit(
            b"\x48\xb8" + _quad(self._words_at)  # mov rax, words
            + b"\x8b\x48\x28"  # mov ecx, [rax + 40]: exceptions
            + b"\xff\x40\x28"  # inc dword [rax + 40]
            + b"\x83\xe1\x03"  # and ecx, 3
            + b"\xc1\xe1\x04"  # shl ecx, 4
            + b"\x48\x8d\x4c\x08\x40"  # lea rcx, [rax + rcx + 64]: ring
            + b"\x89\x31"  # mov [rcx], esi
            + b"\x48\xba" + _quad(self._state)  # mov rdx, state
            + b"\x44\x8b\x82" + struct.pack("<I", ERROR_CODE)  # mov r8d, [rdx + ERROR_CODE]
            + b"\x44\x89\x41\x04"  # mov [rcx + 4], r8d
            + b"\x4c\x8b\x82" + struct.pack("<I", EIP)  # mov r8, [rdx + EIP]
            + b"\x4c\x89\x41\x08"  # mov [rcx + 8], r8
            + b"\x48\x83\xec\x08"  # sub rsp, 8
            + b"\x48\xbf" + _quad(self._cpu)  # mov rdi, cpu
            + b"\x48\xb8" + _quad(self._deliver)  # mov rax, x86_cpu_do_interrupt
            + b"\xff\xd0"  # call rax
            + b"\x48\x83\xc4\x08"  # add rsp, 8
            + b"\x48\xbf" + _quad(self._engine)  # mov rdi, engine
            + b"\x48\xb8" + _quad(self.block_hook)  # mov rax, block hook
            + b"\xff\xe0"  # jmp rax
        )  # fmt: skip

    def _invalid_hook(self) -> int:
        """UC_HOOK_INSN_INVALID: #UD, which has a hook of its own; true says that it was handled."""
        return self._emit(
            b"\x48\x83\xec\x08"  # sub rsp, 8
            + b"\xbe\x06\x00\x00\x00"  # mov esi, 6
            + b"\x48\xb8" + _quad(self.exception_hook)  # mov rax, exception hook
            + b"\xff\xd0"  # call rax
            + b"\xb8\x01\x00\x00\x00"  # mov eax, 1
            + b"\x48\x83\xc4\x08"  # add rsp, 8
            + b"\xc3"  # ret
        )  # fmt: skip

    def leaving_hook(self, callback: int) -> int:
        """Call `callback` with the arguments as they are; leave the block if it asked to."""
        return self._emit(
            b"\x48\x83\xec\x08"  # sub rsp, 8
            + b"\x48\xb8" + _quad(callback)  # mov rax, callback
            + b"\xff\xd0"  # call rax: what it returns stays in rax
            + b"\x48\xb9" + _quad(self._words_at)  # mov rcx, words
            + b"\x8b\x51\x0c"  # mov edx, [rcx + 12]: leave
            + b"\x85\xd2"  # test edx, edx
            + b"\x75\x05"  # jne +5
            + b"\x48\x83\xc4\x08"  # add rsp, 8
            + b"\xc3"  # ret
            + b"\xc7\x41\x0c\x00\x00\x00\x00"  # mov dword [rcx + 12], 0
            + b"\x83\xfa\x02"  # cmp edx, 2: raise
            + b"\x74\x2c"  # je +44
            + b"\x48\xbf" + _quad(self._engine)  # mov rdi, engine
            + b"\x48\xb8" + _quad(self._emu_stop)  # mov rax, uc_emu_stop
            + b"\xff\xd0"  # call rax
            + b"\x48\xbf" + _quad(self._cpu)  # mov rdi, cpu
            + b"\x48\xb8" + _quad(self._loop_exit)  # mov rax, cpu_loop_exit
            + b"\xff\xd0"  # call rax: does not return
            + b"\x48\xbf" + _quad(self._state)  # mov rdi, state
            + b"\x8b\x71\x20"  # mov esi, [rcx + 32]: vector
            + b"\x8b\x51\x24"  # mov edx, [rcx + 36]: error code
            + b"\x48\xb8" + _quad(self._raise)  # mov rax, raise_exception_err
            + b"\xff\xd0"  # call rax: does not return
        )  # fmt: skip

    def unaligned_hook(self, callback: int) -> int:
        """A memory hook: handled, and for an access that is not aligned `callback` says so."""
        return self._emit(
            b"\x8d\x41\xff"  # lea eax, [rcx - 1]: the size is in ecx
            + b"\x85\xc2"  # test edx, eax: the address is in rdx
            + b"\x75\x13"  # jne +19
            + b"\x48\xb8" + _quad(self._words_at + 4 * StopWords.LOADS)  # mov rax, &loads
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
