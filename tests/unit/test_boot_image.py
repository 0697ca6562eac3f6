"""Reading an image file either gives its bytes or an ImageError of one line with a remedy;
telling what an image is never fails, whatever the bytes.
"""

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.boot.image import detect, read_image
from vmexit.core.errors import ImageError


def refusal(path: str | os.PathLike[str], **limit: int) -> str:
    """The message of the ImageError that `path` must give; one line with a remedy, no leak."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError) as caught:
        read_image(path, **limit)
    assert set(os.listdir("/proc/self/fd")) == before
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "; " in message
    return message


def test_an_image_is_read_byte_for_byte_from_a_string_or_a_path(tmp_path) -> None:
    file, data = tmp_path / "guest.bin", bytes(range(256)) * 33
    file.write_bytes(data)
    assert read_image(file) == read_image(str(file)) == data


def test_an_image_behind_a_symlink_is_read(tmp_path) -> None:
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    (tmp_path / "link").symlink_to("guest.bin")
    assert read_image(tmp_path / "link") == b"\xf4"


def test_a_missing_image(tmp_path) -> None:
    path = tmp_path / "absent.bin"
    assert refusal(path) == f"cannot read image {path}: No such file or directory; check the path"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file, whatever its mode")
def test_an_unreadable_image(tmp_path) -> None:
    path = tmp_path / "secret.bin"
    path.write_bytes(b"\xf4")
    path.chmod(0)
    assert refusal(path).endswith("Permission denied; make it readable, or choose another")


def test_an_empty_image(tmp_path) -> None:
    path = tmp_path / "empty.bin"
    path.touch()
    assert refusal(path) == f"image {path} is empty; build it again"


def test_a_directory(tmp_path) -> None:
    assert refusal(tmp_path) == f"image {tmp_path} is a directory; name a file in it"


@pytest.mark.timeout(20)
def test_a_fifo_without_a_writer_does_not_hold_up_the_reader(tmp_path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert refusal(path) == f"image {path} is not a regular file; copy it to one"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_a_device(path) -> None:
    assert "not a regular file" in refusal(path)


def test_the_largest_image_is_read_and_one_byte_more_is_not(tmp_path) -> None:
    path = tmp_path / "guest.bin"
    path.write_bytes(bytes(1000))
    assert len(read_image(path, limit=1000)) == 1000
    message = refusal(path, limit=999)
    assert "1000 bytes, which is more than 999; use a smaller one, or more --memory" in message


def test_an_absurdly_large_image_is_refused_before_it_is_read(tmp_path) -> None:
    path = tmp_path / "sparse.bin"
    with open(path, "wb") as file:
        file.truncate((4 << 30) + 1)
    assert str((4 << 30) + 1) in refusal(path)


@pytest.mark.parametrize(
    "name", ["nul\0byte", "\ud800", "x" * 300, "a/" * 3000, "guest.bin/", "guest.bin/x", "loop"]
)
def test_a_path_that_cannot_be(tmp_path, name) -> None:
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(f"{tmp_path}/{name}").startswith("cannot read image ")


def test_an_empty_path() -> None:
    assert refusal("").startswith("cannot read image ")


def test_a_newline_in_the_name_does_not_break_the_message_in_two(tmp_path) -> None:
    refusal(tmp_path / "two\nlines.bin")


def multiboot1(at: int, flags: int = 3, wrong: int = 0) -> bytes:
    magic = 0x1BADB002
    checksum = -(magic + flags) + wrong & 0xFFFF_FFFF
    return bytes(at) + struct.pack("<3I", magic, flags, checksum)


def multiboot2(at: int, length: int = 24, wrong: int = 0) -> bytes:
    magic, i386 = 0xE85250D6, 0
    checksum = -(magic + i386 + length) + wrong & 0xFFFF_FFFF
    return bytes(at) + struct.pack("<4I", magic, i386, length, checksum)


ROM = bytes(0x10000 - 16) + b"\xea\x5b\xe0\x00\xf0".ljust(16, b"\0")
IMAGES = {
    "elf64": (b"\x7fELF\2\1\1" + bytes(57), "elf"),
    "elf32": (b"\x7fELF\1\1\1" + bytes(45), "elf"),
    "elf cut off": (b"\x7fELF", "elf"),
    "elf with multiboot": (b"\x7fELF\1" + multiboot1(0x1000)[5:], "elf"),
    "no elf": (b"\x7fELG\2" + bytes(59), "flat"),
    "bzImage": (b"MZ".ljust(0x202, b"\x90") + b"HdrS" + bytes(600), "bzimage"),
    "HdrS elsewhere": (bytes(0x203) + b"HdrS" + bytes(600), "flat"),
    "multiboot 1": (multiboot1(0x40) + bytes(100), "multiboot"),
    "multiboot 1, all of the image": (multiboot1(0), "multiboot"),
    "multiboot 1, not aligned": (multiboot1(0x42), "flat"),
    "multiboot 1, wrong checksum": (multiboot1(0x40, wrong=1), "flat"),
    "multiboot 1, the right one second": (multiboot1(0x40, wrong=1) + multiboot1(4), "multiboot"),
    "multiboot 1, cut off": (multiboot1(0x40)[:-1], "flat"),
    "multiboot 1, last place": (multiboot1(8192 - 12), "multiboot"),
    "multiboot 1, too late": (multiboot1(8192), "flat"),
    # "contained completely within the first 8192 bytes" (Multiboot 0.6.96, 3.1)
    "multiboot 1, half within": (multiboot1(8192 - 8), "flat"),
    "multiboot 2": (multiboot2(0x40) + bytes(100), "multiboot2"),
    "multiboot 2, wrong checksum": (multiboot2(0x40, wrong=4), "flat"),
    "multiboot 2, last place": (multiboot2(32768 - 16), "multiboot2"),
    "multiboot 2, too late": (multiboot2(32768), "flat"),
    # "must be 64-bit aligned" (Multiboot2 2.0, 3.1)
    "multiboot 2, aligned to 4": (multiboot2(0x44), "flat"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "gzip"),
    "boot sector": (bytes(510) + b"\x55\xaa", "boot-sector"),
    "55 aa later": (bytes(510) + b"\x55\xaa\0", "flat"),
    "sector without 55 aa": (bytes(512), "flat"),
    "firmware": (ROM, "firmware"),
    "firmware, large": (bytes(0x30000) + ROM, "firmware"),
    "firmware, not whole pages": (bytes(16) + ROM, "flat"),
    "firmware, too small": (ROM[0x1000:], "flat"),
    "no jump at the reset vector": (bytes(0x10000), "flat"),
    "code": (b"\xb0\x41\xe6\x10\xf4", "flat"),
    "nothing": (b"", "flat"),
}


@pytest.mark.parametrize(("data", "kind"), IMAGES.values(), ids=IMAGES.keys())
def test_an_image_is_what_its_header_says(data, kind) -> None:
    assert detect(data).name == kind


def test_the_description_tells_32_from_64_bit_elf() -> None:
    assert detect(IMAGES["elf32"][0]).description == "a 32-bit ELF file"
    assert detect(IMAGES["elf64"][0]).description == "a 64-bit ELF file"
    assert "unknown" in detect(IMAGES["elf cut off"][0]).description


headers = st.sampled_from([data for data, _ in IMAGES.values()])
pieces = st.tuples(headers, st.integers(0, 64), st.binary(max_size=64)).map(
    lambda t: t[0][: max(0, len(t[0]) - t[1])] + t[2]
)


@given(st.one_of(st.binary(max_size=1024), pieces, st.tuples(pieces, pieces).map(b"".join)))
def test_whatever_the_bytes_they_get_a_name_and_a_description(data) -> None:
    kind = detect(data)
    assert kind.name and kind.description


def test_every_guest_of_the_repository_that_is_flat_is_taken_for_flat() -> None:
    images = sorted((Path(__file__).parents[2] / "guests").glob("*.bin"))
    assert images, "guests/ holds the flat images of the project"
    assert {detect(i.read_bytes()).name for i in images} <= {"flat", "boot-sector"}
