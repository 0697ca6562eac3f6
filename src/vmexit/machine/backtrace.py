"""How a vCPU came to where it is: the calls that have not returned, by its stack.

The chain of frame pointers in RBP, where there is one (System V ABI for x86-64, 3.2.2). Code that
is built without, as Debian's kernels with their ORC tables, leaves return addresses on the stack
which nothing links: what looks like one is then a guess, as what Linux marks with `?` in its own.
"""

import struct
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from vmexit.arch.x86.code import code_bits, linear_ip, read_linear
from vmexit.arch.x86.registers import Registers, SystemRegisters
from vmexit.core.memory import GuestMemory
from vmexit.core.symbols import SymbolTable

# A kernel stack of Linux on x86-64 has 16 KiB and is aligned to as much (THREAD_SIZE,
# Documentation/arch/x86/kernel-stacks.rst): what is guessed comes from there.
_STACK = 16 << 10
_LONGEST_CALL = 7  # FF /2 with a SIB byte and a displacement of 32 bits


class Frame(NamedTuple):
    """One call: the linear address that the vCPU is at or will return to, and that in words.

    A `guess` stood on the stack, but may be left over from a call that has returned.
    """

    address: int
    name: str
    guess: bool = False

    def __str__(self) -> str:
        return f"{self.address:#018x} {'? ' if self.guess else ''}{self.name}"


def backtrace(
    memory: GuestMemory,
    registers: Registers,
    system: SystemRegisters,
    symbols: SymbolTable,
    limit: int = 32,
) -> list[Frame]:
    """RIP, then return addresses, the innermost first: `limit` frames at most.

    The chain ends where a frame is not mapped, is not above the one before, or where what should
    be a return address does not follow a call. In 16-bit code there is only RIP.
    """
    stack = _Stack(memory, registers, system, symbols)
    here = linear_ip(registers, system)
    frames = [Frame(here, symbols.describe(here))]
    if stack.bits != 16:
        chain = list(islice(stack.chain(), max(limit, 0)))
        if chain or not symbols:
            frames += [Frame(a, _name(symbols, a)) for a in [*stack.caller_of_nothing(), *chain]]
        else:
            guesses = islice(stack.guesses(), max(limit, 0))
            frames += [Frame(a, _name(symbols, a), guess=True) for a in guesses]
    return frames[: max(limit, 0)]


def _name(symbols: SymbolTable, address: int) -> str:
    """Of a return address: it may be the end of a function, behind a call that never returns."""
    found = symbols.find(address - 1)
    return f"{address:#x}" if found is None else f"{found[0]}+{found[1] + 1:#x}"


class _Stack:
    """The stack of a vCPU, and what on it may be a return address."""

    def __init__(
        self,
        memory: GuestMemory,
        registers: Registers,
        system: SystemRegisters,
        symbols: SymbolTable,
    ) -> None:
        self.bits = code_bits(registers, system)
        self._memory = memory
        self._registers = registers
        self._system = system
        self._symbols = symbols
        self._word = 8 if self.bits == 64 else 4
        # In 64-bit mode these segments begin at 0 (Intel SDM vol. 3, 3.4.4).
        self._stack_base = 0 if self.bits == 64 else system.ss.base
        self._code_base = 0 if self.bits == 64 else system.cs.base
        self._here = linear_ip(registers, system)
        here = symbols.nearest(self._here)
        self._known = here is not None and here.is_code

    def caller_of_nothing(self) -> list[int]:
        """Where RIP is not mapped, somebody has called nothing, and is on top of the stack."""
        if read_linear(self._memory, self._system, self._here, 1):
            return []
        top = map(self._linear, self._words(self._registers["rsp"] & self._mask, 1))
        return [address for address in top if self._is_return(address, known=False)]

    def chain(self) -> Iterator[int]:
        """The return addresses by the frame pointers from RBP on."""
        frame = self._registers["rbp"] & self._mask
        while frame and not frame % self._word:
            words = self._words(frame, 2)
            if len(words) < 2:
                return
            below, address = words[0], self._linear(words[1])
            if not self._is_return(address, known=self._known):
                return
            yield address
            if below <= frame:
                return
            frame = below

    def guesses(self) -> Iterator[int]:
        """Whatever on the stack is an address in known code behind a call."""
        top = self._registers["rsp"] & self._mask
        top += -top % self._word
        count = (_STACK - top % _STACK) // self._word
        for value in self._words(top, count):
            address = self._linear(value)
            if self._is_return(address, known=True):
                yield address

    @property
    def _mask(self) -> int:
        return (1 << 8 * self._word) - 1

    def _linear(self, offset: int) -> int:
        return self._code_base + offset & self._mask

    def _words(self, offset: int, count: int) -> tuple[int, ...]:
        """Up to `count` words of the stack from `offset` on, as far as it is mapped."""
        at = self._stack_base + offset & self._mask
        size = min(count * self._word, self._mask + 1 - at)
        data = read_linear(self._memory, self._system, at, size)
        whole = len(data) // self._word
        return struct.unpack_from(f"<{whole}{'Q' if self._word == 8 else 'I'}", data)

    def _is_return(self, address: int, *, known: bool) -> bool:
        """Whether a call is right before `address`, and, with `known`, a symbol of code there."""
        if known:
            symbol = self._symbols.nearest(address - 1)
            if symbol is None or not symbol.is_code:
                return False
        if address < _LONGEST_CALL:
            return False
        start = address - _LONGEST_CALL
        code = read_linear(self._memory, self._system, start, _LONGEST_CALL)
        return len(code) == _LONGEST_CALL and ends_in_call(code)


def ends_in_call(code: bytes) -> bool:
    """Whether the last bytes of `code` are a near call of 32 or 64-bit code (SDM vol. 2, CALL)."""
    if code[-5:-4] == b"\xe8":  # with a displacement of 32 bits
        return True
    return any(
        code[-size] == 0xFF and _indirect_call_size(code[-size + 1 :]) == size
        for size in (2, 3, 4, 6, 7)
        if len(code) >= size
    )


def _indirect_call_size(operand: bytes) -> int:
    """The size of FF /2 with `operand`, a ModR/M byte and what follows; 0 if it is another one.

    Intel SDM vol. 2, tables 2-2 and 2-3.
    """
    mod, extension, rm = operand[0] >> 6, operand[0] >> 3 & 7, operand[0] & 7
    if extension != 2:
        return 0
    if mod == 3:
        return 2
    sib = rm == 4
    if mod == 0:
        no_base = rm == 5 or (sib and len(operand) > 1 and operand[1] & 7 == 5)
        return 2 + sib + 4 * no_base
    return 2 + sib + (1 if mod == 1 else 4)
