"""Loading Linux: what a kernel finds in memory and registers by each protocol.

Everything is read back as the kernel would: by the registers, the structures that they point to
and the tables behind those.
"""

import re
import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_images import PACK, bzimage, elf
from test_boot_flat import descriptor_of

from vmexit import Machine
from vmexit.abi.linux_boot import boot_params
from vmexit.abi.pvh import hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info
from vmexit.arch.x86 import layout
from vmexit.arch.x86.e820 import E820Entry, memory_map
from vmexit.arch.x86.layout import ACPI_TABLES, HIGH_MEMORY, ram_ranges
from vmexit.arch.x86.paging import translate
from vmexit.boot import linux, real_mode
from vmexit.core.errors import ConfigError, ImageError
from vmexit.core.memory import GuestMemory, Region

MIB = 1 << 20
INITRD = b"initrd" * 1000
CMDLINE = "console=ttyS0 quiet"
PVH_KERNEL, KERNEL = elf(), elf(note=None)
KERNEL32 = elf(note=None, bits=32)
PVH_BZIMAGE = bzimage(PACK["gzip"](PVH_KERNEL))
# GRUB's disguise: 2.03, nothing but setup code and what it moves itself.
LNXBOOT = bzimage(version=0x203, sects=1, name=b"", relocatable=0)


@pytest.fixture
def memory():
    memory = GuestMemory(ram_ranges(64 * MIB))
    yield memory
    memory.close()


def load(memory, kernel, initrd=INITRD, cmdline=CMDLINE, protocol="auto", rsdp=ACPI_TABLES):
    return linux.load(memory, kernel, initrd, cmdline, protocol=protocol, rsdp=rsdp)


def text_at(memory: GuestMemory, gpa: int) -> str:
    return bytes(memory[gpa : gpa + 0x1000]).split(b"\0")[0].decode()


@pytest.mark.parametrize(
    ("kernel", "protocol", "detail"),
    [
        (PVH_KERNEL, "pvh", "has a PVH note"),
        (KERNEL, "elf", "has no PVH note"),
        (KERNEL32, "elf", "has no PVH note"),
        (PACK["gzip"](PVH_KERNEL), "pvh", ""),
        (PACK["xz"](KERNEL), "elf", ""),
        (PVH_BZIMAGE, "pvh", "has a PVH note"),
        (bzimage(PACK["xz"](KERNEL)), "elf", "has no PVH note"),
        (bzimage(b"unknown packing"), "64", "packed in no known way"),
        (bzimage(PACK["gzip"](b"no ELF")), "64", "not an ELF file"),
        (bzimage(PACK["gzip"](PVH_KERNEL)[:-9] + bytes(9)), "64", "unpacks to more than"),
        (bzimage(xloadflags=0), "32", ""),
        (bzimage(version=0x20B), "32", ""),
        (bzimage(version=0x204), "16", ""),
        (bzimage(loadflags=0), "16", ""),
        (LNXBOOT, "16", ""),
    ],
)
def test_auto_takes_the_first_protocol_that_the_kernel_has(
    memory, kernel, protocol, detail
) -> None:
    boot = load(memory, kernel)
    assert boot.protocol == protocol and detail in boot.detail


def test_what_a_kernel_offers_is_what_it_can_be_asked_for() -> None:
    assert linux.read(PVH_BZIMAGE).offers() == ["pvh", "elf", "64", "32", "16"]
    for protocol in ("pvh", "elf", "64", "32", "16"):
        memory = GuestMemory(ram_ranges(64 * MIB))
        assert load(memory, PVH_BZIMAGE, protocol=protocol).protocol == protocol
        memory.close()


@pytest.mark.parametrize(
    ("kernel", "protocol", "message"),
    [
        (KERNEL, "pvh", "does not offer the boot protocol pvh; use elf"),
        (KERNEL, "64", "does not offer the boot protocol 64; use elf"),
        (LNXBOOT, "32", "does not offer the boot protocol 32; use 16"),
        (bzimage(b"?"), "pvh", r"protocol pvh \(.*no known way\); use 64, 32, 16"),
        (b"flat image", "auto", "neither a bzImage nor an ELF file; pass vmlinuz or vmlinux"),
        (b"", "auto", "neither a bzImage nor an ELF file"),
        (PACK["gzip"](b"text"), "auto", "neither a bzImage nor an ELF file"),
    ],
)
def test_what_cannot_be_booted_so_is_an_image_error(memory, kernel, protocol, message) -> None:
    with pytest.raises(ImageError, match=message):
        load(memory, kernel, protocol=protocol)


