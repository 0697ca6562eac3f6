"""Overlays: what a guest writes beside the image, kept through kills, or forgotten."""

import hashlib
import os
import random
import struct
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import Driver

from vmexit.abi import virtio as v
from vmexit.backends.block_map import BlockMap
from vmexit.backends.disk import Disk
from vmexit.backends.overlay import Format, Overlay
from vmexit.core.errors import ConfigError
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.blk import Blk

SECTOR, BLOCK = 512, 4096
SECTORS = 203  # the last block is not a whole one
SIZE = SECTORS * SECTOR
BASE = random.Random(1).randbytes(SIZE)


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base"
    path.write_bytes(BASE)
    return path


@contextmanager
def opened(base: Path, overlay: Path | str):
    disk = Disk(str(base), readonly=True)
    try:
        over = Overlay(disk, str(overlay))
        try:
            yield over
        finally:
            over.close()
    finally:
        disk.close()


def content(over: Overlay) -> bytes:
    data = bytearray(over.size)
    over.read_into([memoryview(data)], 0)
    return bytes(data)


def views(data: bytearray, cuts: list[int]) -> list[memoryview]:
    """`data` in parts that end at `cuts`."""
    ends = sorted({c % len(data) for c in cuts} | {0, len(data)})
    return [memoryview(data)[a:b] for a, b in pairwise(ends)]


REGIONS = st.integers(0, SECTORS - 1).flatmap(
    lambda first: st.tuples(st.just(first), st.integers(1, min(60, SECTORS - first)))
)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(("read", "write", "zero", "unmap", "discard", "flush", "reopen")),
        REGIONS,
        st.integers(0, 255),
        st.lists(st.integers(0, 1 << 16), max_size=4),
    ),
    max_size=30,
)


@given(OPERATIONS, st.booleans())
@settings(deadline=None, max_examples=60)
def test_it_is_a_disk_like_any_other(operations, kept):
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        base.write_bytes(BASE)
        disk = Disk(str(base), readonly=True)
        path = str(Path(folder, "overlay")) if kept else ""
        over, model = Overlay(disk, path), bytearray(BASE)
        for kind, (first, count), byte, cuts in operations:
            start, size = first * SECTOR, count * SECTOR
            end = start + size
            if kind == "read":
                data = bytearray(size)
                over.read_into(views(data, cuts), start)
                assert data == model[start:end]
            elif kind == "write":
                data = bytearray(random.Random(byte).randbytes(size))
                over.write_from(views(data, cuts), start)
                model[start:end] = data
            elif kind in ("zero", "unmap"):
                over.write_zeroes(start, size, unmap=kind == "unmap")
                model[start:end] = bytes(size)
            elif kind == "discard":
                over.discard(start, size)
                whole = -(-start // BLOCK) * BLOCK
                stop = end if end == SIZE else end // BLOCK * BLOCK
                model[whole:stop] = bytes(max(stop - whole, 0))
            elif kind == "flush":
                over.flush()
            elif kept:
                over.close()
                over = Overlay(disk, path)
        assert content(over) == model
        over.close()
        disk.close()
        assert base.read_bytes() == BASE


@given(
    st.integers(1, 20_000).flatmap(
        lambda n: st.tuples(
            st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(1, n)), max_size=6)
        )
    )
)
@settings(deadline=None, max_examples=60)
def test_the_map_is_a_set_of_blocks(case):
    blocks, ranges = case
    blocks_there, model = BlockMap(blocks), bytearray(blocks)
    saved = bytearray(blocks_there.all())
    for first, end in ranges:
        end = max(end, first + 1)
        blocks_there.add(first, end)
        model[first:end] = b"\1" * (end - first)
    found = list(blocks_there.runs(0, blocks))
    assert b"".join(bytes([there]) * (stop - at) for there, at, stop in found) == model
    assert all(a[0] != b[0] for a, b in pairwise(found))
    for offset, sector in blocks_there.unsaved():
        saved[offset : offset + 512] = sector
    blocks_there.saved()
    assert not list(blocks_there.unsaved())
    again = BlockMap(blocks)
    assert again.load(bytes(saved)) and list(again.runs(0, blocks)) == found


