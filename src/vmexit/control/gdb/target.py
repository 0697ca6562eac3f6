"""What gdb is told of the processor: a target description, and registers in its order.

GDB manual, appendix G; the features are those of G.5.21, "i386 Features". Control registers have
a feature of our own, which gdb shows as it shows any other.
"""

from typing import NamedTuple

from vmexit.arch.x86 import fxsave
from vmexit.arch.x86.registers import Segment
from vmexit.core.errors import ConfigError, quoted
from vmexit.machine.registers import MachineVcpu

ARCHITECTURES = ("x86-64", "i386", "i8086")

_ELF_NAMES = {"x86-64": "i386:x86-64", "i386": "i386", "i8086": "i8086"}

_GENERAL_64 = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
_GENERAL_32 = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
_FPU_CONTROL = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
_SYSTEM = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")


class _Register(NamedTuple):
    name: str  # gdb's
    bits: int
    type: str
    source: str  # what `_Values` has under that name


class _Feature(NamedTuple):
    name: str
    types: str
    registers: tuple[_Register, ...]


_FLAGS = """
<flags id="i386_eflags" size="4">
<field name="CF" start="0" end="0"/><field name="" start="1" end="1"/>
<field name="PF" start="2" end="2"/><field name="AF" start="4" end="4"/>
<field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/>
<field name="TF" start="8" end="8"/><field name="IF" start="9" end="9"/>
<field name="DF" start="10" end="10"/><field name="OF" start="11" end="11"/>
<field name="NT" start="14" end="14"/><field name="RF" start="16" end="16"/>
<field name="VM" start="17" end="17"/><field name="AC" start="18" end="18"/>
<field name="VIF" start="19" end="19"/><field name="VIP" start="20" end="20"/>
<field name="ID" start="21" end="21"/>
</flags>"""

_VECTORS = """
<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/>
<vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/>
<vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/>
<union id="vec128">
<field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/>
<field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/>
<field name="uint128" type="uint128"/>
</union>
<flags id="i386_mxcsr" size="4">
<field name="IE" start="0" end="0"/><field name="DE" start="1" end="1"/>
<field name="ZE" start="2" end="2"/><field name="OE" start="3" end="3"/>
<field name="UE" start="4" end="4"/><field name="PE" start="5" end="5"/>
<field name="DAZ" start="6" end="6"/><field name="IM" start="7" end="7"/>
<field name="DM" start="8" end="8"/><field name="ZM" start="9" end="9"/>
<field name="OM" start="10" end="10"/><field name="UM" start="11" end="11"/>
<field name="PM" start="12" end="12"/><field name="FZ" start="15" end="15"/>
</flags>"""


def _features(long: bool) -> tuple[_Feature, ...]:
    bits = 64 if long else 32
    general = []
    for name in _GENERAL_64 if long else _GENERAL_32:
        kind = "data_ptr" if name in ("rsp", "rbp") else f"int{bits}"
        general.append(_Register(name if long else f"e{name[1:]}", bits, kind, name))
    general.append(_Register("rip" if long else "eip", bits, "code_ptr", "rip"))
    general.append(_Register("eflags", 32, "i386_eflags", "rflags"))
    general += [_Register(name, 32, "int32", name) for name in _SEGMENTS]
    general += [_Register(f"st{n}", 80, "i387_ext", f"st{n}") for n in range(8)]
    general += [_Register(name, 32, "int", name) for name in _FPU_CONTROL]
    sse = [_Register(f"xmm{n}", 128, "vec128", f"xmm{n}") for n in range(16 if long else 8)]
    sse.append(_Register("mxcsr", 32, "i386_mxcsr", "mxcsr"))
    features = [
        _Feature("org.gnu.gdb.i386.core", _FLAGS, tuple(general)),
        _Feature("org.gnu.gdb.i386.sse", _VECTORS, tuple(sse)),
    ]
    if long:
        bases = tuple(_Register(name, 64, "data_ptr", name) for name in ("fs_base", "gs_base"))
        features.append(_Feature("org.gnu.gdb.i386.segments", "", bases))
    system = tuple(_Register(name, bits, f"int{bits}", name) for name in _SYSTEM)
    features.append(_Feature("org.vmexit.system", "", system))
    return tuple(features)


