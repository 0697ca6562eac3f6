"""Symbols from ELF files (compared with nm's), System.maps and kernels; and files without any."""

import gzip
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from kallsyms_tables import BASE, some_symbols, tables
from kernel_images import bzimage, with_size

from vmexit.boot import symtab
from vmexit.boot.symbols import load_symbols, own_symbols, system_map, with_symbols
from vmexit.core.errors import ImageError

SOURCE = """
    .globl _start, counter, weak_one
    .weak weak_one
    .text
    _start: call inner
    weak_one: ret
    .type inner, @function
    inner: nop; ret
    .size inner, 2
    .Lhidden: ret
    .data
    .type counter, @object
    counter: .quad 1
    .size counter, 8
    .section .rodata
    constant: .quad 2
    .bss
    buffer: .skip 64
    .globl LIMIT
    LIMIT = 0x1234
"""


def assembled(folder: Path, *options: str, bits: int = 64) -> Path:
    """An ELF file made of SOURCE."""
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("no as and ld on this machine")
    source, made, linked = folder / "a.s", folder / "a.o", folder / f"a{bits}.elf"
    source.write_text(SOURCE)
    subprocess.run(["as", f"--{bits}", source, "-o", made], check=True)
    emulation = "elf_x86_64" if bits == 64 else "elf_i386"
    at = f"-Ttext={BASE if bits == 64 else 0xC1000000:#x}"
    subprocess.run(["ld", "-m", emulation, at, *options, made, "-o", linked], check=True)
    return linked


@pytest.mark.parametrize("bits", [64, 32])
def test_the_symbols_of_an_elf_file_are_those_of_nm(tmp_path, bits) -> None:
    path = assembled(tmp_path, bits=bits)
    listed = subprocess.run(["nm", "-n", path], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in listed.splitlines()]
    expected = {(int(address, 16), kind, name) for address, kind, name in lines}
    table = load_symbols(path)
    assert {(s.address, s.kind, s.name) for s in table} == expected
    assert table.find(table.address("inner") + 1) == ("inner", 1)
    assert table.find(table.address("inner") + 2) is None  # behind its size
    assert table.address("LIMIT") == 0x1234 and table.find(0x1234) is None
    assert table.address(".Lhidden") is None


def test_a_shared_object_without_symtab_has_its_dynamic_symbols(tmp_path) -> None:
    path = assembled(tmp_path, "-shared", "-Bsymbolic", "-s", "-z", "notext")
    assert load_symbols(path).address("counter") is not None
    assert load_symbols(path).address("inner") is None


def kernel(tmp_path: Path, symbols=None) -> bytes:
    """A vmlinux without a symbol table, whose .rodata are kallsyms tables."""
    blob, source = tmp_path / "tables.bin", tmp_path / "k.s"
    blob.write_bytes(tables(symbols or some_symbols(1000), since_6_4=True))
    source.write_text(
        f'.globl _start\n_start: ret\n.section .rodata\n.balign 8\n.incbin "{blob}"\n'
    )
    made, linked = tmp_path / "k.o", tmp_path / "vmlinux"
    subprocess.run(["as", source, "-o", made], check=True)
    script = tmp_path / "k.ld"
    script.write_text(
        f"SECTIONS {{ . = {BASE:#x}; .text : AT(0x1000000) {{ *(.text) }}"
        " .rodata : { *(.rodata) } }"
    )
    subprocess.run(["ld", "-s", "-T", script, made, "-o", linked], check=True)
    return linked.read_bytes()


@pytest.mark.parametrize("packing", ["none", "gzip", "bzimage"])
def test_a_kernel_without_a_symbol_table_has_those_that_it_carries(tmp_path, packing) -> None:
    vmlinux = kernel(tmp_path)
    packed = gzip.compress(vmlinux)
    path = tmp_path / "kernel"
    path.write_bytes(
        {"none": vmlinux, "gzip": packed, "bzimage": bzimage(with_size(vmlinux, packed))}[packing]
    )
    assert list(load_symbols(path)) == some_symbols(1000)
    assert not own_symbols(path)


def test_a_kernel_gets_a_symbol_table_that_readelf_finds_no_fault_with(tmp_path) -> None:
    path, output = tmp_path / "kernel", tmp_path / "output"
    path.write_bytes(kernel(tmp_path))
    data = with_symbols(path)
    output.write_bytes(data)
    assert {s[:2] for s in load_symbols(output)} == {s[:2] for s in some_symbols(1000)}
    assert len(own_symbols(output)) == 1000
    report = subprocess.run(
        ["readelf", "-aW", "--lint", output], capture_output=True, text=True, check=True
    )
    assert "Warning" not in report.stderr and ".symtab" in report.stdout
    assert with_symbols(output) == data  # it has a table now


