"""Output that is gathered: what waits, how long, and whom a slow reader holds up."""

import threading

import pytest
from fakes import ManualClock

from vmexit.backends.gather import Gathered
from vmexit.core.errors import HostError

MS = 1_000_000


class Sink:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.room = True
        self.gate: threading.Event | None = None

    def write(self, data: bytes) -> None:
        if self.gate is not None:
            assert self.gate.wait(30)
        self.parts.append(data)

    def has_room(self) -> bool:
        return self.room


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def sink():
    return Sink()


@pytest.fixture
def gathered(sink, clock):
    return Gathered(sink, clock)


def type_(gathered, text: bytes) -> None:
    for byte in text:
        gathered.write(bytes((byte,)))


def test_a_line_is_written_at_once_and_whole(gathered, sink):
    type_(gathered, b"one\ntwo\nthr")
    assert sink.parts == [b"one\n", b"two\n"]


def test_what_is_no_line_is_written_soon(gathered, sink, clock):
    type_(gathered, b"login: ")
    assert sink.parts == []
    clock.advance(5 * MS)
    assert sink.parts == [b"login: "]
    clock.advance(1000 * MS)
    type_(gathered, b"more")
    clock.advance(5 * MS)
    assert sink.parts == [b"login: ", b"more"]


def test_without_lines_nothing_grows(gathered, sink):
    type_(gathered, b"x" * 2000)
    assert [len(part) for part in sink.parts] == [512] * 3


def test_a_flush_leaves_nothing_behind(gathered, sink):
    type_(gathered, b"bye")
    gathered.flush()
    gathered.flush()
    assert sink.parts == [b"bye"]


def test_the_clock_does_not_wait_for_a_slow_reader(gathered, sink, clock):
    sink.room = False
    type_(gathered, b"slow")
    clock.advance(100 * MS)
    assert sink.parts == []
    sink.room = True
    clock.advance(20 * MS)
    assert sink.parts == [b"slow"]


def test_the_clock_does_not_wait_for_one_who_writes(gathered, sink, clock):
    type_(gathered, b"a")
    sink.gate = threading.Event()
    writer = threading.Thread(target=gathered.write, args=(b"b\n",))
    writer.start()
    while not gathered._lock.locked():
        pass
    clock.advance(100 * MS)  # and comes back
    sink.gate.set()
    writer.join()
    assert sink.parts == [b"ab\n"]
    type_(gathered, b"c")
    clock.advance(5 * MS)
    assert sink.parts == [b"ab\n", b"c"]


def test_a_failure_is_told_to_who_writes_and_to_the_clock(gathered, sink, clock, monkeypatch):
    def fail(data: bytes) -> None:
        raise HostError("the reader is gone; take another")

    monkeypatch.setattr(sink, "write", fail)
    with pytest.raises(HostError, match="reader is gone"):
        gathered.write(b"x\n")
    gathered.write(b"x")
    with pytest.raises(HostError, match="reader is gone"):
        clock.advance(5 * MS)


def test_two_threads_lose_and_mix_nothing(gathered, sink):
    def write(letter: bytes) -> None:
        for _ in range(20_000):
            gathered.write(letter)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gathered.flush()
    text = b"".join(sink.parts)
    assert (text.count(b"a"), text.count(b"b")) == (20_000, 20_000)