class Target:
    """One of the ways to see the processor: `x86-64`, `i386` or `i8086`.

    RIP is linear in other than 64-bit mode, as breakpoints are: the base of CS is added. So is the
    stack pointer of `i8086`, which would be of no use to gdb without its segment.
    """

    def __init__(self, architecture: str) -> None:
        """Raises ConfigError for a name that is none of `ARCHITECTURES`."""
        if architecture not in ARCHITECTURES:
            raise ConfigError(
                f"gdb has no architecture {quoted(architecture)}; use {', '.join(ARCHITECTURES)}"
            )
        self.architecture = architecture
        self._features = _features(architecture == "x86-64")
        self.registers = [r for feature in self._features for r in feature.registers]

    def description(self) -> str:
        """The target description, in XML."""
        lines = [
            '<?xml version="1.0"?>',
            '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
            '<target version="1.0">',
            f"<architecture>{_ELF_NAMES[self.architecture]}</architecture>",
            "<osabi>none</osabi>",
        ]
        for feature in self._features:
            lines.append(f'<feature name="{feature.name}">{feature.types}')
            lines += [
                f'<reg name="{r.name}" bitsize="{r.bits}" type="{r.type}"/>'
                for r in feature.registers
            ]
            lines.append("</feature>")
        lines.append("</target>\n")
        return "\n".join(lines)

    def read(self, vcpu: MachineVcpu) -> list[bytes]:
        """All registers, each in the bytes that gdb expects."""
        values = self._values(vcpu)
        return [
            (values[r.source] & (1 << r.bits) - 1).to_bytes(r.bits // 8, "little")
            for r in self.registers
        ]

    def _values(self, vcpu: MachineVcpu) -> dict[str, int]:
        values: dict[str, int] = {}
        registers = vcpu.regs.as_dict()
        for name, value in registers.items():
            if isinstance(value, int):
                values[name] = value
            elif isinstance(value, Segment):
                values[name] = value.selector
                values[f"{name}_base"] = value.base
        values["rip"] = vcpu.regs.linear_ip
        if self.architecture == "i8086":
            values["rsp"] = values["ss_base"] + (values["rsp"] & 0xFFFF)
        image = vcpu.fpu
        control, status, tags, opcode, rip, rdp, mxcsr, _ = fxsave.HEAD.unpack_from(image)
        values |= {
            "fctrl": control, "fstat": status, "ftag": fxsave.full_tags(tags), "fop": opcode,
            "fioff": rip & 0xFFFF_FFFF, "fiseg": rip >> 32 & 0xFFFF,
            "fooff": rdp & 0xFFFF_FFFF, "foseg": rdp >> 32 & 0xFFFF, "mxcsr": mxcsr,
        }  # fmt: skip
        for n in range(8):
            values[f"st{n}"] = int.from_bytes(image[fxsave.st(n)], "little")
        for n in range(16):
            values[f"xmm{n}"] = int.from_bytes(image[fxsave.xmm(n)], "little")
        return values

    def write(self, vcpu: MachineVcpu, values: dict[int, bytes]) -> None:
        """Load registers by their numbers, those that have changed.

        Raises VmexitError, or ValueError, for what the processor cannot have: selectors alone,
        for one, whose descriptors would not follow.
        """
        before = self.read(vcpu)
        changes: dict[str, int | Segment] = {}
        image = bytearray(vcpu.fpu)
        for number, data in values.items():
            register, value = self.registers[number], int.from_bytes(data, "little")
            if len(data) != register.bits // 8:
                raise ValueError(f"{register.name} has {register.bits} bits")
            if data == before[number]:
                continue
            name = register.source
            if name == "rip":
                changes[name] = value - vcpu.regs.linear_ip + vcpu.regs.rip & (1 << 64) - 1
            elif name == "rsp" and self.architecture == "i8086":
                changes[name] = value - vcpu.regs.ss.base & 0xFFFF
            elif name in ("fs_base", "gs_base"):
                segment: Segment = getattr(vcpu.regs, name[:2])
                changes[name[:2]] = segment._replace(base=value)
            elif name in _SEGMENTS:
                if not vcpu.regs.real_mode:
                    raise ValueError(f"{name} has a descriptor, which a selector does not tell")
                segment, selector = getattr(vcpu.regs, name), value & 0xFFFF
                changes[name] = segment._replace(selector=selector, base=selector << 4)
            elif not _put_fpu(image, name, data):
                changes[name] = value
        if changes:
            vcpu.regs.update(**changes)
        if bytes(image) != vcpu.fpu:
            vcpu.fpu = bytes(image)


def _put_fpu(image: bytearray, name: str, data: bytes) -> bool:
    """Put a register into an FXSAVE image; False if it is none of x87 and SSE."""
    assert len(image) == fxsave.SIZE
    if name.startswith("st"):
        place = fxsave.st(int(name[2:]))
    elif name.startswith("xmm"):
        place = fxsave.xmm(int(name[3:]))
    elif name == "ftag":
        image[4] = fxsave.abridged_tags(int.from_bytes(data, "little"))
        return True
    elif name in _FPU_PLACES:
        place = _FPU_PLACES[name]
    else:
        return False
    image[place] = data[: place.stop - place.start]
    return True


_FPU_PLACES = {
    "fctrl": slice(0, 2), "fstat": slice(2, 4), "fop": slice(6, 8),
    "fioff": slice(8, 12), "fiseg": slice(12, 14), "fooff": slice(16, 20), "foseg": slice(20, 22),
    "mxcsr": slice(fxsave.MXCSR, fxsave.MXCSR + 4),
}  # fmt: skip
