"""Multiboot 1: headers read or refused, and what the kernel finds in memory and registers.

The offsets are those of the specification, not of the code under test.
"""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_images import elf

from vmexit.boot.image import detect
from vmexit.boot.multiboot import Module, load, module_files, parse, room_for_modules
from vmexit.core.errors import ConfigError, ImageError
from vmexit.core.memory import GuestMemory

MIB = 1 << 20
MAGIC = 0x1BADB002


def header(flags: int = 3, *addresses: int) -> bytes:
    fields = (MAGIC, flags, -(MAGIC + flags) & 0xFFFF_FFFF, *addresses)
    return struct.pack(f"<{len(fields)}I", *fields)


def flat(
    *, at=0, header_at=MIB, load=MIB, load_end=0, bss_end=0, entry=MIB + 32, code=b"\xf4" * 100
) -> bytes:
    """A flat kernel with its header `at` bytes into the file."""
    return bytes(at) + header(1 << 16 | 3, header_at, load, load_end, bss_end, entry) + code


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 8 * MIB)])
    yield memory
    memory.close()


class Information:
    """The information structure at a GPA, field by field (3.3)."""

    def __init__(self, memory: GuestMemory, at: int) -> None:
        self.memory = memory
        (self.flags, self.mem_lower, self.mem_upper, self.boot_device, cmdline,
         self.mods_count, self.mods_addr) = struct.unpack("<7I", memory.read(at, 28))  # fmt: skip
        mmap_length, mmap_addr = struct.unpack("<2I", memory.read(at + 44, 8))
        self.cmdline = self.string(cmdline)
        self.loader = self.string(memory.read_u32(at + 64))
        self.map = []
        place = mmap_addr
        while place < mmap_addr + mmap_length:
            size, *entry = struct.unpack("<IQQI", memory.read(place, 24))
            self.map.append(tuple(entry))
            place += size + 4
        self.modules = []
        for i in range(self.mods_count):
            start, end, string, reserved = struct.unpack(
                "<4I", memory.read(self.mods_addr + 16 * i, 16)
            )
            assert reserved == 0
            self.modules.append((start, memory.read(start, end - start), self.string(string)))

    def string(self, at: int) -> str:
        data = self.memory.read(at, 4096)
        return data[: data.index(0)].decode()


def test_the_kernel_starts_in_protected_mode_with_magic_and_information(memory):
    entry = load(memory, flat(), [], "")
    registers, system, _ = entry
    assert registers["rip"] == MIB + 32
    assert registers["rax"] == 0x2BADB002
    assert registers["rflags"] & (1 << 17 | 1 << 9) == 0
    assert system.cr0 & (1 << 31 | 1) == 1
    for segment in (system.cs, system.ds, system.es, system.fs, system.gs, system.ss):
        assert (segment.base, segment.limit, segment.db, segment.g) == (0, 0xFFFF_FFFF, 1, 1)
        assert memory.read(system.gdt.base + segment.selector, 8) != bytes(8)
    information = Information(memory, registers["rbx"])
    assert information.loader == "vmexit"
    assert information.flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert information.modules == []


def test_the_information_tells_of_memory_and_command_line(memory):
    information = Information(memory, load(memory, flat(), [], "kernel ä=1")[0]["rbx"])
    assert information.cmdline == "kernel ä=1"
    assert (information.mem_lower, information.mem_upper) == (639, 7 * 1024)
    assert (0, 639 << 10, 1) in information.map
    assert (MIB, 7 * MIB, 1) in information.map
    assert all(kind == 2 for base, _, kind in information.map if base not in (0, MIB))
    assert information.boot_device == 0


def test_memory_above_the_hole_is_in_the_map_only():
    memory = GuestMemory([(0, 4 * MIB), (1 << 32, 2 * MIB)])
    information = Information(memory, load(memory, flat(), [], "")[0]["rbx"])
    assert information.mem_upper == 3 * 1024
    assert (1 << 32, 2 * MIB, 1) in information.map
    memory.close()


def test_modules_are_page_aligned_behind_the_kernel_in_order(memory):
    modules = [Module(b"x" * 5000, "one a b"), Module(b"y", "two")]
    entry = load(memory, flat(bss_end=MIB + 0x1801), modules, "")
    assert Information(memory, entry.registers["rbx"]).modules == [
        (MIB + 0x2000, b"x" * 5000, "one a b"),
        (MIB + 0x4000, b"y", "two"),
    ]


