"""The setup header of every protocol version, and the kernel inside a bzImage."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_images import PACK, bzimage, elf

from vmexit.boot import bzimage as boot_bzimage
from vmexit.core.errors import ImageError

KERNEL = elf(note=None)


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        boot_bzimage.parse(data)
    message = str(caught.value)
    assert "; " in message and len(message.splitlines()) == 1
    return message


def test_a_header_of_today_is_read_in_full() -> None:
    data = bzimage(b"payload!" * 4)
    image = boot_bzimage.parse(data)
    assert image.protocol_version == "2.15" and image.name == "6.1.0-test (me) #1"
    assert (image.setup, image.load, image.loaded_high) == (5 * 512, 0x10_0000, True)
    assert (image.relocatable, image.alignment, image.min_alignment) == (True, 0x20_0000, 21)
    assert (image.pref_address, image.init_size) == (0x100_0000, 0x30_0000)
    assert (image.cmdline_size, image.initrd_addr_max) == (2047, 0x7FFF_FFFF)
    assert image.offers_64 and image.offers_32
    assert data[image.payload.start : image.payload.stop] == b"payload!" * 4
    assert image.header_end == 0x26C


@pytest.mark.parametrize("minor", range(16))
def test_a_field_counts_from_the_version_that_it_came_with(minor) -> None:
    """boot.rst, the table of the header; the bytes are all there, and mean something only then."""
    image = boot_bzimage.parse(bzimage(PACK["gzip"](KERNEL), version=0x200 + minor))
    assert image.initrd_addr_max == (0x7FFF_FFFF if minor >= 3 else 0x37FF_FFFF)
    assert image.relocatable == (minor >= 5)
    assert image.cmdline_size == (2047 if minor >= 6 else 255)
    assert bool(image.payload) == (minor >= 8)
    assert bool(image.pref_address) == bool(image.init_size) == (minor >= 10)
    assert image.offers_64 == (minor >= 12)
    assert image.offers_32 == (minor >= 5)


def test_a_kernel_that_is_not_loaded_high_has_only_its_real_mode_entry() -> None:
    image = boot_bzimage.parse(bzimage(loadflags=0))
    assert (image.load, image.offers_32, image.offers_64) == (0x1_0000, False, False)


def test_0_setup_sectors_are_4() -> None:
    assert boot_bzimage.parse(bzimage(sects=0)).setup == 5 * 512


@pytest.mark.parametrize("name", PACK)
def test_the_payload_is_recognized_and_unpacked(name) -> None:
    data = bzimage(PACK[name](KERNEL))
    image = boot_bzimage.parse(data)
    assert boot_bzimage.payload_compression(data, image) == name
    assert boot_bzimage.unpack(data, image) == KERNEL


def test_a_payload_that_is_not_as_large_as_it_says_is_refused() -> None:
    packed = PACK["xz"](KERNEL)[:-4]
    for wrong in (len(KERNEL) + 1, len(KERNEL) - 1, 0, 0xFFFF_FFFF):
        data = bzimage(packed + struct.pack("<I", wrong))
        with pytest.raises(ImageError, match="; build "):
            boot_bzimage.unpack(data, boot_bzimage.parse(data))


@pytest.mark.parametrize("payload", [b"", b"not packed at all", b"\x89LZO\0\r\n\x1a\n" * 9])
def test_a_payload_that_cannot_be_unpacked_is_an_image_error(payload) -> None:
    data = bzimage(payload)
    with pytest.raises(ImageError, match="; "):
        boot_bzimage.unpack(data, boot_bzimage.parse(data))


def patched(at: int, patch: bytes) -> bytes:
    data = bytearray(bzimage(b"payload"))
    data[at : at + len(patch)] = patch
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no Linux setup header"),
        (bzimage()[:0x300], "cut short"),
        (patched(0x202, b"HdrX"), "no Linux setup header"),
        (patched(0x1FE, b"\0\0"), "boot flag is 0x0"),
        (patched(0x206, b"\x00\x03"), "boot protocol 3.00"),
        (patched(0x1F1, b"\xff"), "setup code of 131072 bytes reaches behind its end"),
        (patched(0x24C, b"\xff\xff\xff\xff"), "payload of 4294967295 bytes"),
        (patched(0x230, b"\x03\0\0\0"), "alignment 0x3 is not a power of 2"),
        (patched(0x230, b"\0\0\0\0"), "alignment 0x0 is not a power of 2"),
        (patched(0x258, b"\xff" * 8), "preferred address"),
    ],
)
def test_what_cannot_be_a_kernel_is_refused_with_its_reason(data, message) -> None:
    assert message in refusal(data)


@pytest.mark.parametrize("pointer", [0xFFFF, 0x800, 0x7FF])
def test_a_version_string_outside_the_setup_code_is_no_version_string(pointer) -> None:
    image = boot_bzimage.parse(patched(0x20E, struct.pack("<H", pointer)))
    assert image.name == ""


def test_a_version_string_that_would_disturb_a_terminal_is_left_out() -> None:
    assert boot_bzimage.parse(bzimage(name=b"6.1\x1b[2J")).name == ""


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0x1F1, 0x280), st.binary(min_size=1, max_size=8)), max_size=6),
    st.integers(0, 6000),
)
def test_damage_anywhere_is_never_more_than_an_image_error(damage, length) -> None:
    raw = bytearray(bzimage(PACK["gzip"](KERNEL)))
    for at, patch in damage:
        raw[at : at + len(patch)] = patch
    data = bytes(raw[:length])
    try:
        image = boot_bzimage.parse(data)
        boot_bzimage.unpack(data, image)
    except ImageError as error:
        assert "; " in str(error)
