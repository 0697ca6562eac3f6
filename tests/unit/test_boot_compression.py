"""Compressed kernels are unpacked within a limit; damage and bombs are image errors."""

import gzip
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_images import PACK

from vmexit.boot import compression
from vmexit.core.errors import ImageError

CONTENT = bytes(range(256)) * 300


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("content", [CONTENT, b"x", bytes(9 << 20), b"y" * (8 << 20)], ids=len)
def test_each_kind_is_recognized_and_unpacked(name, content) -> None:
    packed = PACK[name](content)
    assert compression.detect(packed) == name
    assert compression.unpack(packed, name) == content
    assert compression.unpack(memoryview(packed), name, len(content)) == content


# An lz4 legacy frame has no end mark: only the appended size may follow it.
@pytest.mark.parametrize("name", sorted(set(PACK) - {"lz4"}))
def test_what_follows_the_stream_is_left_out(name) -> None:
    assert compression.unpack(PACK[name](CONTENT) + b"relocations" * 99, name) == CONTENT


@pytest.mark.parametrize("name", PACK)
def test_a_stream_that_unpacks_to_more_than_the_limit_is_refused(name) -> None:
    packed = PACK[name](CONTENT)
    with pytest.raises(
        ImageError, match=rf"{name} kernel unpacks to more than the 76799 bytes .*; "
    ):
        compression.unpack(packed, name, len(CONTENT) - 1)


def test_a_bomb_takes_no_more_memory_than_the_limit() -> None:
    """256 MiB of zeros in a process that may not have that much."""
    bomb = gzip.compress(bytes(256 << 20), 1)
    code = (
        "import resource, sys\n"
        "from vmexit.boot import compression\n"
        "from vmexit.core.errors import ImageError\n"
        "data = sys.stdin.buffer.read()\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (64 << 20, 64 << 20))\n"
        "try: compression.unpack(data, 'gzip', 1 << 20)\n"
        "except ImageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True)
    assert b"unpacks to more than the 1048576 bytes" in done.stdout, done.stderr


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_stream_that_ends_early_is_refused(name, keep) -> None:
    content = os.urandom(200_000)
    packed = PACK[name](content)
    with pytest.raises(ImageError, match=rf"the {name} kernel is damaged: .*; build it again"):
        compression.unpack(packed[: int(len(packed) * keep)], name)


def test_an_lz4_block_that_is_cut_short_is_not_taken_for_a_shorter_one() -> None:
    packed = PACK["lz4"](CONTENT)
    with pytest.raises(ImageError, match="a block reaches behind the end"):
        compression.unpack(packed[:-5], "lz4")


def test_lz4_frames_may_follow_each_other() -> None:
    """As the kernel's own lib/decompress_unlz4.c takes them."""
    frame = PACK["lz4"](CONTENT)[:-4]
    assert compression.unpack(frame * 2 + bytes(4), "lz4") == CONTENT * 2


def test_lzo_is_recognized_and_named_as_not_supported() -> None:
    lzo = b"\x89LZO\0\r\n\x1a\n" + bytes(100)
    assert compression.detect(lzo) == "lzo"
    with pytest.raises(ImageError, match="packed with lzo cannot be unpacked; build it with gzip"):
        compression.unpack(lzo, "lzo")


@pytest.mark.parametrize(("name", "module"), [("lz4", "lz4.block"), ("zstd", "zstandard")])
def test_a_missing_module_is_named_with_how_to_get_it(monkeypatch, name, module) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImageError, match=f"needs {module.split('.')[0]}; run pip install "):
        compression.unpack(PACK[name](CONTENT), name)


@pytest.mark.parametrize("data", [b"", b"\x1f", b"\x7fELF", b"BZ", bytes(100)])
def test_what_is_not_compressed_is_none(data) -> None:
    assert compression.detect(data) is None


@pytest.mark.parametrize(
    ("name", "command"),
    [("xz", ["xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB"]), ("bzip2", ["bzip2", "-9"]),
     ("lz4", ["lz4", "-l", "-9", "-c"]), ("zstd", ["zstd", "-c", "--ultra", "-22"])],
)  # fmt: skip
def test_what_the_usual_tools_pack_is_unpacked(name, command) -> None:
    """With the options of scripts/Makefile.lib of Linux."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} on this machine")
    content = CONTENT * 20 + os.urandom(1000)
    packed = subprocess.run(command, input=content, capture_output=True, check=True).stdout
    assert compression.detect(packed) == name
    assert compression.unpack(packed, name) == content


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(PACK)),
    st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=6)), min_size=1),
)
def test_damage_anywhere_is_never_more_than_an_image_error(name, damage) -> None:
    packed = bytearray(PACK[name](b"vmexit" * 50))
    for at, patch in damage:
        packed[at : at + len(patch)] = patch
    try:
        assert len(compression.unpack(bytes(packed), name, 1 << 20)) <= 1 << 20
    except ImageError as error:
        assert "; " in str(error) and len(str(error).splitlines()) == 1
