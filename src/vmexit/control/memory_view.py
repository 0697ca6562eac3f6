"""Guest memory as text: the monitor's x and xp."""

import re
from typing import NamedTuple

from vmexit.arch.x86.code import MAX_INSTRUCTION, code_bits, disassemble
from vmexit.core.errors import GuestAddressError, VmexitError, quoted
from vmexit.machine.machine import Machine

_FORMAT = re.compile(r"(\d{0,6})([xduoci]?)([bhwg]?)|(\d{0,6})([bhwg])([xduoci])")
_SIZES = {"b": 1, "h": 2, "w": 4, "g": 8}
_MOST = 4096  # items
_MASK = (1 << 64) - 1
_OCTAL_DIGITS = {1: 3, 2: 6, 4: 11, 8: 22}


class Format(NamedTuple):
    """As in `x/4xw`: how many, how they are written, and how large each is."""

    items: int = 1
    kind: str = "x"
    size: int = 4

    @classmethod
    def parse(cls, text: str) -> "Format":
        """What stands behind the slash. Raises VmexitError."""
        found = _FORMAT.fullmatch(text)
        if found is None:
            raise VmexitError(
                f"{quoted(text)} is no format; use a number, one of x d u o c i, and one of b h w g"
            )
        count, kind, size = found[1] or found[4], found[2] or found[6], found[3] or found[5]
        number = int(count or 1)
        if not 1 <= number <= _MOST:
            raise VmexitError(f"{number} items cannot be shown; use 1 to {_MOST}")
        return cls(number, kind or "x", _SIZES[size or ("b" if kind == "c" else "w")])


def show(vm: Machine, at: int, form: Format, vcpu: int, *, physical: bool) -> str:
    """The memory at `at`, a GPA or a linear address of `vcpu`. The machine is paused."""

    def read(address: int, size: int) -> bytes:
        if not physical:
            return vm.read_virtual(address, size, vcpu)
        try:
            return bytes(vm.memory.read(address, size))
        except GuestAddressError:
            return b""

    if form.kind == "i":
        return _instructions(vm, at, form.items, vcpu, read(at, form.items * MAX_INSTRUCTION))
    lines = []
    per_line = min(16 // form.size, 8)
    for first in range(0, form.items, per_line):
        address = at + first * form.size & _MASK
        count = min(per_line, form.items - first)
        items = []
        for number in range(count):
            data = read(address + number * form.size & _MASK, form.size)
            if len(data) < form.size:
                break
            items.append(_item(data, form.kind))
        if items:
            lines.append(f"{address:016x}: {' '.join(items)}")
        if len(items) < count:
            lines.append(f"{address + len(items) * form.size & _MASK:016x}: no memory is there")
            break
    return "\n".join(lines)


def _item(data: bytes, kind: str) -> str:
    value = int.from_bytes(data, "little")
    match kind:
        case "d":
            return str(int.from_bytes(data, "little", signed=True))
        case "u":
            return str(value)
        case "o":
            return f"0{value:0{_OCTAL_DIGITS[len(data)]}o}"
        case "c":
            return f"'{chr(data[0])}'" if 0x20 <= data[0] < 0x7F else f"'\\x{data[0]:02x}'"
        case _:
            return f"0x{value:0{2 * len(data)}x}"


def _instructions(vm: Machine, at: int, count: int, vcpu: int, code: bytes) -> str:
    registers = vm.vcpus[vcpu].regs
    bits = code_bits(registers.general(), registers.system())
    lines = [
        f"0x{address:016x}:  {raw.hex(' '):<30} {text}"
        for address, raw, text in disassemble(code, at, bits, count)
    ]
    if len(lines) < count:
        lines.append("what follows is no instruction, or no memory is there")
    return "\n".join(lines)