def test_a_protocol_that_there_is_not(memory) -> None:
    with pytest.raises(ConfigError, match="no boot protocol 'uefi'; use auto, pvh, elf, 64, 32"):
        load(memory, KERNEL, protocol="uefi")


# PVH


def start_info(memory, boot) -> hvm_start_info:
    return hvm_start_info.from_buffer_copy(memory.read(boot.entry.registers["rbx"], 56))


@pytest.mark.parametrize("kernel", [PVH_KERNEL, PVH_BZIMAGE], ids=["vmlinux", "bzImage"])
def test_pvh_hands_over_the_start_info(memory, kernel) -> None:
    boot = load(memory, kernel)
    info = start_info(memory, boot)
    assert (info.magic, info.version, info.flags) == (0x336EC578, 1, 0)
    assert text_at(memory, info.cmdline_paddr) == CMDLINE
    assert info.rsdp_paddr == ACPI_TABLES
    size = info.memmap_entries * 24
    raw = memory.read(info.memmap_paddr, size)
    entries = [hvm_memmap_table_entry.from_buffer_copy(raw, at) for at in range(0, size, 24)]
    assert [(e.addr, e.size, e.type) for e in entries] == memory_map(memory.regions)
    module = hvm_modlist_entry.from_buffer_copy(memory.read(info.modlist_paddr, 32))
    assert info.nr_modules == 1 and memory.read(module.paddr, module.size) == INITRD
    assert (module.cmdline_paddr, module.reserved) == (0, 0)
    assert memory.read(0x100_0000, 6) == b"kernel"


def test_pvh_without_an_initrd_has_no_module(memory) -> None:
    for nothing in (None, b""):
        boot = load(memory, PVH_KERNEL, nothing)
        info = start_info(memory, boot)
        assert (info.nr_modules, info.modlist_paddr, boot.initrd) == (0, 0, None)


def test_pvh_starts_in_the_state_that_the_abi_asks_for(memory) -> None:
    """Xen docs/misc/pvh.pandoc."""
    boot = load(memory, PVH_KERNEL)
    registers, system, _ = boot.entry
    assert registers["rip"] == 0x100_0040
    assert (system.cr0 & ~(1 << 4), system.cr4, system.efer) == (1, 0, 0)  # PE; ET is fixed
    assert system.cs.base == 0 and system.cs.limit == 0xFFFF_FFFF
    assert system.cs.type & 0b1010 == 0b1010 and system.cs.db == 1
    for segment in (system.ds, system.es, system.ss):
        assert segment.base == 0 and segment.limit == 0xFFFF_FFFF and segment.type & 0b1010 == 2
    assert (system.tr.base, system.tr.limit, system.tr.type) == (0, 0x67, 0xB)
    assert registers["rflags"] & (1 << 17 | 1 << 9 | 1 << 8) == 0
    assert descriptor_of(memory, boot.entry, system.cs.selector) == system.cs


# The zero page: 32-bit and 64-bit entries


def zero_page(memory, boot) -> boot_params:
    return boot_params.from_buffer_copy(memory.read(boot.entry.registers["rsi"], 4096))


