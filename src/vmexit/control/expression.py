"""Numbers as the monitor's commands take them: 0x1000, $rip, $rsp+8."""

import re

from vmexit.arch.x86.registers import Segment
from vmexit.core.errors import VmexitError, quoted
from vmexit.machine.machine import Machine

_WORD = re.compile(r"\s*(0[xX][0-9a-fA-F]{1,16}|\d{1,20}|\$\w{1,8}|[-+*()])")
_ALIASES = {"pc": "rip", "sp": "rsp", "fp": "rbp", "flags": "rflags", "eflags": "rflags"}
_MASK = (1 << 64) - 1
_LONGEST = 256


def evaluate(vm: Machine, text: str, vcpu: int = 0) -> int:
    """The value of a sum of numbers and registers of `vcpu`, of 64 bits.

    The machine is paused. Raises VmexitError for what is no such sum.
    """
    value, sign, want, at = 0, 1, True, 0
    text = text.strip()
    while at < len(text) <= _LONGEST:
        found = _WORD.match(text, at)
        if found is None or found[1] in "*()":
            break
        at, word = found.end(), found[1]
        if word in "+-":
            if want and word == "+":
                break
            sign = -sign if want and word == "-" else 1 if word == "+" else -1
            want = True
        elif want:
            value += sign * _value(vm, word, vcpu)
            sign, want = 1, False
        else:
            break
    else:
        if not want:
            return value & _MASK
    raise VmexitError(f"{quoted(text)} is no number; use 0x1000, $rip or $rsp+8")


def _value(vm: Machine, word: str, vcpu: int) -> int:
    if not word.startswith("$"):
        return int(word, 16 if word[:2].lower() == "0x" else 10)
    name = _ALIASES.get(word[1:].lower(), word[1:].lower())
    value = vm.vcpus[vcpu].regs.as_dict().get(name)
    if isinstance(value, Segment):
        return value.selector
    if not isinstance(value, int):
        raise VmexitError(f"there is no register {word}; use $rip, $rsp, $cr3, …")
    return value
