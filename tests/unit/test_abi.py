"""The numbers and structures of `vmexit.abi` are those of the C headers.

A C program made from the Python definitions prints what the compiler thinks of each.
"""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from vmexit.abi import ioctl, kvm, kvm_caps, kvm_irq, kvm_run, kvm_state, kvm_structs
from vmexit.accel.kvm import kick

# In kernels newer than the oldest headers that these tests are run with (Linux 6.1).
NEWER = {"KVM_EXIT_MEMORY_FAULT"}


def _constants() -> dict[str, int]:
    return {
        name: value
        for module in (ioctl, kvm, kvm_caps, kvm_irq, kvm_state, kvm_structs)
        for name, value in vars(module).items()
        if name.startswith("KVM") and isinstance(value, int)
    }


def _structures() -> dict[str, type[ctypes.Structure]]:
    return {
        name: value
        for module in (kvm_structs, kvm_run, kvm_irq, kvm_state)
        for name, value in vars(module).items()
        if name.startswith("kvm_") and isinstance(value, type)
    }


def _fields(cls: type, prefix: str = "", base: int = 0):
    """`(path, offset, size)` of every field, also of those of nested structures without name."""
    anonymous = getattr(cls, "_anonymous_", ())
    for name, kind, *bits in cls._fields_:
        if bits:
            continue  # a bit field has no offset in C
        offset = base + getattr(cls, name).offset
        path = prefix if name in anonymous else f"{prefix}.{name}" if prefix else name
        if name not in anonymous:
            yield path, offset, ctypes.sizeof(kind)
        if issubclass(kind, (ctypes.Structure, ctypes.Union)):
            if name in anonymous or not kind.__name__.startswith("kvm_"):
                yield from _fields(kind, path, offset)


@pytest.fixture(scope="module")
def from_c(tmp_path_factory) -> dict[str, int]:
    lines = []
    for name in _constants():
        show = f'printf("{name} %lld\\n", (long long)({name}));'
        lines.append(f"#ifdef {name}\n{show}\n#endif" if name in NEWER else show)
    for name, cls in _structures().items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        for path, _, _ in _fields(cls):
            lines.append(
                f'printf("{name}.{path} %zu\\n", offsetof(struct {name}, {path}));'
                f'printf("{name}.{path}#size %zu\\n", sizeof(((struct {name} *)0)->{path}));'
            )
    source = "\n".join(
        [
            "#include <stddef.h>\n#include <stdio.h>\n#include <signal.h>\n#include <linux/kvm.h>",
            "int main(void) {",
            *lines,
            'printf("SIGRTMIN %d\\n", SIGRTMIN);',
            "return 0; }",
        ]
    )
    folder = tmp_path_factory.mktemp("abi")
    (folder / "abi.c").write_text(source)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-o", folder / "abi", folder / "abi.c"], check=True)
    out = subprocess.run([folder / "abi"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in map(str.split, out.splitlines())}


def test_numbers_and_flags(from_c):
    here = {n: v for n, v in _constants().items() if n not in NEWER or n in from_c}
    assert len(here) > 300
    assert here == {name: from_c[name] for name in here}


@pytest.mark.parametrize("name", sorted(_structures()))
def test_structure(name, from_c):
    cls = _structures()[name]
    here = {name: ctypes.sizeof(cls)}
    for path, offset, size in _fields(cls):
        here[f"{name}.{path}"] = offset
        here[f"{name}.{path}#size"] = size
    assert here == {key: from_c[key] for key in here}


def test_bit_fields_of_a_redirection_entry():
    """C has no offsetof for these: the bits are those of the 82093AA data sheet, 3.2.4."""
    entry = kvm_irq.kvm_ioapic_state().redirtbl[0]
    for field, bit in (
        ("vector", 0), ("delivery_mode", 8), ("dest_mode", 11), ("delivery_status", 12),
        ("polarity", 13), ("remote_irr", 14), ("trig_mode", 15), ("mask", 16), ("dest_id", 56),
    ):  # fmt: skip
        entry.bits = 0
        setattr(entry.fields, field, 1)
        assert entry.bits == 1 << bit, field


def test_every_ioctl_that_needs_a_capability_names_one_there_is():
    numbers = {value for name, value in _constants().items() if value >> 8 & 0xFF == ioctl.KVMIO}
    required = kvm.REQUIRED_CAPABILITY | kvm_irq.REQUIRED_CAPABILITY | kvm_state.REQUIRED_CAPABILITY
    assert len(required) > 60
    assert numbers >= set(required)
    assert set(required.values()) <= set(kvm_caps.CAPABILITIES.values())


def test_the_header_has_no_exit_reason_that_is_missing_here():
    """All exit reasons of the header but those of other architectures."""
    other = ("S390", "PAPR", "OSI", "EPR", "ARM", "RISCV", "WATCHDOG", "DCR", "LOONGARCH")
    header = Path("/usr/include/linux/kvm.h").read_text()
    names = {
        words[1]
        for words in map(str.split, header.splitlines())
        if len(words) >= 3 and words[0] == "#define" and words[1].startswith("KVM_EXIT_")
        and words[2].isdecimal() and not any(part in words[1] for part in other)
    }  # fmt: skip
    # What an exit says in detail is not a reason to exit.
    details = {n for n in names if n.startswith(("KVM_EXIT_HYPERV_", "KVM_EXIT_XEN_"))}
    newest = max(kvm.KVM_EXIT_NOTIFY, kvm.KVM_EXIT_MEMORY_FAULT)
    missing = {
        n for n in names - details - set(vars(kvm))
        if int(header.split(n)[1].split()[0]) <= newest
    }  # fmt: skip
    assert not missing


def test_the_kick_signal_is_the_first_that_libc_leaves_free(from_c):
    assert from_c["SIGRTMIN"] == kick.KICK_SIGNAL