def test_the_information_makes_room_for_a_kernel_in_low_memory(memory):
    kernel = flat(header_at=0x8000, load=0x8000, entry=0x8020, bss_end=0x9001)
    at = load(memory, kernel, [Module(b"data", "m")], "c")[0]["rbx"]
    assert memory.read(0x8000, 4) == b"\x02\xb0\xad\x1b"
    information = Information(memory, at)
    assert (at, information.cmdline) == (MIB, "c")
    assert information.modules == [(MIB + 0x1000, b"data", "m")]
    assert memory.read(0x8000, len(kernel)) == kernel


def test_the_bios_data_area_is_there_unless_the_kernel_takes_it(memory):
    load(memory, flat(), [], "")
    assert memory.read(0x40E, 2) == b"\xc0\x9f" and memory.read(0x413, 2) == b"\x7f\x02"
    low = GuestMemory([(0, 8 * MIB)])
    load(low, flat(header_at=0x200, load=0x200, entry=0x220, bss_end=0x500), [], "")
    assert low.read(0x200 + 132, 0x500 - 0x284) == bytes(0x500 - 0x284)
    low.close()


def test_modules_have_the_room_behind_the_kernel_and_1_mib(memory):
    assert room_for_modules(memory, flat(bss_end=2 * MIB)) == 6 * MIB
    low = flat(header_at=0x8000, load=0x8000, entry=0x8020, bss_end=0x9001)
    assert room_for_modules(memory, low) == 7 * MIB
    assert room_for_modules(memory, flat(bss_end=9 * MIB)) == 0


def test_a_command_line_that_low_memory_has_no_room_for(memory):
    at = load(memory, flat(), [], "x" * MIB)[0]["rbx"]
    assert at == MIB + 0x1000
    assert memory.read(memory.read_u32(at + 16), MIB + 1) == b"x" * MIB + b"\0"


def test_information_that_would_reach_the_bios_area_goes_behind_the_kernel(memory):
    kernel = flat(header_at=4 * MIB, load=4 * MIB, entry=4 * MIB + 32)
    assert load(memory, kernel, [], "x" * 0x9_7000)[0]["rbx"] == 4 * MIB + 0x1000


def test_only_what_the_addresses_name_is_loaded(memory):
    kernel = flat(at=64, header_at=MIB + 32, load=MIB, load_end=MIB + 80, entry=MIB + 64)
    load(memory, kernel, [], "")
    assert memory.read(MIB, 100) == kernel[32 : 32 + 80] + bytes(20)


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_kernel_goes_where_its_segments_say(memory, bits):
    code = header() + b"\xf4" * 50
    kernel = elf(((MIB, code, 0x3000), (2 * MIB, b"data", 4)), entry=MIB + 12, note=None, bits=bits)
    assert detect(kernel) == ("elf", f"a multiboot 1 kernel: a {bits}-bit ELF file")
    registers, *_ = load(memory, kernel, [Module(b"m", "m")], "")
    assert registers["rip"] == MIB + 12
    assert memory.read(MIB, len(code)) == code
    assert memory.read(2 * MIB, 4) == b"data"
    assert Information(memory, registers["rbx"]).modules[0][0] == 2 * MIB + 0x1000


def test_the_virtual_entry_of_an_elf_kernel_is_made_physical(memory):
    kernel = elf(
        ((MIB, header() + bytes(50), 80),), entry=0xC010_000C, note=None, bits=32,
        virtual=0xC000_0000,
    )  # fmt: skip
    assert load(memory, kernel, [], "")[0]["rip"] == MIB + 12


