"""ELF kernels: the segments land where the headers say, and damaged headers are image errors."""

import struct
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_images import XEN_NOTE, elf

from vmexit.arch.x86.layout import ram_ranges
from vmexit.boot import elf as boot_elf
from vmexit.boot.placement import Placement
from vmexit.core.errors import ImageError
from vmexit.core.memory import GuestMemory

MIB = 1 << 20


def refusal(data: bytes) -> str:
    """The message of the ImageError for `data`: one line, with a remedy."""
    with pytest.raises(ImageError) as caught:
        boot_elf.parse(data)
    message = str(caught.value)
    assert "; " in message and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("bits", [32, 64])
def test_headers_are_read(bits) -> None:
    segments = ((0x100_0000, b"text", 0x1000), (0x100_2000, b"data", 0x3000))
    kernel = boot_elf.parse(elf(segments, bits=bits, virtual=0x4000_0000))
    assert (kernel.bits, kernel.entry, kernel.pvh_entry) == (bits, 0x100_0000, 0x100_0040)
    assert [(s.paddr, s.vaddr, s.filesz, s.memsz) for s in kernel.segments] == [
        (0x100_0000, 0x4100_0000, 4, 0x1000),
        (0x100_2000, 0x4100_2000, 4, 0x3000),
    ]
    assert kernel.span == range(0x100_0000, 0x100_5000)


@pytest.mark.parametrize("bits", [32, 64])
def test_segments_are_copied_and_nothing_else_is_written(bits) -> None:
    memory = GuestMemory(ram_ranges(32 * MIB))
    data = elf(((0x10_0000, b"text", 0x1000), (0x10_2FFC, b"data", 0x3000)), bits=bits, note=None)
    boot_elf.load(memory, memoryview(data), boot_elf.parse(data), Placement(memory))
    expected = bytearray(32 * MIB)
    expected[0x10_0000:0x10_0004], expected[0x10_2FFC:0x10_3000] = b"text", b"data"
    assert bytes(memory[0 : 32 * MIB]) == expected
    memory.close()


def test_a_large_kernel_is_loaded_without_copies_of_its_own() -> None:
    """A bound for a busy machine; it takes 20 ms on an idle one."""
    content = b"\xcc" * (60 * MIB)
    data = elf(((16 * MIB, content, 64 * MIB),))
    memory = GuestMemory(ram_ranges(128 * MIB))
    began = time.process_time()
    boot_elf.load(memory, data, boot_elf.parse(data), Placement(memory))
    assert time.process_time() - began < 0.3
    assert memory.read(16 * MIB + len(content) - 1, 2) == b"\xcc\0"
    memory.close()


