"""Reading traces: both formats, in one pass, whatever somebody has put into them."""

import io
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.core.chrome_trace import ChromeTrace, MemorySlot, TraceInfo
from vmexit.core.trace import JsonTrace, Tee
from vmexit.report.json_stream import JsonStream, TraceError
from vmexit.report.reader import (
    AboutEvent,
    DirtyEvent,
    ExitEvent,
    GuestEvent,
    TraceFile,
)
from vmexit.report.totals import Totals

ABOUT = TraceInfo("9.9", "soft", 2, (MemorySlot(0, 1 << 20, 0x7000, False),), lambda m, a: "dev")


def read(tmp_path, text: str):
    """The events of a file with this content, and the file."""
    path = tmp_path / "trace"
    path.write_text(text, errors="surrogatepass")
    file = TraceFile(str(path))
    return list(file.events()), file


def run(observer) -> None:
    for vcpu in (0, 1):
        observer.left(vcpu)
        observer.enters(vcpu)
        observer.left(vcpu)
        observer.io(vcpu, True, 0x3F8, 1, 1, b"A")
        observer.enters(vcpu)
        observer.left(vcpu)
        observer.mmio(vcpu, False, 0xFEE0_0020, bytes(4))
        observer.enters(vcpu)
        observer.left(vcpu)
        observer.other(vcpu, "hlt", "")


def both() -> tuple[str, str]:
    """The same exits as lines and as a Chrome trace."""
    lines, chrome = io.StringIO(), io.StringIO()
    trace = ChromeTrace(chrome)
    trace.begin(ABOUT)
    run(Tee([JsonTrace(lines), trace]))
    trace.dirty(4096, {0x3000: 2, 0x5000: 1})
    trace.close()
    return lines.getvalue(), chrome.getvalue()


def exits(events) -> list[tuple]:
    return [(e.vcpu, e.reason, e.kind, e.address) for e in events if isinstance(e, ExitEvent)]


EXPECTED = [
    (vcpu, *rest)
    for vcpu in (0, 1)
    for rest in (("io out", "port", 0x3F8), ("mmio read", "mmio", 0xFEE0_0020), ("hlt", "", 0))
]


def test_both_formats_tell_the_same_exits(tmp_path) -> None:
    lines, chrome = both()
    from_lines, file = read(tmp_path, lines)
    assert (exits(from_lines), file.format, file.skipped) == (EXPECTED, "json", 0)
    from_chrome, file = read(tmp_path, chrome)
    assert (sorted(exits(from_chrome)), file.format, file.skipped) == (EXPECTED_SORTED, "chrome", 0)
    assert not file.cut_off


EXPECTED_SORTED = sorted(EXPECTED)


def test_a_chrome_trace_tells_of_times_memory_and_the_machine(tmp_path) -> None:
    events, _ = read(tmp_path, both()[1])
    assert [e for e in events if isinstance(e, AboutEvent)] == [
        AboutEvent("9.9", "soft", (MemorySlot(0, 1 << 20, 0x7000, False),))
    ]
    assert [e for e in events if isinstance(e, DirtyEvent)] == [
        DirtyEvent(1, {}),
        DirtyEvent(4096, {0x3000: 2, 0x5000: 1}),
    ]
    timed = [e for e in events if isinstance(e, ExitEvent) and e.reason != "hlt"]
    assert all(e.host_ns is not None and e.host_ns > 0 and e.device == "dev" for e in timed)
    assert len([e for e in events if isinstance(e, GuestEvent)]) == 6


def test_it_may_be_written_otherwise_and_in_another_order(tmp_path) -> None:
    trace = json.loads(both()[1])
    trace = dict(sorted(trace.items(), reverse=True))
    events, file = read(tmp_path, "\ufeff" + json.dumps(trace, indent=3))
    assert sorted(exits(events)) == EXPECTED_SORTED and file.format == "chrome"
    assert any(isinstance(e, AboutEvent) and e.accelerator == "soft" for e in events)
    events, file = read(tmp_path, json.dumps(trace["traceEvents"]))  # a bare list is one, too
    assert sorted(exits(events)) == EXPECTED_SORTED and not file.cut_off


