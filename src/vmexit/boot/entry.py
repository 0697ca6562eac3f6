"""What the boot layer hands to the builder."""

from typing import NamedTuple

from vmexit.arch.x86.registers import Registers, SystemRegisters


class BootEntry(NamedTuple):
    """The registers that the first vCPU starts with."""

    registers: Registers
    system: SystemRegisters
