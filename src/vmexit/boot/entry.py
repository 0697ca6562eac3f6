"""What the boot layer hands to the builder."""

from typing import NamedTuple

from vmexit.arch.x86.registers import Registers, SystemRegisters


class Linked(NamedTuple):
    """Code that was linked for the virtual address `gva`, and lies at `gpa` before it is mapped."""

    gva: int
    gpa: int
    size: int


class BootEntry(NamedTuple):
    """The registers that the first vCPU starts with, and what is known of the image."""

    registers: Registers
    system: SystemRegisters
    linked: tuple[Linked, ...] = ()