# kill -9: the child says before each operation that it begins, and after a flush that it is done.
CHILD = """
import random, sys
sys.path.insert(0, sys.argv[4])
from test_virtio_overlay import plan
from vmexit.backends.disk import Disk
from vmexit.backends.overlay import Overlay
over = Overlay(Disk(sys.argv[1], readonly=True), sys.argv[2])
for number, kind, first, data in plan(int(sys.argv[3])):
    print("begin", number, flush=True)
    if kind == "flush":
        over.flush()
        print("done", number, flush=True)
    elif kind == "write":
        over.write_from([memoryview(data)], first * 512)
    else:
        over.write_zeroes(first * 512, len(data), unmap=kind == "unmap")
"""


def plan(seed: int):
    """Operations without end: number, kind, sector, what is there afterwards."""
    source, number = random.Random(seed), 0
    while True:
        kind = source.choice(("write", "write", "write", "zero", "unmap", "flush"))
        first = source.randrange(SECTORS)
        size = source.randint(1, min(40, SECTORS - first)) * SECTOR
        data = source.randbytes(size) if kind == "write" else bytes(size)
        yield number, kind, first, data
        number += 1


def test_what_is_flushed_survives_kills(base, tmp_path):
    """Each sector has what it had when the last flush was answered, or what came later."""
    overlay = tmp_path / "overlay"
    # What each may have, the newest at the end.
    sectors = [[BASE[i * SECTOR : (i + 1) * SECTOR]] for i in range(SECTORS)]
    acknowledged, source = 0, random.Random(7)
    for seed in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, base, overlay, str(seed), Path(__file__).parent],
            stdout=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(source.randrange(150))]
            child.kill()
            lines += child.stdout.readlines()
        whole = [line.split() for line in lines if line.endswith(b"\n")]
        begun = max((int(n) for what, n in whole if what == b"begin"), default=-1)
        done = {int(n) for what, n in whole if what == b"done"}
        acknowledged += len(done)
        for number, kind, first, data in plan(seed):
            if number > begun:
                break
            if number in done:
                sectors = [allowed[-1:] for allowed in sectors]
            elif kind != "flush":
                for i in range(len(data) // SECTOR):
                    sectors[first + i].append(data[i * SECTOR : (i + 1) * SECTOR])
        if not overlay.exists():
            continue
        with opened(base, overlay) as over:
            found = content(over)
        for i, allowed in enumerate(sectors):
            now = found[i * SECTOR : (i + 1) * SECTOR]
            assert now in allowed, (seed, i)
            sectors[i] = [now]
    assert acknowledged > 50
    assert base.read_bytes() == BASE


def test_a_bit_is_set_only_after_a_flush(base, tmp_path):
    """So the place of a block in the file may have anything until then."""
    overlay = tmp_path / "overlay"
    with opened(base, overlay) as over:
        over.write_from([memoryview(b"x" * BLOCK)], 0)
        over.flush()
        over.write_from([memoryview(b"y" * BLOCK)], BLOCK)
        copy = tmp_path / "copy"  # as a kill would leave it
        copy.write_bytes(overlay.read_bytes())
    with opened(base, copy) as over:
        assert content(over)[: 3 * BLOCK] == b"x" * BLOCK + BASE[BLOCK : 3 * BLOCK]
        over.write_from([memoryview(b"z" * SECTOR)], BLOCK + SECTOR)
        expected = BASE[BLOCK : BLOCK + SECTOR] + b"z" * SECTOR
        assert content(over)[BLOCK : BLOCK + 2 * SECTOR] == expected


def test_an_overlay_is_sparse_and_a_discard_frees_its_room(tmp_path):
    base, overlay = tmp_path / "big", tmp_path / "overlay"
    size, data = 1 << 40, random.Random(2).randbytes(8 << 20)
    with base.open("wb") as file:
        file.truncate(size)
    places = (0, (1 << 35) - (1 << 20), size - len(data))  # in several sectors of the map

    def read(over: Overlay, at: int) -> bytes:
        over.read_into([memoryview(found := bytearray(len(data)))], at)
        return bytes(found)

    with opened(base, overlay) as over:
        empty = os.stat(overlay).st_blocks * 512
        assert empty < 34 << 20  # the map
        for at in places:
            over.write_from([memoryview(data)], at)
        over.flush()
        full = os.stat(overlay).st_blocks * 512
        assert full >= empty + 3 * len(data)
    with opened(base, overlay) as over:
        assert all(read(over, at) == data for at in places)
        assert read(over, 1 << 34) == bytes(len(data))
        for at in places:
            over.discard(at, len(data))
        over.flush()
        assert os.stat(overlay).st_blocks * 512 <= full - 3 * len(data) + (1 << 16)
    with opened(base, overlay) as over:
        assert all(read(over, at) == bytes(len(data)) for at in places)


def test_a_large_disk_has_larger_blocks():
    class Huge:
        size = 100 << 40

        def read_into(self, views, offset):
            assert offset + sum(map(len, views)) <= self.size

    found = Format.of(Huge())
    assert found.block_size == 1 << 19 and found.blocks <= 1 << 28
    assert Format.parse(found.pack(), "x") == found


def change(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda p: p.write_bytes(b""), "is no overlay of vmexit; use another path"),
        (lambda p: p.write_bytes(BASE), "is no overlay of vmexit; use another path"),
        (lambda p: os.truncate(p, 100), "is damaged: its header .*; use a copy"),
        (lambda p: os.truncate(p, 5000), "is damaged: its length .*; use a copy"),
        (lambda p: os.truncate(p, p.stat().st_size - 512), "is damaged: its length"),
        (lambda p: os.truncate(p, p.stat().st_size + 512), "is damaged: its length"),
        (lambda p: change(p, 8, struct.pack("<I", 2)), "has version 2, .*; use a newer vmexit"),
        (lambda p: change(p, 12, struct.pack("<I", 512)), "is damaged: its header"),
        (lambda p: change(p, 30, b"?"), "is damaged: its header"),
        (lambda p: change(p, 500, b"?"), "is damaged: its header"),
        (lambda p: change(p, 4096, b"\xff"), "is damaged: its map"),
        (lambda p: change(p, 4096, bytes(512)), "is damaged: its map"),
        (lambda p: (p.unlink(), p.mkdir()), "Is a directory; use another path"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "is no file; use another path"),
        (lambda p: (p.unlink(), p.symlink_to("none/there")), "; use another path"),
    ],
)
def test_what_is_no_overlay_is_refused_and_stays_as_it_is(base, tmp_path, how, message):
    overlay = tmp_path / "overlay"
    with opened(base, overlay) as over:
        over.write_from([memoryview(b"x" * BLOCK)], 0)
    how(overlay)
    before = overlay.read_bytes() if overlay.is_file() else None
    with pytest.raises(ConfigError, match=message), opened(base, overlay):
        pass
    assert before == (overlay.read_bytes() if overlay.is_file() else None)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_each_byte_of_header_and_map_counts(base, tmp_path):
    overlay = tmp_path / "overlay"
    with opened(base, overlay):
        pass
    good = overlay.read_bytes()
    for at in (*range(0, 512, 7), *range(4096, 4096 + 512, 7)):
        change(overlay, at, bytes([good[at] ^ 0x10]))
        with pytest.raises(ConfigError), opened(base, overlay):
            pass
        change(overlay, at, good[at : at + 1])
    with opened(base, overlay) as over:
        assert content(over) == BASE


