"""The boot structures are those of `<asm/bootparam.h>`; those of PVH, of Xen's documentation."""

import ctypes
import os
import struct
import subprocess

import pytest

from vmexit.abi import linux_boot, pvh

NAMES = [
    name for name, value in vars(linux_boot).items()
    if isinstance(value, int)
    and name.startswith(("XLF_", "E820_", "LOADED_", "KASLR_", "QUIET_", "KEEP_", "CAN_"))
]  # fmt: skip
STRUCTURES = (linux_boot.setup_header, linux_boot.boot_e820_entry, linux_boot.boot_params)


def fields(cls):
    return [(n, getattr(cls, n).offset, ctypes.sizeof(t)) for n, t in cls._fields_ if n[0] != "_"]


@pytest.fixture(scope="module")
def from_c(tmp_path_factory) -> dict[str, int]:
    lines = [f'printf("{name} %lld\\n", (long long)({name}));' for name in NAMES]
    for cls in STRUCTURES:
        c = f"struct {cls.__name__}"
        lines.append(f'printf("{cls.__name__} %zu\\n", sizeof({c}));')
        for name, _, _ in fields(cls):
            key = f"{cls.__name__}.{name}"
            lines.append(
                f'printf("{key} %zu\\n", offsetof({c}, {name}));'
                f'printf("{key}#size %zu\\n", sizeof((({c} *)0)->{name}));'
            )
    folder = tmp_path_factory.mktemp("abi")
    source = "#include <stddef.h>\n#include <stdio.h>\n#include <asm/bootparam.h>\nint main(void) {"
    (folder / "boot.c").write_text("\n".join([source, *lines, "return 0; }"]))
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-o", folder / "boot", folder / "boot.c"], check=True)
    out = subprocess.run([folder / "boot"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in map(str.split, out.splitlines())}


def test_flags(from_c) -> None:
    assert len(NAMES) == 13
    assert {name: getattr(linux_boot, name) for name in NAMES} == {n: from_c[n] for n in NAMES}


@pytest.mark.parametrize("cls", STRUCTURES, ids=lambda cls: cls.__name__)
def test_structure(cls, from_c) -> None:
    here = {cls.__name__: ctypes.sizeof(cls)}
    for name, offset, size in fields(cls):
        here[f"{cls.__name__}.{name}"] = offset
        here[f"{cls.__name__}.{name}#size"] = size
    assert here == {key: from_c[key] for key in here}


def test_the_header_has_its_place_in_the_zero_page() -> None:
    assert linux_boot.boot_params.hdr.offset == linux_boot.SETUP_HEADER_OFFSET
    end = linux_boot.boot_params._pad7.offset + linux_boot.boot_params._pad7.size
    assert end == linux_boot.SETUP_HEADER_END


def test_the_pvh_structures_have_the_layout_of_the_documentation() -> None:
    """start_info.h draws it: offsets 0, 4, 8, 12, 16, 24, 32, 40, 48, and 52 reserved."""
    info = pvh.hvm_start_info(
        magic=1, version=2, flags=3, nr_modules=4, modlist_paddr=5, cmdline_paddr=6,
        rsdp_paddr=7, memmap_paddr=8, memmap_entries=9, reserved=10,
    )  # fmt: skip
    assert bytes(info) == struct.pack("<IIIIQQQQII", *range(1, 11))
    assert bytes(
        pvh.hvm_modlist_entry(paddr=1, size=2, cmdline_paddr=3, reserved=4)
    ) == struct.pack("<QQQQ", 1, 2, 3, 4)
    assert bytes(pvh.hvm_memmap_table_entry(addr=1, size=2, type=3, reserved=4)) == struct.pack(
        "<QQII", 1, 2, 3, 4
    )
    # "xEn3" with the 0x80 bit of the "E" set
    magic = bytes((ord("x"), ord("E") | 0x80, ord("n"), ord("3")))
    assert int.from_bytes(magic, "little") == pvh.XEN_HVM_START_MAGIC_VALUE