@pytest.mark.parametrize(
    ("kernel", "protocol"),
    [(PVH_BZIMAGE, "64"), (PVH_BZIMAGE, "32"), (PVH_BZIMAGE, "elf"), (KERNEL, "elf"),
     (KERNEL32, "elf")],
)  # fmt: skip
def test_the_zero_page_is_filled_in(memory, kernel, protocol) -> None:
    boot = load(memory, kernel, protocol=protocol)
    page = zero_page(memory, boot)
    assert page.hdr.type_of_loader == 0xFF and page.hdr.boot_flag == 0xAA55
    assert page.hdr.header == int.from_bytes(b"HdrS", "little")
    assert text_at(memory, page.hdr.cmd_line_ptr | page.ext_cmd_line_ptr << 32) == CMDLINE
    assert memory.read(page.hdr.ramdisk_image, page.hdr.ramdisk_size) == INITRD
    assert page.acpi_rsdp_addr == ACPI_TABLES
    table = [(e.addr, e.size, e.type) for e in page.e820_table[: page.e820_entries]]
    assert table == memory_map(memory.regions)
    assert page.sentinel == 0  # else Linux takes the page for a careless copy


def test_the_zero_page_has_the_kernels_own_header_and_nothing_around_it(memory) -> None:
    image = bytearray(bzimage(b"?"))
    image[:0x1F1] = b"\xaa" * 0x1F1
    image[0x26C:0x400] = b"\xbb" * (0x400 - 0x26C)
    boot = load(memory, bytes(image), None)
    page = zero_page(memory, boot)
    assert page.hdr.kernel_alignment == 0x20_0000 and page.hdr.init_size == 0x30_0000
    assert page.hdr.code32_start == 0x100_0000  # told where it is, as it is relocatable
    raw = bytes(page)
    assert b"\xaa\xaa" not in raw[:0x1EF] and b"\xbb" not in raw
    assert (page.hdr.ramdisk_image, page.hdr.ramdisk_size) == (0, 0)


@pytest.mark.parametrize(
    ("kernel", "protocol", "rip", "long"),
    [
        (PVH_BZIMAGE, "64", 0x100_0200, True),
        (PVH_BZIMAGE, "32", 0x100_0000, False),
        (bzimage(relocatable=0), "64", 0x10_0200, True),
        (bzimage(relocatable=0), "32", 0x10_0000, False),
        (bzimage(pref_address=0x100_1000), "32", 0x20_0000, False),
        (bzimage(version=0x205), "32", 0x20_0000, False),
        (elf(note=None, entry=0x100_0123), "elf", 0x100_0123, True),
        (elf(note=None, bits=32, entry=0x100_0123), "elf", 0x100_0123, False),
    ],
)
def test_the_entry_and_the_state_are_those_of_the_protocol(
    memory, kernel, protocol, rip, long
) -> None:
    """boot.rst, "32-bit Boot Protocol" and "64-bit Boot Protocol"."""
    boot = load(memory, kernel, protocol=protocol)
    registers, system, _ = boot.entry
    assert registers["rip"] == rip and registers["rflags"] == 2
    assert registers["rbp"] == registers["rdi"] == registers["rbx"] == 0
    assert system.cs.selector == 0x10
    assert {s.selector for s in (system.ds, system.es, system.ss)} == {0x18}
    for segment in (system.cs, system.ds):
        assert (segment.base, segment.limit) == (0, 0xFFFF_FFFF)
        assert descriptor_of(memory, boot.entry, segment.selector) == segment
    assert (system.cs.l, system.cs.db) == ((1, 0) if long else (0, 1))
    assert (system.cr0 >> 31, system.efer) == ((1, 0x500) if long else (0, 0))
    if long:
        page = zero_page(memory, boot)
        places = (rip, boot.kernel.start, boot.kernel.stop - 1, page.hdr.cmd_line_ptr,
                  registers["rsi"], boot.initrd.start, (4 << 30) - 1)  # fmt: skip
        assert [translate(memory, system, at) for at in places] == list(places)


def test_the_protected_mode_code_is_all_there(memory) -> None:
    code = bytes(range(256)) * 33
    boot = load(memory, bzimage(code=code), protocol="64")
    assert memory.read(boot.kernel.start, len(code)) == code


@pytest.mark.parametrize(
    ("kernel", "taken"),
    [
        (bzimage(), range(0x100_0000, 0x130_0000)),
        (bzimage(relocatable=0), range(0x10_0000, 0x130_0000)),  # it moves itself
        (bzimage(pref_address=0), range(0x20_0000, 0x50_0000)),
        (bzimage(init_size=0), range(0x100_0000, 0x100_0400)),
    ],
)
def test_what_the_kernel_needs_to_unpack_itself_is_kept_free(memory, kernel, taken) -> None:
    """boot.rst, init_size."""
    assert load(memory, kernel, protocol="64").kernel == taken