def test_an_overlay_belongs_to_one_image(base, tmp_path):
    overlay, other = tmp_path / "overlay", tmp_path / "other"
    with opened(base, overlay):
        pass
    for data in (BASE[:-SECTOR], BASE + bytes(SECTOR), BASE[:700] + b"?" + BASE[701:]):
        other.write_bytes(data)
        with pytest.raises(ConfigError, match=r"made for another disk, .*; use the image as it"):  # noqa: SIM117
            with opened(other, overlay):
                pass
    moved = base.rename(tmp_path / "moved")
    with opened(moved, overlay) as over:
        assert content(over) == BASE


def test_an_overlay_has_one_user_and_its_image_any_number(base, tmp_path):
    overlay = tmp_path / "overlay"
    with opened(base, overlay), opened(base, tmp_path / "another"), opened(base, ""):
        with pytest.raises(ConfigError, match="in use"), opened(base, overlay):
            pass
        with pytest.raises(ConfigError, match="in use"):
            Disk(str(base))
    with pytest.raises(ConfigError, match=r"No such file or directory; use another path"):  # noqa: SIM117
        with opened(base, tmp_path / "none" / "overlay"):
            pass
    with pytest.raises(ConfigError, match="use another path"), opened(base, "a\0b"):
        pass


def test_a_snapshot_leaves_nothing(base, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with opened(base, "") as over:
        over.write_from([memoryview(b"x" * SIZE)], 0)
        over.flush()
        assert content(over) == b"x" * SIZE and not list(folder.iterdir())
    assert base.read_bytes() == BASE
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"temporary file .*; set TMPDIR"), opened(base, ""):
        pass


