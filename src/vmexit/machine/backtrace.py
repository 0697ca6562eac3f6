"""How a vCPU came to where it is: the calls that have not returned, by its stack.

The chain of frame pointers in RBP, where there is one (System V ABI for x86-64, 3.2.2). Most code
is built without: Debian's kernels have ORC tables instead, and few of their functions a frame. So
where the chain does not hold, what on the stack looks like a return address is told, too, as a
guess: what Linux marks with `?` in its own backtraces.
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


class _Call(NamedTuple):
    """A return address, and where on the stack it is: an offset in the stack segment."""

    slot: int
    address: int


def backtrace(
    memory: GuestMemory,
    registers: Registers,
    system: SystemRegisters,
    symbols: SymbolTable,
    limit: int = 32,
) -> list[Frame]:
    """RIP, then return addresses, the innermost first: `limit` frames at most.

    The chain ends where a frame is not mapped, is not above the one before, or where what should
    be a return address does not follow a call. In 16-bit code there is only RIP. There are guesses
    only with symbols, and if the chain leaves something out or does not end as one should.
    """
    stack = _Stack(memory, registers, system, symbols)
    here = linear_ip(registers, system)
    frames = [Frame(here, symbols.describe(here))]
    if stack.bits == 16 or limit <= 1:
        return frames[: max(limit, 0)]
    chain, complete = stack.chain(limit)
    calls = [*stack.caller_of_nothing(), *chain]
    if complete and stack.agree(calls):
        found = [(call, False) for call in calls]
    else:
        sure = set(chain)
        guesses = list(islice(stack.returns(), limit)) if symbols else []
        found = [(call, call not in sure) for call in guesses]
        found += [(call, False) for call in calls if call not in guesses]
    frames += [Frame(call.address, _name(symbols, call.address), guess) for call, guess in found]
    return frames[:limit]


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

    def caller_of_nothing(self) -> list[_Call]:
        """Where RIP is not mapped, somebody has called nothing, and is on top of the stack."""
        if read_linear(self._memory, self._system, self._here, 1):
            return []
        top = self._registers["rsp"] & self._mask
        calls = [_Call(top, self._linear(word)) for word in self._words(top, 1)]
        return [call for call in calls if self._is_return(call.address, known=False)]

    def chain(self, limit: int) -> tuple[list[_Call], bool]:
        """Up to `limit` calls by the frame pointers from RBP on, and whether those are all.

        The last frame pointer is 0, or odd: so Linux marks saved registers (ENCODE_FRAME_POINTER).
        """
        calls: list[_Call] = []
        frame, below = self._registers["rbp"] & self._mask, 0
        while len(calls) < limit and frame > below and not frame % self._word:
            words = self._words(frame, 2)
            if len(words) < 2:
                break
            address = self._linear(words[1])
            if not self._is_return(address, known=self._known):
                break
            calls.append(_Call(frame + self._word, address))
            frame, below = words[0], frame
        complete = len(calls) == limit or not frame or frame % 2 == 1
        return calls, bool(calls) and complete

    def agree(self, calls: list[_Call]) -> bool:
        """Whether each direct call is to the function that the frame below it is in.

        If not, functions that have no frame are missing between.
        """
        inner = self._symbols.nearest(self._here)
        for call in calls:
            code = read_linear(self._memory, self._system, call.address - 5, 5)
            if inner is not None and code[:1] == b"\xe8":
                target = self._symbols.nearest(
                    call.address + int.from_bytes(code[1:], "little", signed=True) & self._mask
                )
                if target is None or target.address != inner.address:
                    return False
            inner = self._symbols.nearest(call.address - 1)
        return True

    def returns(self) -> Iterator[_Call]:
        """Whatever on the stack is an address in known code behind a call."""
        top = self._registers["rsp"] & self._mask
        top += -top % self._word
        count = (_STACK - top % _STACK) // self._word
        for number, value in enumerate(self._words(top, count)):
            address = self._linear(value)
            if self._is_return(address, known=True):
                yield _Call(top + number * self._word, address)

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