def test_system_map(tmp_path) -> None:
    path = tmp_path / "System.map"
    path.write_text(
        "0000000000000000 D __per_cpu_start\n"
        f"{BASE:016x} T _text\n\n{BASE + 16:016x} t helper.cold\r\n"
        f"ffffffffc0000000 t in_module\t[ext4]\n"
    )
    table = load_symbols(path)
    assert table.describe(BASE + 20) == "helper.cold+0x4"
    assert table.address("in_module") == 0xFFFF_FFFF_C000_0000
    assert table.find(0x10) is None  # per-CPU offsets are no places
    assert system_map(table).splitlines()[1] == f"{BASE:016x} T _text"


def test_names_cannot_write_to_a_terminal(tmp_path) -> None:
    path = tmp_path / "System.map"
    path.write_bytes(b"ffffffff81000000 T a\x1b[2J\xff\n")
    (symbol,) = load_symbols(path)
    assert symbol.name.isprintable() and symbol.name.startswith("a\\x1b[2J")


def test_debians_dummy_is_refused_and_the_kernel_named_as_the_better_source(tmp_path) -> None:
    path = tmp_path / "System.map"
    path.write_text(
        "ffffffffffffffff B The real System.map is in the "
        "linux-image-6.17.13+deb13-cloud-amd64-dbg package\n"
    )
    with pytest.raises(ImageError, match=r"package linux-image-6.17.*-dbg; use the kernel image"):
        load_symbols(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello\n", "line 1 is no symbol; use a System.map"),
        (b"ffffffff81000000 T a\nnonsense\n", "line 2 is no symbol"),
        (b"0000000000000000 T a\n0000000000000000 T b\n", "all its addresses are 0; copy"),
        (b"ffffffff81000000 T " + b"a" * 600, "line 1 is no symbol"),
        (b"\x7fELF", "damaged"),
        (with_size(b"", gzip.compress(b"not an elf")), "not an ELF file; pass a vmlinux"),
    ],
)
def test_files_that_have_no_symbols_are_refused_with_their_name(tmp_path, content, words) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=f"symbol file {path}: .*{words}"):
        load_symbols(path)


def test_what_is_no_kernel_gets_no_symbol_table(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"ffffffff81000000 T a\n")
    with pytest.raises(ImageError, match="it is no kernel; pass a vmlinuz or a vmlinux"):
        with_symbols(path)


def test_names_that_share_their_bytes_cannot_take_all_memory(tmp_path) -> None:
    count = 100_000
    (tmp_path / "a.s").write_text(f".globl _start\n_start: ret\n.globl {'n' * 4000}\n{'n' * 4000}:")
    made = tmp_path / "a.o"
    subprocess.run(["as", tmp_path / "a.s", "-o", made], check=True)
    good = made.read_bytes()
    header = struct.unpack_from("<HHIQQQIHHHHHH", good, 16)
    at, sections = header[5], header[11]
    data = bytearray(good)
    for section in range(sections):
        fields = list(struct.unpack_from("<IIQQQQIIQQ", good, at + 64 * section))
        if fields[1] == 2:  # SHT_SYMTAB: its last entry is the long name
            last = good[fields[4] + fields[5] - 24 : fields[4] + fields[5]]
            fields[4], fields[5] = len(good), 24 * count
            struct.pack_into("<IIQQQQIIQQ", data, at + 64 * section, *fields)
    with pytest.raises(ImageError, match="names of more than"):
        symtab.read(bytes(data) + last * count)


def test_damaged_elf_files_give_symbols_or_an_error(tmp_path) -> None:
    good = assembled(tmp_path).read_bytes()
    random_ = random.Random(7)
    (sections,) = struct.unpack_from("<Q", good, 40)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(random_.randint(1, 4)):
            at = random_.choice((random_.randrange(64), random_.randrange(sections, len(good))))
            data[at] = random_.choice((0, 0xFF, random_.randrange(256)))
        try:
            assert all(isinstance(s.name, str) for s in symtab.read(bytes(data)))
            symtab.add(bytes(data), [])
        except ImageError:
            continue