@pytest.mark.parametrize(
    ("note", "align", "entry"),
    [
        (None, 4, None),
        (b"", 4, None),
        (XEN_NOTE, 4, 0x100_0040),
        (struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", 0x100_0040), 4, 0x100_0040),
        # other notes before it: a name and a description that are filled up to 4 bytes
        (struct.pack("<III8s4s", 6, 1, 18, b"Linux\0", b"x") + XEN_NOTE, 4, 0x100_0040),
        (struct.pack("<III4s4s", 4, 3, 6, b"Xen\0", b"abc") + XEN_NOTE, 4, 0x100_0040),
        # … or to 8
        (struct.pack("<III4s1s7s", 4, 1, 6, b"Xen\0", b"a", b"") + XEN_NOTE, 8, 0x100_0040),
        (struct.pack("<III4sI", 4, 4, 17, b"Xen\0", 0x100_0040), 4, None),
        (struct.pack("<III4sI", 4, 4, 18, b"NeX\0", 0x100_0040), 4, None),
        (struct.pack("<III", 0xFFFF_FFFF, 0xFFFF_FFFF, 18), 4, None),
    ],
)
def test_the_pvh_note_is_found_among_others(note, align, entry) -> None:
    assert boot_elf.parse(elf(note=note, note_align=align)).pvh_entry == entry


@pytest.mark.parametrize(
    ("entry", "virtual", "physical"),
    [
        (0x100_0010, 0, 0x100_0010),
        (0x100_0010, 0x4000_0000, 0x100_0010),  # as vmlinux has it: physical already
        (0x4100_0010, 0x4000_0000, 0x100_0010),
    ],
)
def test_the_entry_is_physical_whatever_the_header_has(entry, virtual, physical) -> None:
    kernel = boot_elf.parse(elf(entry=entry, virtual=virtual))
    assert kernel.physical_entry() == physical


def test_an_entry_in_no_segment() -> None:
    kernel = boot_elf.parse(elf(entry=0x200_0000, note=None))
    with pytest.raises(ImageError, match=r"entry 0x2000000 .* lies in none of its segments; "):
        kernel.physical_entry()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an ELF file"),
        (b"\x7fELF", "cut short"),
        (elf()[:50], "cut short"),
        (elf()[:5] + b"\2" + elf()[6:], "big-endian"),
        (elf(machine=183), "machine 183"),
        (elf(kind=1), "not linked"),
        (elf(segments=()), "nothing to load"),
        (elf(((0x10_0000, b"", 0),), note=None), "nothing to load"),
        (elf()[:100], "program headers at 0x40 reach behind its end"),
        (elf()[:-20], "reaches behind its end"),
        (elf(((0x10_0000, b"abc", 2),)), "more bytes in the file than in memory"),
        (elf(((0x10_0000, b"a", 0x1001), (0x10_1000, b"b", 1))), "0x100000 and 0x101000 overlap"),
        (elf(((1 << 52, b"a", 1),), note=None), "no x86 CPU can reach"),
        (elf(note=struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x5000)), "PVH entry 0x5000 lies in"),
        (elf(note=struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", 1 << 32)), "above 4 GiB"),
        (elf(note=struct.pack("<III4s3s", 4, 3, 18, b"Xen\0", b"abc")), "3 bytes, not 4 or 8"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_its_reason(data, message) -> None:
    assert message in refusal(data)


def test_a_segment_outside_of_ram_says_how_much_memory_it_needs() -> None:
    memory = GuestMemory(ram_ranges(8 * MIB))
    data = elf(((7 * MIB, b"kernel", 3 * MIB),), note=None)
    with pytest.raises(ImageError, match="does not fit into memory; use --memory 10M or more"):
        boot_elf.load(memory, data, boot_elf.parse(data), Placement(memory))
    # The most that it needs, at once.
    data = elf(((9 * MIB, b"kernel", MIB), (20 * MIB, b"data", MIB)), note=None)
    with pytest.raises(ImageError, match="does not fit into memory; use --memory 21M or more"):
        boot_elf.load(memory, data, boot_elf.parse(data), Placement(memory))
    data = elf(((0xF000_0000, b"kernel", MIB),), note=None)
    with pytest.raises(ImageError, match="link it below 0xc0000000"):
        boot_elf.load(memory, data, boot_elf.parse(data), Placement(memory))
    memory.close()


def test_a_segment_over_what_is_taken_is_refused() -> None:
    memory = GuestMemory(ram_ranges(8 * MIB))
    placement = Placement(memory)
    placement.claim(0x10_0800, 0x1000, "the zero page")
    data = elf(((0x10_0000, b"kernel", 0x801),), note=None)
    with pytest.raises(ImageError, match=r"overlaps the zero page at 0x100800\.\.0x1017ff; link"):
        boot_elf.load(memory, data, boot_elf.parse(data), placement)
    assert not any(memory[0x10_0000:0x10_1000])
    memory.close()


WHOLE = elf(((0x10_0000, b"text", 0x1000), (0x20_0000, b"data", 0x1000)), note=XEN_NOTE * 2)
WHOLE32 = elf(((0x10_0000, b"text", 0x1000), (0x20_0000, b"data", 0x1000)), bits=32)


@settings(max_examples=400)
@given(
    st.sampled_from([WHOLE, WHOLE32]),
    st.lists(st.tuples(st.integers(4, 300), st.binary(min_size=1, max_size=8)), max_size=6),
    st.integers(0, 400),
)
@example(WHOLE, [(54, b"\xff\xff\xff\xff")], 400)  # e_phentsize, e_phnum
def test_damage_anywhere_is_never_more_than_an_image_error(data, damage, length) -> None:
    raw = bytearray(data)
    for at, patch in damage:
        raw[at : at + len(patch)] = patch
    raw = raw[:length]
    memory = GuestMemory([(0, 4 * MIB)])
    try:
        kernel = boot_elf.parse(bytes(raw))
        boot_elf.load(memory, bytes(raw), kernel, Placement(memory))
        kernel.physical_entry()
    except ImageError as error:
        assert "; " in str(error)
    finally:
        memory.close()
