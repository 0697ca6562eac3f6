"""Machine code for the hooks of an engine, and the words that it tests.

Stopping is one reason for the machine code. `uc_emu_stop` from another thread leaves RIP in the
middle of what has already happened, and from a hook it lets the rest of the translated block run.
These stops are exact:

- at the beginning of a block, where the engine itself tests for a stop; see stopping.py. A stub
  at the entry of the engine's loop sees what was asked for before.
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

from vmexit.accel.soft.layout import (
    EFER,
    EIP,
    ERROR_CODE,
    EXCEPTION_IS_INT,
    FLAT_CODE_64,
    FLAT_DATA,
    FMASK,
    HF_ADDSEG,
    HF_CPL,
    HF_CS32,
    HF_CS64,
    HF_LMA,
    HF_SS32,
    HFLAGS,
    LSTAR,
    SEGMENT,
    STAR,
    SYSCALL_LENGTH,
)
from vmexit.accel.soft.native import Library
from vmexit.arch.x86.registers import EFER_LMA, EFER_SCE


class StopWords:
    """The words that the machine code tests; `view` indexes them as 32-bit integers."""

    KICK = 0  # not zero: stop at the next block, or after the access under way
    ATTENTION = 1  # not zero: stop at the next block
    LEAVE = 3  # after an access, 1: leave the block at once; 2: raise an exception instead
    HOLD = 4  # not zero: do not stop at a block
    BLOCKS = 5  # counts blocks, where several vCPUs take turns
    LOADS = 6  # not zero: an instruction is about to access MMIO, rather than the page walk
    SLICE_END = 7  # stop at the block with this number
    VECTOR = 8  # of the exception to raise
    ERROR = 9  # and its error code
    EXCEPTIONS = 10  # counts exceptions that were delivered
    DELIVERING = 11  # not zero: the accesses are those of a delivery, which nothing may leave
    HIT = 12  # not zero: the CPU has come to a breakpoint
    WATCHED = 13  # not zero: memory was accessed that is watched; one more than its number
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
        self._enter = library.address("x86_cpu_exec_enter_x86_64")
        self._breakpoint = library.address("breakpoint_handler_x86_64")
        self._interrupt = library.address("x86_cpu_exec_interrupt_x86_64")
        self._read_flags = library.address("helper_read_eflags_x86_64")
        self._write_flags = library.address("helper_write_eflags_x86_64")
        self._read_code = library.address("cpu_ldub_code_x86_64")
        self._engine = engine
        self._cpu = cpu
        self._state = state
        self._stop_if_asked = self._emit(
            b"\x48\xb8" + _quad(self._words_at)  # mov rax, words
            + b"\x48\x83\x38\x00"  # cmp qword [rax], 0: kick, attention
            + b"\x75\x01"  # jne +1
            + b"\xc3"  # ret
            + self._stop_unless_held()
        )  # fmt: skip
        self.entry = self._entry()
        self.interrupt = self._interrupt_stub()
        self.breakpoint = self._breakpoint_stub()
        self.watch_hook = self._watch_hook()
        self.instruction_hook = self._instruction_hook()
        self.turn_hook = self._turn_hook()
        self.exception_hook = self._exception_hook()
        self.invalid_hook = self._invalid_hook()

    def _emit(self, code: bytes) -> int:
        at = self._used
        assert at + len(code) <= mmap.PAGESIZE
        self._page[at : at + len(code)] = code
        self._used = -(-(at + len(code)) // 16) * 16
        return self._base + at

    def _stop_unless_held(self) -> bytes:
        """Behind it nothing comes; rax is the words, rdi the engine."""
        return (
            b"\x83\x78\x10\x00"  # cmp dword [rax + 16], 0: hold
            + b"\x74\x01"  # je +1
            + b"\xc3"  # ret
            + _jump(self._emu_stop)  # uc_emu_stop
        )  # fmt: skip

    def _entry(self) -> int:
        """For QEMU's cpu_exec_enter(cpu): the engine has forgotten what was asked before."""
        return self._emit(
            b"\x48\x83\xec\x08"  # sub rsp, 8
            + _call(self._enter)  # x86_cpu_exec_enter
            + b"\x48\x83\xc4\x08"  # add rsp, 8
            + b"\x48\xbf" + _quad(self._engine)  # mov rdi, engine
            + _jump(self._stop_if_asked)  # stop_if_asked
        )  # fmt: skip

    def _interrupt_stub(self) -> int:
        """In place of QEMU's cpu_exec_interrupt(cpu, request): it delivers. It may not return."""
        return self._emit(
            b"\x48\x83\xec\x08"  # sub rsp, 8
            + b"\x48\xb8" + _quad(self._words_at)  # mov rax, words
            + b"\xc7\x40\x2c\x01\x00\x00\x00"  # mov dword [rax + 44], 1: delivering
            + _call(self._interrupt)  # x86_cpu_exec_interrupt
            + b"\x48\xb9" + _quad(self._words_at)  # mov rcx, words
            + b"\xc7\x41\x2c\x00\x00\x00\x00"  # mov dword [rcx + 44], 0
            + b"\x48\x83\xc4\x08"  # add rsp, 8
            + b"\xc3"  # ret: al says whether one was delivered
        )  # fmt: skip

    def _breakpoint_stub(self) -> int:
        """In place of QEMU's debug_excp_handler(cpu): note that it is the debugger's, and stop.

        The guest's own, by its debug registers, become a #DB in there and do not return.
        """
        return self._emit(
            b"\x48\x83\xec\x08"  # sub rsp, 8
            + _call(self._breakpoint)  # breakpoint_handler
            + b"\x48\x83\xc4\x08"  # add rsp, 8
            + b"\x48\xb8" + _quad(self._words_at)  # mov rax, words
            + b"\xc7\x40\x30\x01\x00\x00\x00"  # mov dword [rax + 48], 1: hit
            + b"\x48\xbf" + _quad(self._engine)  # mov rdi, engine
            + _jump(self._emu_stop)  # uc_emu_stop
        )  # fmt: skip

    def _watch_hook(self) -> int:
        """UC_HOOK_MEM_READ or _WRITE around what is watched: note its number.

        The hook's user data, the sixth argument, points to that and to the first GPA that counts.
        The address is in rdx, the size in ecx. The first of an instruction is what stops it.
        """
        return self._emit(
            b"\x48\xb8" + _quad(self._words_at)  # mov rax, words
            + b"\x48\x01\xca"  # add rdx, rcx
            + b"\x49\x3b\x51\x08"  # cmp rdx, [r9 + 8]: the first GPA
            + b"\x76\x0d"  # jbe +13
            + b"\x83\x78\x34\x00"  # cmp dword [rax + 52], 0: watched
            + b"\x75\x07"  # jne +7
            + b"\x45\x8b\x01"  # mov r8d, [r9]
            + b"\x44\x89\x40\x34"  # mov [rax + 52], r8d
            + b"\xc3"  # ret
        )  # fmt: skip

    def _instruction_hook(self) -> int:
        """UC_HOOK_CODE, before each instruction: stop if memory was accessed that is watched.

        Or if there is any other reason to: this is as exact as the beginning of a block.
        """
        return self._emit(
            b"\x48\xb8" + _quad(self._words_at)  # mov rax, words
            + b"\x83\x78\x34\x00"  # cmp dword [rax + 52], 0: watched
            + b"\x75\x07"  # jne +7
            + b"\x48\x83\x38\x00"  # cmp qword [rax], 0: kick, attention
            + b"\x75\x01"  # jne +1
            + b"\xc3"  # ret
            + _jump(self._emu_stop)  # uc_emu_stop
        )  # fmt: skip

    def _turn_hook(self) -> int:
        """UC_HOOK_BLOCK where vCPUs take turns: a turn is so many blocks; rdi is the engine."""
        return self._emit(
            b"\x48\xb8" + _quad(self._words_at)  # mov rax, words
            + b"\xff\x40\x14"  # inc dword [rax + 20]: blocks
            + b"\x8b\x48\x14"  # mov ecx, [rax + 20]
            + b"\x3b\x48\x1c"  # cmp ecx, [rax + 28]: slice end
            + b"\x74\x01"  # je +1
            + b"\xc3"  # ret
            + self._stop_unless_held()
        )  # fmt: skip

    def _exception_hook(self) -> int:
        """UC_HOOK_INTR: note the exception (vector in esi) and deliver it; then stop if asked to.

        An endless chain of exceptions may never reach a block. In long mode the engine makes the
        error code for a gate that it cannot use from twice the vector, which is mended here
        (SDM vol. 3, 6.13: bit 1 says that it is about the IDT). And for INT it has stepped over
        the instruction, to which a fault in the delivery would have to return; where it goes on
        otherwise is noted elsewhere.
        """
        back = (
            b"\xb8\x02\x00\x00\x00"  # mov eax, 2: INT with a number
            + b"\x8d\x4e\xfd"  # lea ecx, [rsi - 3]
            + b"\x83\xf9\x01"  # cmp ecx, 1: INT3, INTO
            + b"\x77\x02"  # ja +2
            + b"\xb0\x01"  # mov al, 1
            + b"\x48\x29\x82" + _long(EIP)  # sub [rdx + EIP], rax
        )  # fmt: skip
        mend = (
            b"\x44\x8b\x82" + _long(ERROR_CODE)  # mov r8d, [rdx + ERROR_CODE]
            + b"\x41\xf6\xc0\x02"  # test r8b, 2
            + b"\x74\x18"  # je +24
            + b"\x45\x89\xc1"  # mov r9d, r8d
            + b"\x41\x83\xe1\x07"  # and r9d, 7
            + b"\x41\x83\xe0\xf0"  # and r8d, -16
            + b"\x41\xd1\xe8"  # shr r8d, 1
            + b"\x45\x09\xc8"  # or r8d, r9d
            + b"\x44\x89\x82" + _long(ERROR_CODE)  # mov [rdx + ERROR_CODE], r8d
        )  # fmt: skip
        return self._emit(
            b"\x48\xba" + _quad(self._state)  # mov rdx, state
            + b"\x83\xba" + _long(EXCEPTION_IS_INT) + b"\x00"  # cmp dword [rdx + IS_INT], 0
            + b"\x74" + bytes((len(back),))  # je behind it
            + back
            + b"\x8d\x46\xf6"  # lea eax, [rsi - 10]: #TS, #NP, #SS, #GP
            + b"\x83\xf8\x03"  # cmp eax, 3
            + b"\x77" + bytes((12 + len(mend),))  # ja behind it
            + b"\xf7\x82" + _long(HFLAGS) + _long(HF_LMA)  # test dword [rdx + HFLAGS], LMA
            + b"\x74" + bytes((len(mend),))  # je behind it
            + mend
            + b"\x48\xb8" + _quad(self._words_at)  # mov rax, words
            + b"\x8b\x48\x28"  # mov ecx, [rax + 40]: exceptions
            + b"\xff\x40\x28"  # inc dword [rax + 40]
            + b"\x83\xe1\x03"  # and ecx, 3
            + b"\xc1\xe1\x04"  # shl ecx, 4
            + b"\x48\x8d\x4c\x08\x40"  # lea rcx, [rax + rcx + 64]: ring
            + b"\x89\x31"  # mov [rcx], esi
            + b"\x44\x8b\x82" + _long(ERROR_CODE)  # mov r8d, [rdx + ERROR_CODE]
            + b"\x44\x89\x41\x04"  # mov [rcx + 4], r8d
            + b"\x4c\x8b\x82" + _long(EIP)  # mov r8, [rdx + EIP]
            + b"\x4c\x89\x41\x08"  # mov [rcx + 8], r8
            + b"\xc7\x40\x2c\x01\x00\x00\x00"  # mov dword [rax + 44], 1: delivering
            + b"\x48\x83\xec\x08"  # sub rsp, 8
            + b"\x48\xbf" + _quad(self._cpu)  # mov rdi, cpu
            + _call(self._deliver)  # x86_cpu_do_interrupt
            + b"\x48\xb8" + _quad(self._words_at)  # mov rax, words
            + b"\xc7\x40\x2c\x00\x00\x00\x00"  # mov dword [rax + 44], 0
            + b"\x48\xbf" + _quad(self._engine)  # mov rdi, engine
            + _call(self.turn_hook)  # turn hook: it counts as a block
            + b"\x48\x83\xc4\x08"  # add rsp, 8
            + b"\x48\xbf" + _quad(self._engine)  # mov rdi, engine
            + _jump(self._stop_if_asked)  # stop_if_asked
        )  # fmt: skip

    def _invalid_hook(self) -> int:
        """UC_HOOK_INSN_INVALID: #UD, which has a hook of its own; true says that it was handled.

        INT1 is invalid to the engine, too: a #DB behind it (SDM vol. 2), and that has the other.
        """
        undefined = (
            b"\xbe\x06\x00\x00\x00"  # mov esi, 6
            + _call(self.exception_hook)  # exception hook
            + b"\xb8\x01\x00\x00\x00"  # mov eax, 1
            + b"\x48\x83\xc4\x08"  # add rsp, 8
            + b"\xc3"  # ret
        )  # fmt: skip
        return self._emit(
            b"\x48\x83\xec\x08"  # sub rsp, 8
            + b"\x48\xbf" + _quad(self._state)  # mov rdi, state
            + b"\x48\x8b\xb7" + _long(EIP)  # mov rsi, [rdi + EIP]
            + b"\x48\x03\xb7" + _long(SEGMENT["cs"] + 8)  # add rsi, [rdi + base of CS]
            + _call(self._read_code)  # cpu_ldub_code
            + b"\x3c\xf1"  # cmp al, 0xf1: INT1
            + b"\x74" + bytes((len(undefined),))  # je behind it
            + undefined
            + b"\x48\xbf" + _quad(self._state)  # mov rdi, state
            + b"\x48\xff\x87" + _long(EIP)  # inc qword [rdi + EIP]
            + b"\xbe\x01\x00\x00\x00"  # mov esi, 1
            + b"\x31\xd2"  # xor edx, edx
            + _call(self._raise)  # raise_exception_err: does not return
        )  # fmt: skip

    def find_region(self, start: int, end: int, region: int, otherwise: int) -> int:
        """In place of find_memory_mapping(engine, gpa): `region` for `[start, end)`, quickly."""
        return self._emit(
            b"\x48\x89\xf0"  # mov rax, rsi
            + b"\x48\xb9" + _quad(start)  # mov rcx, start
            + b"\x48\x29\xc8"  # sub rax, rcx
            + b"\x48\xb9" + _quad(end - start)  # mov rcx, size
            + b"\x48\x39\xc8"  # cmp rax, rcx
            + b"\x48\xb8" + _quad(region)  # mov rax, region
            + b"\x72\x0c"  # jb behind the jump
            + _jump(otherwise)  # otherwise
            + b"\xc3"  # ret
        )  # fmt: skip

    def leaving_hook(self, callback: int) -> int:
        """Call `callback` with the arguments as they are; leave the block if it asked to."""
        return self._emit(
            b"\x48\x83\xec\x08"  # sub rsp, 8
            + _call(callback)  # callback: what it returns stays in rax
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
            + _call(self._emu_stop)  # uc_emu_stop
            + b"\x48\xbf" + _quad(self._cpu)  # mov rdi, cpu
            + _call(self._loop_exit)  # cpu_loop_exit: does not return
            + b"\x48\xbf" + _quad(self._state)  # mov rdi, state
            + b"\x8b\x71\x20"  # mov esi, [rcx + 32]: vector
            + b"\x8b\x51\x24"  # mov edx, [rcx + 36]: error code
            + _call(self._raise)  # raise_exception_err: does not return
        )  # fmt: skip

    def syscall_hook(self, otherwise: int) -> int:
        """SYSCALL from 64-bit code, over which the engine only steps (SDM vol. 2; APM vol. 3).

        Any other SYSCALL goes to the hook `otherwise`. The engine adds the length to RIP later.
        """
        begin = (
            b"\x53"  # push rbx
            + b"\x48\xbb" + _quad(self._state)  # mov rbx, state
            + b"\x8b\x83" + _long(EFER)  # mov eax, [rbx + EFER]
            + b"\x25" + _long(EFER_SCE | EFER_LMA)  # and eax, SCE | LMA
            + b"\x3d" + _long(EFER_SCE | EFER_LMA)  # cmp eax, SCE | LMA
        )  # fmt: skip
        is_64 = b"\xf7\x83" + _long(HFLAGS) + _long(HF_CS64)  # test dword [rbx + HFLAGS], CS64
        body = (
            b"\x48\x89\xdf"  # mov rdi, rbx
            + _call(self._read_flags)  # helper_read_eflags: all flags but RF and VM
            + b"\x89\xc0"  # mov eax, eax
            + b"\x48\x89\x43\x58"  # mov [rbx + R11], rax
            + b"\x48\x8b\x8b" + _long(EIP)  # mov rcx, [rbx + EIP]
            + b"\x48\x83\xc1" + bytes((SYSCALL_LENGTH,))  # add rcx, 2
            + b"\x48\x89\x4b\x08"  # mov [rbx + RCX], rcx
            + b"\x8b\x8b" + _long(FMASK)  # mov ecx, [rbx + FMASK]
            + b"\xf7\xd1"  # not ecx
            + b"\x21\xc8"  # and eax, ecx
            + b"\x89\xc6"  # mov esi, eax
            + b"\x48\x89\xdf"  # mov rdi, rbx
            + b"\xba\xff\xff\xff\xff"  # mov edx, -1: load all of them
            + _call(self._write_flags)  # helper_write_eflags
            + b"\x8b\x83" + _long(STAR + 4)  # mov eax, [rbx + STAR + 4]
            + b"\x25\xfc\xff\x00\x00"  # and eax, 0xfffc
            + self._store_segment(SEGMENT["cs"], FLAT_CODE_64)
            + b"\x83\xc0\x08"  # add eax, 8
            + self._store_segment(SEGMENT["ss"], FLAT_DATA)
            + b"\x8b\x83" + _long(HFLAGS)  # mov eax, [rbx + HFLAGS]
            + b"\x25" + _long(~(HF_CPL | HF_ADDSEG) & 0xFFFF_FFFF)  # and eax, ~(CPL | ADDSEG)
            + b"\x0d" + _long(HF_CS64 | HF_CS32 | HF_SS32)  # or eax, CS64 | CS32 | SS32
            + b"\x89\x83" + _long(HFLAGS)  # mov [rbx + HFLAGS], eax
            + b"\x48\x8b\x83" + _long(LSTAR)  # mov rax, [rbx + LSTAR]
            + b"\x48\x83\xe8" + bytes((SYSCALL_LENGTH,))  # sub rax, 2
            + b"\x48\x89\x83" + _long(EIP)  # mov [rbx + EIP], rax
            + b"\x5b"  # pop rbx
            + b"\xc3"  # ret
        )  # fmt: skip
        # Jumps over all of `body`, and what is between.
        jump = 6  # bytes of a jcc with 32 bits
        middle = is_64 + b"\x0f\x84" + _long(len(body))  # je otherwise
        begin += b"\x0f\x85" + _long(len(is_64) + jump + len(body))  # jne otherwise
        end = b"\x5b" + _jump(otherwise)  # pop rbx
        return self._emit(begin + middle + body + end)

    def _store_segment(self, at: int, attributes: int) -> bytes:
        """Fill in the cache of a flat segment at `rbx + at`; the selector is in eax."""
        return (
            b"\x89\x83" + _long(at)  # mov [rbx + at], eax
            + b"\x48\xc7\x83" + _long(at + 8) + _long(0)  # mov qword [rbx + at + 8], 0
            + b"\xc7\x83" + _long(at + 16) + _long(0xFFFF_FFFF)  # mov dword [rbx + at + 16], -1
            + b"\xc7\x83" + _long(at + 20) + _long(attributes)  # mov dword [rbx + at + 20], …
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
            + _jump(callback)  # callback
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


def _call(function: int) -> bytes:
    return b"\x48\xb8" + _quad(function) + b"\xff\xd0"  # mov rax, function; call rax


def _jump(function: int) -> bytes:
    return b"\x48\xb8" + _quad(function) + b"\xff\xe0"  # mov rax, function; jmp rax


def _long(value: int) -> bytes:
    return struct.pack("<I", value)


def _quad(value: int) -> bytes:
    return struct.pack("<Q", value)