# Real mode


def test_real_mode_setup_code_gets_its_segments_and_its_header(memory) -> None:
    """boot.rst, "Running the Kernel"."""
    boot = load(memory, PVH_BZIMAGE, protocol="16")
    registers, system, _ = boot.entry
    base = system.ds.base
    assert system.cr0 & 1 == 0
    assert {s.selector for s in (system.ds, system.es, system.fs, system.gs, system.ss)} == {
        base >> 4
    }
    assert (system.cs.base, registers["rip"]) == (layout.BIOS_STUB, 0)  # it goes first
    ip, cs = struct.unpack("<HH", memory.read(layout.BIOS_STUB + 0xA00, 4))
    assert (cs << 4) + ip == base + 0x200 and not registers["rflags"] & 1 << 9
    setup = memory.read(base, 5 * 512)
    assert setup[:0x1F1] == PVH_BZIMAGE[:0x1F1] and setup[0x26C:] == PVH_BZIMAGE[0x26C : 5 * 512]
    assert setup[0x1FA:0x1FC] == b"\x04\x0f"  # leave the video mode as it is
    assert setup[0x210] == 0xFF and setup[0x211] == 0x81  # loader, CAN_USE_HEAP | LOADED_HIGH
    (heap_end,) = struct.unpack_from("<H", setup, 0x224)
    assert registers["rsp"] == heap_end + 0x200 <= 0x1_0000
    (cmdline,) = struct.unpack_from("<I", setup, 0x228)
    assert base + heap_end < cmdline < 0xA_0000 and text_at(memory, cmdline) == CMDLINE
    ramdisk, size = struct.unpack_from("<II", setup, 0x218)
    assert memory.read(ramdisk, size) == INITRD
    (code32,) = struct.unpack_from("<I", setup, 0x214)
    assert memory.read(code32, 16) == b"\x90" * 16 == memory.read(boot.kernel.start, 16)


def test_a_header_longer_than_known_is_kept_as_it_is(memory) -> None:
    image = bytearray(PVH_BZIMAGE)
    image[0x201] = 0x8E
    image[0x26C:0x290] = b"\xcc" * 0x24
    boot = load(memory, bytes(image), protocol="16")
    assert memory.read(boot.entry.system.ds.base + 0x26C, 0x24) == b"\xcc" * 0x24
    boot = load(memory, bytes(image), protocol="64")
    assert bytes(zero_page(memory, boot))[0x26C:0x290] == b"\xcc" * 0x24


def test_before_2_02_the_setup_code_is_at_0x90000_with_the_old_command_line(memory) -> None:
    boot = load(memory, bzimage(version=0x201), cmdline="root=/dev/hda1")
    base = boot.entry.system.ds.base
    magic, offset = struct.unpack("<HH", memory.read(base + 0x20, 4))
    assert (base, magic) == (0x9_0000, 0xA33F)
    assert text_at(memory, base + offset) == "root=/dev/hda1"
    assert boot.entry.registers["rsp"] <= offset


def test_since_2_02_there_is_a_whole_segment_for_it(memory) -> None:
    assert load(memory, bzimage(version=0x202)).entry.system.ds.base == 0x1_0000


def test_a_zimage_is_loaded_low(memory) -> None:
    boot = load(memory, bzimage(version=0x200, loadflags=0, code=b"\x91" * 64))
    assert memory.read(0x1_0000, 64) == b"\x91" * 64 and boot.kernel.start == 0x1_0000
    with pytest.raises(ImageError, match=r"the kernel at 0x10000.* overlaps the setup code at"):
        load(memory, bzimage(version=0x200, loadflags=0, code=bytes(0x8_0001)))


def test_setup_code_that_leaves_no_stack_is_refused(memory) -> None:
    with pytest.raises(ImageError, match=r"setup code has 65536 bytes.* room for 56320; "):
        load(memory, bzimage(sects=127), protocol="16")


