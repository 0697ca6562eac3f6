"""gdb's packets: found in any stream, however it is cut into pieces."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.control.gdb.packet import MOST, PacketReader, Signal, packet, unescape
from vmexit.control.gdb.target import ARCHITECTURES, Target


def read(data: bytes, size: int = 1 << 20) -> list[bytes | Signal]:
    reader = PacketReader()
    found = []
    for start in range(0, len(data), size):
        found += reader.feed(data[start : start + size])
    return found


@given(st.lists(st.binary(max_size=200), max_size=5), st.integers(1, 50))
def test_what_is_sent_is_found(contents, size):
    stream = b"+".join(packet(content) for content in contents)
    assert read(stream, size) == contents


@given(st.binary(max_size=2000), st.integers(1, 100))
def test_junk_is_survived(junk, size):
    reader = PacketReader()
    for start in range(0, len(junk), size):
        list(reader.feed(junk[start : start + size]))
    ended = b"#00#00" + packet(b"qC")
    assert list(reader.feed(ended))[-1] == b"qC"


def test_known_packets():
    assert packet(b"OK") == b"$OK#9a"
    assert packet(b"a#b$c}d*") == b"$a}\x03b}\x04c}]d}\n#" + b"%02x" % (
        sum(b"a}\x03b}\x04c}]d}\n") & 0xFF
    )
    assert unescape(b"a}\x03b}\x04c}]d}\n") == b"a#b$c}d*"
    assert read(b"$g#67\x03-$g#68") == [b"g", Signal.INTERRUPT, Signal.AGAIN, Signal.GARBLED]
    assert read(b"$abc$g#67") == [b"g"]
    assert read(b"$g#zz$g#67") == [Signal.GARBLED, b"g"]


def test_no_more_than_one_packet_is_kept():
    reader = PacketReader()
    assert list(reader.feed(packet(b"x" * MOST))) == [b"x" * MOST]
    assert list(reader.feed(b"$" + b"x" * (MOST + 1) + b"#00")) == [Signal.GARBLED]
    list(reader.feed(b"$"))
    for _ in range(100):
        list(reader.feed(random.Random(1).randbytes(1 << 16).replace(b"#", b"").replace(b"$", b"")))
        assert len(reader._data or b"") <= MOST
    assert list(reader.feed(b"#00" + packet(b"?"))) == [Signal.GARBLED, b"?"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_descriptions_are_well_formed(architecture):
    from xml.etree import ElementTree

    target = Target(architecture)
    tree = ElementTree.fromstring(target.description().replace('SYSTEM "gdb-target.dtd"', ""))
    registers = [r for feature in tree.findall("feature") for r in feature.findall("reg")]
    assert [r.get("name") for r in registers] == [r.name for r in target.registers]
    assert all(int(r.get("bitsize", "0")) % 8 == 0 for r in registers)