@pytest.mark.parametrize("number", [0, 1])
def test_a_trace_that_was_cut_off_anywhere_tells_what_is_whole(tmp_path, number) -> None:
    text = both()[number]
    seen = 0
    for end in range(2, len(text)):
        try:
            events, file = read(tmp_path, text[:end])
        except TraceError as error:
            raise AssertionError(text[:end]) from error
        found = len(exits(events))
        assert found >= seen or number == 0
        seen = max(seen, found)
        if number == 1 and end < len(text) - 2:
            assert file.cut_off, text[:end]
    assert seen == len(EXPECTED)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("  \n ", "it is empty"),
        ("\x7fELF\0\0", "no JSON at character 0"),
        ("hello", "no JSON at character 0"),
        ("{]", "no JSON at character 1"),
        ("{1: 2}", "no JSON at character"),
        ('{"t":1}\n}', "no JSON at character 8"),
        ('{"traceEvents":[{"cat":"exit"} {"cat":"exit", "name": "so that it is not the end"}]}',
         "no JSON at character 31"),
        ("[" * 100_000, "no JSON at character 1"),
        ('{"t":' + "9" * 5000 + "}", "no JSON at character"),
        ('["' + "x" * (3 << 20) + '"]', "no JSON at character 1"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_one_line(tmp_path, text, why) -> None:
    with pytest.raises(TraceError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert f"is no trace: {why}" in message and message.count("\n") == 0
    assert message.endswith("; give a file that vmexit run --trace has written")
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(("path", "why"), [("/nowhere", "No such file"), ("/", "directory")])
def test_what_cannot_be_read_is_one_line(path, why) -> None:
    with pytest.raises(TraceError, match=why):
        list(TraceFile(path).events())


ODD = [
    "[1]", "7", "null", '{"t":1,"vcpu":0}', '{"t":-1,"vcpu":0,"exit":"hlt"}',
    '{"t":1e400,"vcpu":0,"exit":"hlt"}', '{"t":NaN,"vcpu":0,"exit":"hlt"}',
    '{"t":1%s,"vcpu":0,"exit":"hlt"}' % ("0" * 400),  # which no float holds
    '{"t":1,"vcpu":99999,"exit":"hlt"}', '{"t":true,"vcpu":0,"exit":"hlt"}',
    '{"t":1,"vcpu":0,"exit":"io","dir":"out"}', '{"t":1,"vcpu":0,"exit":"io","dir":"up","port":1}',
    '{"t":1,"vcpu":0,"exit":"mmio","dir":"read","gpa":36893488147419103232}',
]  # fmt: skip


def test_lines_that_are_no_exits_are_counted_and_left_out(tmp_path) -> None:
    good = '{"t":1,"vcpu":0,"exit":"hlt"}'
    events, file = read(tmp_path, "\n".join([good, *ODD, good]))
    assert len(events) == 2
    assert file.skipped == len(ODD)


def test_stretches_of_impossible_lengths_are_counted_and_left_out(tmp_path) -> None:
    good = {"cat": "guest", "ph": "X", "ts": 1, "dur": 2, "tid": 1}
    odd = [good | {name: value} for name in ("ts", "dur") for value in (-1, 10**400, 1e400)]
    events, file = read(tmp_path, json.dumps([good, *odd, good]))
    assert events == [GuestEvent(1000, 0, 2000)] * 2
    assert file.skipped == len(odd)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(
            ["cat", "ph", "ts", "dur", "tid", "args", "exit", "dir", "port", "gpa", "chunk",
             "pages", "otherData", "slots", "traceEvents", "t", "vcpu", "0x1", "size", "hva"]
        )
        | st.text(max_size=4),
        inner | st.sampled_from(["exit", "guest", "memory", "io", "out", "X"]),
        max_size=6,
    ),
    max_leaves=25,
)  # fmt: skip


@given(st.lists(values, max_size=4), st.booleans())
def test_no_json_can_break_reading_and_adding_up(tmp_path_factory, events, chrome) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    text = json.dumps({"traceEvents": events, "otherData": events[:1]})
    if not chrome:
        text = "\n".join(map(json.dumps, [{}, *events]))
    path.write_text(text)
    file, totals = TraceFile(str(path)), Totals()
    totals.add_all(file.events())


@given(st.lists(values, max_size=5), st.integers(1, 40))
def test_values_are_the_same_however_they_come(events, piece) -> None:
    text = json.dumps(events)
    rest = io.StringIO(text)
    stream = JsonStream(lambda n: rest.read(min(n, piece)))
    assert json.dumps(list(stream.elements())) == text
    assert not stream.cut_off and not stream.peek()


def test_a_long_trace_takes_no_more_memory_than_a_short_one(tmp_path) -> None:
    path = tmp_path / "long"
    with open(path, "w") as file:
        trace = ChromeTrace(file)
        trace.begin(ABOUT)
        trace.left(0)
        trace.enters(0)
        for number in range(10_000):
            trace.left(0)
            trace.io(0, True, number & 0xFF, 1, 1, b"A")
            trace.enters(0)
        trace.close()
    assert path.stat().st_size > 2 << 20
    totals = Totals()
    tracemalloc.start()
    totals.add_all(TraceFile(str(path)).events())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert totals.exits == 10_000
    assert most < 1 << 20