def test_the_bios_tells_how_much_memory_there_is(memory) -> None:
    for size, told in [
        (2, (1024, 1024, 0)),
        (16, (15360, 15360, 0)),
        (24, (23552, 15360, 128)),
        (4096, (64512, 15360, 0xBF00)),
    ]:  # up to the hole at 3 GiB
        ram = memory_map(
            Region(start, n, 0, memoryview(b""), False) for start, n in ram_ranges(size * MIB)
        )
        image = real_mode.bios((0, 0x1020), ram)
        assert struct.unpack_from("<6H", image, 0xA00) == (0, 0x1020, *told, len(ram))
        entries = struct.iter_unpack("<QQI", image[0xA0C : 0xA0C + 20 * len(ram)])
        assert list(entries) == ram
        assert image[0xFF0] == 0xEA  # what a reset jumps by is whole


def test_the_bios_refuses_more_memory_ranges_than_it_has_room_for() -> None:
    real_mode.bios((0, 0), [E820Entry(0, 1, 1)] * 75)
    with pytest.raises(ValueError, match="room for 75 memory ranges"):
        real_mode.bios((0, 0), [E820Entry(0, 1, 1)] * 76)


# Where things go


@pytest.mark.parametrize("protocol", ["pvh", "elf", "64", "32", "16"])
def test_the_initrd_is_as_high_as_it_can_be(protocol) -> None:
    memory = GuestMemory(ram_ranges(64 * MIB))
    boot = load(memory, PVH_BZIMAGE, b"i" * 0x2001, protocol=protocol)
    assert boot.initrd == range(64 * MIB - 0x3000, 64 * MIB - 0x3000 + 0x2001)
    memory.close()


@pytest.mark.parametrize(("limit", "end"), [(0x2FF_FFFF, 0x300_0000), (0x2FF_FFFE, 0x2FF_F000)])
def test_the_initrd_ends_below_the_kernels_limit(memory, limit, end) -> None:
    boot = load(memory, bzimage(initrd_addr_max=limit), b"i" * 0x1000, protocol="64")
    assert boot.initrd.stop == end


def test_a_kernel_in_the_way_pushes_the_initrd_below_it(memory) -> None:
    kernel = elf(((63 * MIB, b"kernel", MIB), (61 * MIB, b"x", MIB)), note=None, entry=63 * MIB)
    boot = load(memory, kernel, bytes(MIB + 1))
    assert boot.initrd.start == 60 * MIB - 0x1000
    assert load_again(kernel, bytes(MIB)).initrd.start == 62 * MIB


def load_again(kernel, initrd):
    memory = GuestMemory(ram_ranges(64 * MIB))
    try:
        return load(memory, kernel, initrd)
    finally:
        memory.close()


@pytest.mark.parametrize("protocol", ["pvh", "elf", "64", "32", "16"])
def test_memory_that_is_too_small_says_how_much_is_needed_and_that_is_enough(protocol) -> None:
    initrd = bytes(20 * MIB)  # does not fit below the kernel

    def attempt(mib: int) -> None:
        memory = GuestMemory(ram_ranges(mib * MIB))
        try:
            load(memory, PVH_BZIMAGE, initrd, protocol=protocol)
        finally:
            memory.close()

    message = re.compile(r"does not fit into memory; use --memory (\d+)M or more")
    for mib in (1, 4, 16, 20):
        needed = mib
        for _ in range(2):  # the kernel, then the initrd: each says what it needs
            with pytest.raises(ImageError, match=message) as caught:
                attempt(needed)
            needed = int(message.search(str(caught.value))[1])
            if "initrd" in str(caught.value):
                break
        attempt(needed)
        with pytest.raises(ImageError):
            attempt(needed - 1)