def test_addresses_count_even_in_an_elf_file(memory):
    # The file has its header at 84: 52 bytes of ELF header and 32 of program header.
    code = header(1 << 16, 2 * MIB, 2 * MIB, 0, 0, 2 * MIB + 40) + b"\xf4" * 50
    kernel = elf(((MIB, code, 200),), entry=MIB, note=None, bits=32)
    assert load(memory, kernel, [], "")[0]["rip"] == 2 * MIB + 40
    assert memory.read(2 * MIB, len(code)) == code
    assert memory.read(MIB, 100) == bytes(100)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (b"no header", "no multiboot header in its first 8 KiB"),
        (header(3 | 1 << 5) + bytes(99), r"requires what there is not \(flags 0x20\)"),
        (header(3 | 1 << 20), "no ELF file, and its multiboot header has no addresses"),
        (flat()[:20], "ends within the address fields"),
        (flat(header_at=MIB - 1), "cannot be at 0xfffff if it is loaded at 0x100000"),
        (flat(header_at=MIB + 4), "cannot be at 0x100004"),
        (flat(load_end=MIB + 4096), "loaded up to 0x101000 is not in the file"),
        (flat(load_end=MIB - 1), "loaded up to 0xfffff is not in the file"),
        (flat(bss_end=MIB + 1), "bss ends at 0x100001, before what is loaded"),
        (flat(entry=MIB - 1), "entry 0xfffff lies outside"),
        (flat(entry=MIB + 132), "entry 0x100084 lies outside"),
        (flat(header_at=0x9_F000, load=0x9_F000, bss_end=0xA_0000, entry=0x9_F000), "overlaps"),
        (flat(header_at=0x400, load=0x400, bss_end=0x600, entry=0x400), "overlaps the boot tables"),
        (flat(bss_end=9 * MIB), "does not fit into memory; use --memory 9M or more"),
        (flat(bss_end=0xFFFF_F000), "link it below 0xc0000000"),
        (elf(((MIB, header(), 99),), entry=5, note=None), "lies in none of its segments"),
        (
            elf(((1 << 32, header(), 99),), entry=1 << 32, note=None),
            "starts at 0x100000000, above 4 GiB",
        ),
    ],
)
def test_a_kernel_that_cannot_be_loaded_is_refused_with_a_remedy(memory, kernel, message):
    with pytest.raises(ImageError, match=message) as caught:
        load(memory, kernel, [], "")
    assert "; " in str(caught.value)


def test_a_kernel_that_wants_a_video_mode_runs_without(memory):
    kernel = bytearray(flat())
    kernel[:32] = header(1 << 16 | 1 << 2, MIB, MIB, 0, 0, MIB + 32)
    assert load(memory, bytes(kernel), [], "")[0]["rip"] == MIB + 32


def test_a_module_that_does_not_fit(memory):
    with pytest.raises(ImageError, match=r"a module of the kernel .* use --memory 10M or more"):
        load(memory, flat(), [Module(bytes(8 * MIB), "m")], "")


@pytest.mark.parametrize(("cmdline", "string"), [("a\0b", "m"), ("", "m\0")])
def test_a_zero_byte_in_a_string_is_refused(memory, cmdline, string):
    with pytest.raises(ConfigError, match="zero byte"):
        load(memory, flat(), [Module(b"m", string)], cmdline)


def test_bytes_that_are_no_text_arrive_as_they_are(memory):
    at = load(memory, flat(), [], "\udcff")[0]["rbx"]
    assert memory.read(memory.read_u32(at + 16), 2) == b"\xff\0"


@pytest.mark.parametrize(
    ("spec", "files"),
    [
        ("a", [("a", "a")]),
        ("dir/a x=1  y,b", [("dir/a", "dir/a x=1  y"), ("b", "b")]),
        ("a,,b c,,d,e", [("a,b", "a,b c,d"), ("e", "e")]),
        (" a , b ", [("a", "a"), ("b", "b")]),
    ],
)
def test_modules_are_named_as_files_with_strings(spec, files):
    assert module_files(spec) == files


def test_no_file_at_all_is_refused():
    for spec in ("", " "):
        with pytest.raises(ConfigError, match="--initrd names no file; name one, or leave it out"):
            module_files(spec)


@pytest.mark.parametrize("spec", [",", "a,", ",a", "a, ,b"])
def test_a_module_without_a_file_is_refused(spec):
    with pytest.raises(ConfigError, match="no file beside it"):
        module_files(spec)


words = st.one_of(
    st.integers(0, 0xFFFF_FFFF),
    st.sampled_from([0, MIB, MIB + 32, MIB + 4096, 0x9000, 0xFFFF_FFFF, 8 * MIB]),
)


@given(st.lists(words, min_size=5, max_size=5), st.integers(0, 40), st.integers(0, 200))
def test_no_header_makes_it_write_outside_of_what_it_claims(addresses, at, cut):
    kernel = bytes(at // 4 * 4) + header(1 << 16, *addresses) + b"\xf4" * 100
    kernel = kernel[: max(12 + at, len(kernel) - cut)]
    memory = GuestMemory([(0, 8 * MIB)])
    try:
        registers, *_ = load(memory, kernel, [Module(b"mod", "m")], "c")
        taken = parse(kernel).taken
        assert registers["rip"] in taken and taken.stop <= 8 * MIB
        information = Information(memory, registers["rbx"])
        assert information.cmdline == "c"
        ((start, data, _),) = information.modules
        assert start >= taken.stop and data == b"mod"
        assert registers["rbx"] not in taken
    except ImageError:
        pass
    finally:
        memory.close()
