"""The registers of a machine's vCPUs, by name."""

from typing import TYPE_CHECKING, Protocol

from vmexit.accel.base import Vcpu, linear_rip
from vmexit.arch.x86 import fxsave
from vmexit.arch.x86.registers import (
    CR0_PE,
    GENERAL,
    RFLAGS_VM,
    SEGMENTS,
    TABLES,
    Registers,
    Segment,
    SystemRegisters,
    Table,
)
from vmexit.core.errors import VmexitError
from vmexit.machine.hooks import Within


class Owner(Protocol):
    """What registers have to know of their machine."""

    within: Within

    @property
    def running(self) -> bool: ...

    def require_still(self, vcpu: int | None = None) -> None: ...

    def dump(self, vcpu: int = 0) -> str: ...


class RegisterView:
    """The registers of a vCPU by name: read and write `rax`, `rip`, `cr3`, `cs`, `gdt`, …

    64-bit values; a segment is a `Segment`, a descriptor table a `Table`. Only while the vCPU
    does not run, or from within one of its own accesses; VmexitError otherwise. Within an access,
    RIP is that of its instruction or of the next one; within a write, general registers may be
    written, and within a read none, nor RIP, RFLAGS or system registers ever.
    """

    __slots__ = ("_owner", "_vcpu")
    _owner: "Owner"
    _vcpu: Vcpu

    if TYPE_CHECKING:
        rax: int
        rbx: int
        rcx: int
        rdx: int
        rsi: int
        rdi: int
        rsp: int
        rbp: int
        r8: int
        r9: int
        r10: int
        r11: int
        r12: int
        r13: int
        r14: int
        r15: int
        rip: int
        rflags: int
        cs: Segment
        ds: Segment
        es: Segment
        fs: Segment
        gs: Segment
        ss: Segment
        tr: Segment
        ldt: Segment
        gdt: Table
        idt: Table
        cr0: int
        cr2: int
        cr3: int
        cr4: int
        cr8: int
        efer: int

    def __init__(self, owner: "Owner", vcpu: Vcpu) -> None:
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_vcpu", vcpu)

    def __getattr__(self, name: str) -> int | Segment | Table:
        if name.startswith("_"):  # copy, pickle and the like ask for these
            raise AttributeError(name)
        self._owner.require_still(self._vcpu.index)
        if name in GENERAL:
            return self._vcpu.registers()[name]
        if name in SystemRegisters._fields:
            value: int | Segment | Table = getattr(self._vcpu.system_registers(), name)
            return value
        raise AttributeError(f"there is no register {name!r}")

    def __setattr__(self, name: str, value: int | Segment | Table) -> None:
        self.update(**{name: value})

    def update(self, **values: int | Segment | Table) -> None:
        """Write several registers at once: `update(cr0=…, efer=…)`, where none alone is valid.

        Raises AttributeError for a name that is no register, TypeError or ValueError for a value
        that it cannot have, HostError if the accelerator refuses it.
        """
        self._owner.require_still(self._vcpu.index)
        general: dict[str, int] = {}
        system: dict[str, int | Segment | Table] = {}
        for name, value in values.items():
            if name in GENERAL:
                general[name] = _number(name, value) & _MASK
            elif name in SystemRegisters._fields:
                kind = Segment if name in SEGMENTS else Table if name in TABLES else int
                if kind is int:
                    value = _number(name, value) & _MASK
                elif isinstance(value, Segment | Table) and isinstance(value, kind):
                    _check_fields(name, value)
                else:
                    raise TypeError(f"{name} takes a {kind.__name__}, not {value!r}")
                system[name] = value
            else:
                raise AttributeError(f"there is no register {name!r}")
        if self._owner.running and (
            self._owner.within.read or system or general.keys() & {"rip", "rflags"}
        ):
            names = ", ".join(values)
            raise VmexitError(f"{names} cannot be written within this access; stop() first")
        if system:
            fields = self._vcpu.system_registers()._asdict()
            self._vcpu.set_system_registers(SystemRegisters(**(fields | system)))
        if general:
            self._vcpu.set_registers(self._vcpu.registers() | general)

    @property
    def linear_ip(self) -> int:
        """Where the next instruction is, with the base of CS, which 64-bit mode has not."""
        self._owner.require_still(self._vcpu.index)
        return linear_rip(self._vcpu)

    @property
    def real_mode(self) -> bool:
        """Whether a selector is a base, as in real and virtual-8086 mode."""
        return not self.cr0 & CR0_PE or bool(self.rflags & RFLAGS_VM)

    def __repr__(self) -> str:
        return self._owner.dump(self._vcpu.index)

    def __dir__(self) -> list[str]:
        return [*GENERAL, *SystemRegisters._fields]

    def general(self) -> Registers:
        """General registers, RIP and RFLAGS by name."""
        self._owner.require_still(self._vcpu.index)
        return self._vcpu.registers()

    def system(self) -> SystemRegisters:
        """Segments, descriptor tables, control registers and EFER."""
        self._owner.require_still(self._vcpu.index)
        return self._vcpu.system_registers()

    def as_dict(self) -> dict[str, int | Segment | Table]:
        """All registers by name."""
        self._owner.require_still(self._vcpu.index)
        return {**self._vcpu.registers(), **self._vcpu.system_registers()._asdict()}


_MASK = 0xFFFF_FFFF_FFFF_FFFF


def _number(name: str, value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{name} takes a number, not {value!r}")
    if not -(1 << 63) <= value <= _MASK:
        raise ValueError(f"{name} has 64 bits; {value:#x} has more")
    return value


# Bits of the fields of a segment and of a table.
_WIDTHS = {"selector": 16, "base": 64, "type": 4, "dpl": 2}


def _check_fields(name: str, value: Segment | Table) -> None:
    limit = 32 if isinstance(value, Segment) else 16
    for field, number in value._asdict().items():
        bits = limit if field == "limit" else _WIDTHS.get(field, 1)
        if not isinstance(number, int) or not 0 <= number < 1 << bits:
            raise ValueError(f"{name}: {field} has {bits} bits; {number!r} does not fit")


class MachineVcpu:
    """One vCPU of a machine: its number, its registers in `regs`, and x87 and SSE in `fpu`."""

    def __init__(self, owner: "Owner", vcpu: Vcpu) -> None:
        self.index = vcpu.index
        self._owner = owner
        self._vcpu = vcpu
        self.regs = RegisterView(owner, vcpu)

    def __repr__(self) -> str:
        return f"<vCPU {self.index}>"

    @property
    def fpu(self) -> bytes:
        """x87 and SSE as FXSAVE stores them in 64-bit mode, 512 bytes (SDM vol. 1, 10.5.1)."""
        self._owner.require_still(self.index)
        return self._vcpu.fpu()

    @fpu.setter
    def fpu(self, image: bytes) -> None:
        if len(image) != fxsave.SIZE:
            raise ValueError(f"an FXSAVE image has {fxsave.SIZE} bytes; this has {len(image)}")
        self._owner.require_still(self.index)
        if self._owner.running:
            raise VmexitError("the FPU cannot be written within an access; stop() first")
        self._vcpu.set_fpu(image)
