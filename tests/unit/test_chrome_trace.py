"""The trace for Perfetto: valid JSON at every end, spans that do not overlap, names as they are."""

import io
import json
import os
import sys
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.core.chrome_trace import ChromeTrace, MemorySlot, TraceInfo

SLOT = MemorySlot(0, 1 << 20, 0x7F00_0000_0000, False)


def info(names: dict[int, str] | None = None, vcpus: int = 1) -> TraceInfo:
    known = names or {}
    return TraceInfo("1.2", "soft", vcpus, (SLOT,), lambda mmio, address: known.get(address, ""))


class Traced:
    """A trace whose clock is `now`, in nanoseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, about: TraceInfo) -> None:
        self.now = 0
        monkeypatch.setattr("time.perf_counter_ns", lambda: self.now)
        self.stream = io.StringIO()
        self.trace = ChromeTrace(self.stream)
        self.trace.begin(about)

    def start(self, vcpu: int) -> None:
        self.trace.left(vcpu)
        self.trace.enters(vcpu)

    def out(self, vcpu: int, begin: int, end: int, port: int = 0x3F8) -> None:
        self.now = begin
        self.trace.left(vcpu)
        self.trace.io(vcpu, True, port, 1, 1, b"A")
        self.now = end
        self.trace.enters(vcpu)

    def events(self, **wanted: object) -> list[dict]:
        self.trace.close()
        events = json.loads(self.stream.getvalue())["traceEvents"]
        return [e for e in events if all(e.get(k) == v for k, v in wanted.items())]


def test_exits_and_stretches_of_the_guest_follow_each_other_on_the_track_of_their_vcpu(
    monkeypatch,
) -> None:
    t = Traced(monkeypatch, info({0x3F8: "UART"}))
    t.start(0)
    t.out(0, 1_500, 4_000)
    t.out(0, 10_000, 11_000)
    spans = t.events(ph="X", tid=1)
    assert [(e["cat"], e["ts"], e["dur"]) for e in spans] == [
        ("guest", 0, 1.5),
        ("exit", 1.5, 2.5),
        ("guest", 4, 6),
        ("exit", 10, 1),
    ]
    assert spans[1]["name"] == "out 0x3f8"
    assert spans[1]["args"] == {
        "exit": "io", "dir": "out", "port": 0x3F8, "size": 1, "count": 1, "data": "41",
        "device": "UART",
    }  # fmt: skip


def test_a_device_has_a_track_of_its_name_on_which_spans_do_not_overlap(monkeypatch) -> None:
    t = Traced(monkeypatch, info({0x3F8: "UART", 0x40: "PIT"}, vcpus=2))
    t.start(0)
    t.start(1)
    t.now = 1_000
    t.trace.left(0)
    t.trace.io(0, False, 0x3F8, 1, 1, b"A")
    t.out(1, 2_000, 4_000)
    t.now = 5_000
    t.trace.enters(0)
    t.out(0, 6_000, 7_000, port=0x40)
    t.out(0, 8_000, 9_000, port=0x99)  # nobody there
    names = {e["tid"]: e["args"]["name"] for e in t.events(name="thread_name")}
    tracks: dict[str, list] = {}
    for event in t.events(cat="device"):
        tracks.setdefault(names[event["tid"]], []).append((event["ts"], event["dur"]))
    assert tracks == {"UART": [(2, 2), (4, 1)], "PIT": [(6, 1)]}
    assert [names[1], names[2]] == ["vCPU 0", "vCPU 1"]


def test_spans_of_a_device_do_not_overlap_when_vcpus_are_in_it_at_once() -> None:
    class Interrupted(dict):
        """Another thread runs between looking a value up and setting it."""

        def get(self, *arguments):
            found = super().get(*arguments)
            os.sched_yield()
            return found

    stream, vcpus = io.StringIO(), 3
    trace = ChromeTrace(stream)
    trace._busy_until = Interrupted()
    trace.begin(info({0x3F8: "UART"}, vcpus))
    gate = threading.Barrier(vcpus)

    def vcpu(index: int) -> None:
        trace.left(index)
        trace.enters(index)
        gate.wait()
        for _ in range(300):
            trace.left(index)
            trace.io(index, False, 0x3F8, 1, 1, b"A")
            trace.enters(index)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=vcpu, args=(i,)) for i in range(vcpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    trace.close()
    events = json.loads(stream.getvalue())["traceEvents"]
    assert sum(e.get("cat") == "exit" for e in events) == 900
    spans = sorted((e["ts"], e["dur"]) for e in events if e.get("cat") == "device")
    assert all(a + b <= c + 1e-4 for (a, b), (c, _) in pairwise(spans))


def test_it_tells_what_the_machine_is(monkeypatch) -> None:
    t = Traced(monkeypatch, info())
    t.trace.close()
    assert json.loads(t.stream.getvalue())["otherData"] == {
        "version": "1.2",
        "accelerator": "soft",
        "vcpus": 1,
        "slots": [{"gpa": 0, "size": 1 << 20, "hva": 0x7F00_0000_0000, "readonly": False}],
    }


def test_an_exit_that_ends_the_run_has_no_duration(monkeypatch) -> None:
    t = Traced(monkeypatch, info())
    t.start(0)
    t.now = 2_000
    t.trace.left(0)
    t.trace.other(0, "hlt", 'said "so"')
    t.now = 90_000
    t.start(0)
    t.now = 95_000
    t.trace.left(0)
    assert [(e["ph"], e["ts"], e.get("dur")) for e in t.events(tid=1) if e["ph"] in "Xi"] == [
        ("X", 0, 2),
        ("i", 2, None),
        ("X", 90, 5),
    ]
    assert t.events(ph="i")[0]["args"] == {"exit": "hlt", "detail": 'said "so"'}


def test_dirty_memory_is_a_counter_and_its_chunks_in_pieces(monkeypatch) -> None:
    t = Traced(monkeypatch, info())
    t.trace.dirty(4096, {n * 4096: 1 for n in range(2500)})
    assert [e["args"] for e in t.events(ph="C")] == [{"pages": 2500}]
    pieces = [e["args"] for e in t.events(name="dirty")]
    assert [len(piece["pages"]) for piece in pieces] == [1024, 1024, 452]
    assert {piece["chunk"] for piece in pieces} == {4096}
    assert pieces[0]["pages"]["0x1000"] == 1


def test_a_trace_that_never_began_writes_nothing() -> None:
    stream = io.StringIO()
    ChromeTrace(stream).close()
    assert stream.getvalue() == ""


def test_a_trace_that_was_killed_lacks_only_its_end(monkeypatch) -> None:
    t = Traced(monkeypatch, info())
    t.start(0)
    t.out(0, 1_000, 2_000)
    assert len(json.loads(t.stream.getvalue() + "]}")["traceEvents"]) == 5


@given(st.text(), st.text())
def test_names_and_details_may_be_anything(name: str, detail: str) -> None:
    stream = io.StringIO()
    trace = ChromeTrace(stream)
    trace.begin(info({1: name}))
    trace.left(0)
    trace.enters(0)
    trace.left(0)
    trace.io(0, False, 1, 1, 1, b"\0")
    trace.enters(0)
    trace.left(0)
    trace.other(0, "shutdown", detail)
    trace.close()
    events = json.loads(stream.getvalue())["traceEvents"]
    exits = [e["args"] for e in events if e.get("cat") == "exit"]
    assert exits[0].get("device", "") == name
    assert exits[1].get("detail", "") == detail


def test_names_of_a_guest_that_touches_every_address_do_not_grow_without_bound(monkeypatch) -> None:
    t = Traced(monkeypatch, info())
    t.start(0)
    for gpa in range(10_000):
        t.trace.left(0)
        t.trace.mmio(0, False, gpa, b"\0")
        t.trace.enters(0)
    assert len(t.trace._names) <= 4096
    assert len(t.events(cat="exit")) == 10_000