def test_the_device_on_an_overlay(base, tmp_path):
    memory = GuestMemory([(0, 1 << 20)])
    with opened(base, tmp_path / "overlay") as over:
        driver = Driver(Blk(over), memory)
        driver.start()
        for kind, sector, parts in (
            (v.BLK_T_OUT, 9, ([(0x8_1000, 512)], [])),
            (v.BLK_T_FLUSH, 0, ([], [])),
            (v.BLK_T_IN, 8, ([], [(0x9_0000, 1536)])),
        ):
            memory.write(0x8_0000, struct.pack("<IIQ", kind, 0, sector))
            memory.write(0x8_1000, b"w" * 512)
            ring, (out, into) = driver.rings[0], parts
            ring.offer(ring.chain([(0x8_0000, 16), *out], [*into, (0x8_F000, 1)]))
            driver.kick()
            assert ring.done() and memory.read_u8(0x8_F000) == v.BLK_S_OK
        read = memory.read(0x9_0000, 1536)
    assert read == BASE[8 * 512 : 9 * 512] + b"w" * 512 + BASE[10 * 512 : 11 * 512]
    assert hashlib.sha256(base.read_bytes()).digest() == hashlib.sha256(BASE).digest()
    memory.close()


def test_an_overlay_is_no_disk_by_itself(tmp_path):
    (tmp_path / "o").write_bytes(b"VMEXITOV".ljust(1024, b"\0"))
    with pytest.raises(ConfigError, match=r"is an overlay of vmexit; use it with its image: file="):
        Disk(str(tmp_path / "o"))


def test_what_was_written_goes_on_over_another_overlay(base):
    """A snapshot of the disk: later writes are not in it, and it can be gone back to."""
    with opened(base, "") as one, opened(base, "") as other:
        one.write_from([memoryview(b"x" * 5000)], 3000)
        one.discard(SIZE // 2 // 4096 * 4096, 8192)
        expected = content(one)
        image = one.capture()
        one.write_from([memoryview(b"later")], 100_000 % SIZE)
        other.write_from([memoryview(b"other")], 0)
        for disk in (other, one, one):
            disk.restore(image)
            assert content(disk) == expected
            disk.write_from([memoryview(b"again")], 4096)
        image.close()


def test_what_was_written_belongs_to_one_image(base, tmp_path):
    changed = tmp_path / "changed"
    changed.write_bytes(b"#" + BASE[1:])
    with opened(base, "") as one, opened(changed, "") as other:
        other.write_from([memoryview(b"mine")], 0)
        before = content(other)
        image = one.capture()
        with pytest.raises(ConfigError, match="another disk, or the disk's image has changed"):
            other.restore(image)
        with pytest.raises(ConfigError, match="another disk"):
            one.restore(image._replace(blocks=image.blocks[:-1] + b"x"))
        assert content(other) == before
        image.close()
