"""Where the time goes, by a clock that stands still until it is told to go on."""

import statistics
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.core.exit_stats import ExitStats, VcpuTime
from vmexit.core.histogram import BUCKETS, bucket_of, median, middle_of


class Clocked:
    """Stats whose clock is `now`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 5_000
        monkeypatch.setattr("time.perf_counter_ns", lambda: self.now)
        self.stats = ExitStats()

    def exit(self, vcpu: int, guest: int, host: int, port: int = 0x10) -> None:
        """The guest executes for so long and leaves, and its OUT takes so long."""
        self.now += guest
        self.stats.left(vcpu)
        self.stats.io(vcpu, True, port, 1, 1, b"\0")
        self.now += host
        self.stats.enters(vcpu)

    def begin(self, vcpu: int) -> None:
        self.stats.left(vcpu)
        self.stats.enters(vcpu)


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    return Clocked(monkeypatch)


def test_time_is_that_of_the_guest_or_of_an_exit(clocked: Clocked) -> None:
    clocked.begin(0)
    clocked.exit(0, 100, 7)
    clocked.exit(0, 200, 9, port=0x20)
    clocked.now += 50
    now = clocked.stats.snapshot()
    assert now.vcpus == (VcpuTime(0, 350, 16, 0),)
    assert [(r.reason, r.address, r.size, r.exits, r.timed, r.host_ns) for r in now.rows] == [
        ("io out", 0x10, 1, 1, 1, 7),
        ("io out", 0x20, 1, 1, 1, 9),
    ]


def test_what_is_neither_guest_nor_exit_is_elsewhere(clocked: Clocked) -> None:
    clocked.begin(1)
    clocked.now += 100
    clocked.stats.left(1)  # the run ends
    clocked.now += 1_000_000
    clocked.begin(1)
    clocked.exit(1, 10, 5)
    clocked.stats.left(1)
    clocked.now += 77  # not counted as long as nobody knows what it is
    assert clocked.stats.snapshot().vcpus == (VcpuTime(1, 110, 5, 1_000_000),)


def test_an_exit_that_ends_the_run_is_counted_and_not_timed(clocked: Clocked) -> None:
    clocked.begin(0)
    clocked.stats.left(0)
    clocked.stats.other(0, "hlt", "")
    clocked.now += 1_000_000
    clocked.begin(0)
    clocked.exit(0, 10, 5)
    rows = {row.reason: row for row in clocked.stats.snapshot().rows}
    assert (rows["hlt"].exits, rows["hlt"].timed, rows["hlt"].host_ns) == (1, 0, 0)
    assert rows["io out"].host_ns == 5


def test_an_entry_without_an_exit_adds_to_no_row(clocked: Clocked) -> None:
    """A kick that came too late, or a signal: KVM_RUN comes back with nothing to do."""
    clocked.begin(0)
    clocked.exit(0, 10, 5)
    clocked.now += 10
    clocked.stats.left(0)
    clocked.now += 3
    clocked.stats.enters(0)
    now = clocked.stats.snapshot()
    assert [(row.exits, row.timed, row.host_ns) for row in now.rows] == [(1, 1, 5)]
    assert now.vcpus == (VcpuTime(0, 20, 8, 0),)


def test_the_vcpus_are_told_apart_and_shown_below_the_table(clocked: Clocked) -> None:
    clocked.begin(0)
    clocked.begin(1)
    clocked.exit(0, 1_000_000, 500_000)
    clocked.exit(1, 2_000_000, 3_000_000)
    table = clocked.stats.table()
    assert table.splitlines()[1].split()[3:] == ["2", "100.0%", "3.5", "491.5"]
    head, first, second = table.partition("\n\n")[2].splitlines()
    assert head.split() == ["vcpu", "guest", "host", "elsewhere"]
    assert first.split()[0] == "0" and second.split()[0] == "1"


def test_the_median_is_not_pulled_by_one_slow_exit(clocked: Clocked) -> None:
    clocked.begin(0)
    for host in (1000, 1000, 1000, 1000, 10**9):
        clocked.exit(0, 1, host)
    (row,) = clocked.stats.snapshot().rows
    assert 900 < row.median_ns < 1125
    assert row.host_ns == 10**9 + 4000


@given(st.lists(st.integers(0, 1 << 41), min_size=1, max_size=200))
def test_the_median_by_buckets_is_at_most_an_eighth_off(times: list[int]) -> None:
    counts = [0] * BUCKETS
    for time in times:
        counts[bucket_of(time)] += 1
    exact = min(statistics.median_low(times), middle_of(BUCKETS - 1))
    assert abs(median(counts) - exact) <= exact / 8


def test_buckets_are_in_the_order_of_their_times_and_no_time_has_none() -> None:
    assert [bucket_of(ns) for ns in (0, 1, 2, 3, 4)] == [0, 1, 2, 3, 4]
    assert [bucket_of(middle_of(bucket)) for bucket in range(BUCKETS)] == list(range(BUCKETS))
    assert bucket_of(1 << 200) == BUCKETS - 1
    assert median([0] * BUCKETS) == 0


def test_a_snapshot_can_be_taken_while_vcpus_go_on() -> None:
    """Each is of one moment: as many exits are timed as were counted, but for those under way."""
    stats, done = ExitStats(), threading.Event()
    vcpus, exits = 3, 3000

    def vcpu(index: int) -> None:
        stats.left(index)
        stats.enters(index)
        for number in range(exits):
            stats.left(index)
            stats.io(index, False, number % 50, 1, 1, b"\0")
            stats.enters(index)

    def watch() -> None:
        while not done.is_set():
            now = stats.snapshot()
            timed = sum(row.timed for row in now.rows)
            if not timed <= now.total <= timed + vcpus:
                wrong.append((timed, now.total))
            if any(min(v.guest_ns, v.host_ns, v.elsewhere_ns) < 0 for v in now.vcpus):
                wrong.append(now.vcpus)

    wrong: list[object] = []
    threads = [threading.Thread(target=vcpu, args=(i,)) for i in range(vcpus)]
    watcher = threading.Thread(target=watch)
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert not wrong
    assert stats.total == vcpus * exits