def test_too_little_memory_for_the_acpi_tables_says_so_too(tmp_path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(PVH_BZIMAGE)
    with pytest.raises(ImageError, match=r"the ACPI tables .* does not fit .*use --memory 1M"):
        Machine("512K", "soft", kernel=path)


def test_an_initrd_that_no_memory_would_be_enough_for(memory) -> None:
    with pytest.raises(ImageError, match="must be below 0x2000000: use a smaller one"):
        load(memory, bzimage(initrd_addr_max=0x1FF_FFFF), bytes(16 * MIB), protocol="64")


@pytest.mark.parametrize(
    ("at", "what"),
    [(0x7000, "the boot tables"), (0x2_0000, "the command line"), (0xE_0000, "the BIOS area")],
)
def test_a_kernel_segment_over_the_boot_structures_is_refused(memory, at, what) -> None:
    kernel = elf(((at, b"kernel", 0x100),), note=None, entry=at)
    with pytest.raises(ImageError, match=rf"overlaps {what}"):
        load(memory, kernel)


def test_the_places_of_the_boot_structures_do_not_overlap() -> None:
    places = sorted([
        (layout.KERNEL_GDT, 0x100), (layout.PVH_START_INFO, 0x1000), (layout.ZERO_PAGE, 0x1000),
        (layout.KERNEL_PAGE_TABLES, 0x6000), (layout.REAL_MODE_SETUP, 0x1_0000),
        (layout.KERNEL_CMDLINE, layout.KERNEL_CMDLINE_END - layout.KERNEL_CMDLINE),
        (layout.REAL_MODE_SETUP_OLD, 0x9900), (layout.EBDA_START, 0x400),
        (layout.ACPI_TABLES, layout.BIOS_STUB - layout.ACPI_TABLES), (layout.BIOS_STUB, 0x1000),
        (HIGH_MEMORY, MIB), (0, 0x500),
    ])  # fmt: skip
    for (start, size), (after, _) in pairwise(places):
        assert start + size <= after


def test_the_bios_data_area_has_the_ebda_and_the_base_memory(memory) -> None:
    load(memory, PVH_KERNEL)
    assert memory.read_u16(0x40E) << 4 == 0x9_FC00 and memory.read_u16(0x413) == 639


@pytest.mark.parametrize(
    ("kernel", "limit"),
    [(PVH_KERNEL, 2047), (PVH_BZIMAGE, 2047), (bzimage(cmdline_size=100), 100),
     (bzimage(version=0x205), 255), (bzimage(cmdline_size=0xFFFF_FFFF), 0xFFFF)],
)  # fmt: skip
def test_a_command_line_is_as_long_as_the_kernel_takes_it(memory, kernel, limit) -> None:
    load(memory, kernel, cmdline="x" * limit)
    message = f"has {limit + 1} bytes, and the kernel takes {limit}; use a shorter --append"
    with pytest.raises(ConfigError, match=message):
        load(memory, kernel, cmdline="x" * (limit - 1) + "é")


def test_a_command_line_with_a_zero_byte(memory) -> None:
    with pytest.raises(ConfigError, match="zero byte"):
        load(memory, KERNEL, cmdline="a\0b")


def test_a_command_line_of_odd_bytes_arrives_as_they_were_typed(memory) -> None:
    boot = load(memory, PVH_KERNEL, cmdline=b"a=\xff\xc3\xa9".decode("utf-8", "surrogateescape"))
    at = start_info(memory, boot).cmdline_paddr
    assert memory.read(at, 6) == b"a=\xff\xc3\xa9\0"


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([PVH_BZIMAGE, PVH_KERNEL, bzimage(version=0x201), bzimage(loadflags=0)]),
    st.sampled_from(linux.PROTOCOLS),
    st.lists(st.tuples(st.integers(0, 0x280), st.binary(min_size=1, max_size=8)), max_size=5),
    st.integers(1, 6000),
)
def test_damage_anywhere_is_never_more_than_an_image_error(
    kernel, protocol, damage, length
) -> None:
    raw = bytearray(kernel)
    for at, patch in damage:
        raw[at : at + len(patch)] = patch
    memory = GuestMemory(ram_ranges(20 * MIB))
    try:
        load(memory, bytes(raw[:length]), b"initrd", "quiet", protocol)
    except ImageError as error:
        assert "; " in str(error) and len(str(error).splitlines()) == 1
    except ConfigError as error:  # a kernel that says it takes no command line
        assert "command line" in str(error)
    finally:
        memory.close()
