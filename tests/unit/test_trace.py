"""What observers write about exits can be read back: JSON by a parser, text and table by eye."""

import io
import json
import sys
import threading

from hypothesis import given
from hypothesis import strategies as st

from vmexit.core.exit_stats import ExitStats
from vmexit.core.trace import ExitObserver, JsonTrace, Tee, TextLog

io_exits = st.tuples(
    st.just("io"), st.integers(0, 255), st.booleans(), st.integers(0, 0xFFFF),
    st.sampled_from([1, 2, 4]), st.integers(1, 4),
    st.binary(min_size=1, max_size=16),
)  # fmt: skip
mmio_exits = st.tuples(
    st.just("mmio"), st.integers(0, 255), st.booleans(), st.integers(0, (1 << 64) - 1),
    st.binary(min_size=1, max_size=8),
)  # fmt: skip
other_exits = st.tuples(
    st.just("other"), st.integers(0, 255), st.sampled_from(["hlt", "shutdown", "intr"]), st.text()
)
exits = st.lists(st.one_of(io_exits, mmio_exits, other_exits), max_size=20)


def tell(observer: ExitObserver, sequence: list[tuple]) -> None:
    for kind, *what in sequence:
        getattr(observer, kind)(*what)


def expected(kind: str, vcpu: int, *rest) -> dict[str, object]:
    """The object that ARCHITECTURE.md promises for an exit, but for its time."""
    if kind == "io":
        write, port, size, count, data = rest
        return {
            "vcpu": vcpu, "exit": "io", "dir": "out" if write else "in", "port": port,
            "size": size, "count": count, "data": data.hex(),
        }  # fmt: skip
    if kind == "mmio":
        write, gpa, data = rest
        return {
            "vcpu": vcpu, "exit": "mmio", "dir": "write" if write else "read", "gpa": gpa,
            "size": len(data), "data": data.hex(),
        }  # fmt: skip
    return {"vcpu": vcpu, "exit": rest[0]}


@given(exits)
def test_the_json_trace_parses_to_the_exits_it_was_told_in_order_of_time(sequence) -> None:
    stream = io.StringIO()
    tell(JsonTrace(stream), sequence)
    objects = [json.loads(line) for line in stream.getvalue().splitlines()]
    times = [o.pop("t") for o in objects]
    assert objects == [expected(*exit) for exit in sequence]
    assert times == sorted(times) and all(t >= 0 for t in times)


def test_the_json_trace_writes_whole_lines_even_from_several_threads() -> None:
    stream = io.StringIO()
    trace = JsonTrace(stream)

    def vcpu(index: int) -> None:
        for port in range(500):
            trace.io(index, True, port, 1, 1, b"\0")

    threads = [threading.Thread(target=vcpu, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    objects = [json.loads(line) for line in stream.getvalue().splitlines()]
    for index in range(4):
        assert [o["port"] for o in objects if o["vcpu"] == index] == list(range(500))


def test_the_text_log_has_one_line_an_exit_with_all_that_is_known() -> None:
    stream = io.StringIO()
    log = TextLog(stream)
    log.io(0, True, 0x10, 1, 1, b"\xab")
    log.io(1, False, 0x3F8, 2, 3, bytes(range(6)))
    log.mmio(0, True, 0xFEE00000, b"\1\2\3\4")
    log.mmio(2, False, 0x1_0000_0000, b"\xff")
    log.other(0, "hlt", "")
    log.other(0, "fail_entry", "hardware reason 0x80000021")
    assert stream.getvalue().splitlines() == [
        "vcpu 0: io out port 0x0010 size 1 data ab",
        "vcpu 1: io in  port 0x03f8 size 2 x3 data 000102030405",
        "vcpu 0: mmio write gpa 0xfee00000 size 4 data 01020304",
        "vcpu 2: mmio read  gpa 0x100000000 size 1 data ff",
        "vcpu 0: hlt",
        "vcpu 0: fail_entry: hardware reason 0x80000021",
    ]


@given(exits)
def test_the_stats_count_every_exit_once_and_each_apart_by_reason_address_and_size(seq) -> None:
    stats = ExitStats()
    tell(stats, seq)
    assert stats.total == len(seq)
    kinds = {
        (k, w[1], w[2], w[3]) if k == "io" else (k, w[1], w[2], len(w[3])) if k == "mmio" else w[1]
        for k, *w in seq
    }
    assert len(stats.counts) == len(kinds)


def test_the_table_has_the_most_frequent_first_and_sums_up_the_rest() -> None:
    stats = ExitStats()
    for port, times in ((0x10, 6), (0x20, 9), (0x30, 3), (0x40, 2)):
        for _ in range(times):
            stats.io(0, True, port, 1, 1, b"\0")
    rows = [line.split() for line in stats.table(rows=2).splitlines()]
    assert rows == [
        ["exit", "address/size", "count", "share", "host", "ms", "median", "µs"],
        ["io", "out", "0x0020/1", "9", "45.0%", "-", "-"],
        ["io", "out", "0x0010/1", "6", "30.0%", "-", "-"],
        ["others", "5", "25.0%", "-"],
        ["total", "20", "100.0%", "-"],
    ]


def test_the_table_of_no_exits_says_zero() -> None:
    assert ExitStats().table().splitlines()[-1].split() == ["total", "0", "-", "-"]


def test_a_table_that_shows_everything_has_no_row_of_others() -> None:
    stats = ExitStats()
    stats.other(0, "hlt", "ignored")
    assert [line.split()[0] for line in stats.table(rows=1).splitlines()] == [
        "exit",
        "hlt",
        "total",
    ]


def test_a_guest_that_touches_every_address_does_not_make_the_stats_grow_without_bound() -> None:
    stats = ExitStats()
    accesses = 3 * ExitStats.MAX_ADDRESSES
    for i in range(accesses):
        stats.mmio(0, True, i * 4096, b"\0")
        stats.io(0, False, i & 0xFFFF, 1, 1, b"\0")
    stats.mmio(0, True, 0, b"\0")  # one of the first is still counted by its address
    assert len(stats.counts) <= ExitStats.MAX_ADDRESSES + 2
    assert stats.total == 2 * accesses + 1
    assert stats.counts["mmio write", "0x0/1"] == 2


def test_the_stats_lose_no_exit_when_several_vcpus_count_at_once() -> None:
    """ExitObserver: "several vCPU threads may call at once"."""
    accesses, rounds = 4000, [ExitStats() for _ in range(6)]
    gate = threading.Barrier(4)

    def vcpu() -> None:
        for stats in rounds:
            gate.wait()
            for gpa in range(accesses):
                stats.mmio(0, True, gpa, b"\0")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=vcpu) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert [stats.total for stats in rounds] == [4 * accesses] * len(rounds)


@given(exits)
def test_a_tee_tells_all_of_its_observers_everything(sequence) -> None:
    streams = [io.StringIO() for _ in range(3)]
    tell(Tee(TextLog(s) for s in streams), sequence)
    alone = io.StringIO()
    tell(TextLog(alone), sequence)
    assert [s.getvalue() for s in streams] == [alone.getvalue()] * 3
