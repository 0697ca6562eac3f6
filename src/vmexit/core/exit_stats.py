"""Exits counted and timed by reason and address, and how each vCPU's time is divided."""

import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from vmexit.core.histogram import BUCKETS, bucket_of, median
from vmexit.core.trace import ExitObserver


class ExitRow(NamedTuple):
    """All exits of one reason at one address.

    `address` is a port or a GPA and `size` that of the access in bytes; None and 0 for what is no
    access, and for those that were too many to be told apart (`elsewhere`). Of the `exits`,
    `timed` are over: they took `host_ns` in all, each one `median_ns` in the middle.
    """

    reason: str
    address: int | None
    size: int
    exits: int
    timed: int
    host_ns: int
    median_ns: int
    elsewhere: bool = False

    @property
    def where(self) -> str:
        """Address and size as they are shown."""
        if self.elsewhere:
            return "elsewhere"
        return _where(self.reason, self.address, self.size)


class VcpuTime(NamedTuple):
    """How much of its time a vCPU has spent in the guest, and on the host with exits.

    `elsewhere_ns` is the rest: paused between runs, and on the software CPU halted or waiting for
    its turn. On KVM with interrupt controllers in the kernel a halted vCPU waits inside KVM_RUN,
    which is time in the guest.
    """

    vcpu: int
    guest_ns: int
    host_ns: int
    elsewhere_ns: int


class StatsSnapshot(NamedTuple):
    """What `ExitStats` knew at one moment: the most frequent exits first, vCPUs by number."""

    rows: tuple[ExitRow, ...]
    vcpus: tuple[VcpuTime, ...]

    @property
    def total(self) -> int:
        """The number of all exits."""
        return sum(row.exits for row in self.rows)


_Key = tuple[str, int | None, int]
_ELSEWHERE = -1  # the size of no access


class _Row:
    __slots__ = ("buckets", "count", "host_ns")

    def __init__(self) -> None:
        self.count = 0
        self.host_ns = 0
        self.buckets = [0] * BUCKETS


# Whether it is in the guest, since when, when it began, nanoseconds in the guest and on the host.
# Replaced as a whole, so that a reader on another thread never sees half a change; a tuple without
# names, which takes an eighth of the time to make.
_Times = tuple[bool, int, int, int, int]


class ExitStats(ExitObserver):
    """Counts and times exits by reason and address; `table()` says which were the most.

    Any thread may read, at any time.
    """

    # A hostile guest can touch any number of addresses; the table must not grow with them.
    MAX_ADDRESSES = 4096

    def __init__(self) -> None:
        self._rows: dict[_Key, _Row] = {}
        self._times: dict[int, _Times] = {}
        self._under_way: dict[int, _Row] = {}  # by vCPU, the exit that is not over
        self._lock = threading.Lock()
        self._clock = time.perf_counter_ns

    def left(self, vcpu: int) -> None:
        now = self._clock()
        times = self._times.get(vcpu)
        if times is None:
            self._times[vcpu] = False, now, now, 0, 0
            return
        in_guest, since, begun, guest, host = times
        if in_guest:
            guest += now - since
        self._under_way.pop(vcpu, None)
        self._times[vcpu] = False, now, begun, guest, host

    def enters(self, vcpu: int) -> None:
        now = self._clock()
        times = self._times.get(vcpu)
        if times is None:
            self._times[vcpu] = True, now, now, 0, 0
            return
        _, since, begun, guest, host = times
        taken = now - since
        row = self._under_way.pop(vcpu, None)
        if row is not None:
            bucket = bucket_of(taken)
            with self._lock:
                row.host_ns += taken
                row.buckets[bucket] += 1
        self._times[vcpu] = True, now, begun, guest, host + taken

    def _count(self, vcpu: int, key: _Key) -> None:
        with self._lock:
            row = self._rows.get(key)
            if row is None:
                row = self._add(key)
            row.count += 1
        self._under_way[vcpu] = row

    def _add(self, key: _Key) -> _Row:
        if len(self._rows) >= self.MAX_ADDRESSES:
            key = key[0], None, _ELSEWHERE
        return self._rows.setdefault(key, _Row())

    def io(self, vcpu: int, write: bool, port: int, size: int, count: int, data: bytes) -> None:
        self._count(vcpu, ("io out" if write else "io in", port, size))

    def mmio(self, vcpu: int, write: bool, gpa: int, data: bytes) -> None:
        self._count(vcpu, ("mmio write" if write else "mmio read", gpa, len(data)))

    def other(self, vcpu: int, exit: str, detail: str) -> None:
        self._count(vcpu, (exit, None, 0))

    def snapshot(self) -> StatsSnapshot:
        """All of it at one moment, from any thread."""
        with self._lock:  # no longer than a copy takes: vCPUs wait for it
            copied = [
                (key, row.count, row.host_ns, tuple(row.buckets)) for key, row in self._rows.items()
            ]
            times, now = sorted(self._times.items()), self._clock()
        rows = [
            ExitRow(
                reason, address, max(size, 0), count, sum(buckets), host_ns, median(buckets),
                size == _ELSEWHERE,
            )
            for (reason, address, size), count, host_ns, buckets in copied
        ]  # fmt: skip
        rows.sort(key=lambda row: -row.exits)
        return StatsSnapshot(tuple(rows), tuple(_vcpu_time(v, t, now) for v, t in times))

    @property
    def counts(self) -> "Counter[tuple[str, str]]":
        """How many exits there were, by reason and by address and size as the table shows them."""
        return Counter({(row.reason, row.where): row.exits for row in self.snapshot().rows})

    @property
    def total(self) -> int:
        """The number of all exits."""
        with self._lock:
            return sum(row.count for row in self._rows.values())

    def table(self, rows: int = 20) -> str:
        """The most frequent exits, one a line, and what each vCPU did with its time."""
        now = self.snapshot()
        total = now.total
        lines = [
            f"{'exit':<11} {'address/size':<18} {'count':>10} {'share':>7} {'host ms':>10} "
            f"{'median µs':>10}"
        ]
        for row in now.rows[:rows]:
            timed = f"{row.median_ns / 1e3:>10.1f}" if row.timed else f"{'-':>10}"
            lines.append(_line(row.reason, row.where, [row], total) + f" {timed}")
        if len(now.rows) > rows:
            lines.append(_line("others", "", now.rows[rows:], total))
        lines.append(_line("total", "", now.rows, total))
        if now.vcpus:
            lines += ["", f"{'vcpu':<11} {'guest':>18} {'host':>18} {'elsewhere':>18}"]
        for vcpu, *parts in now.vcpus:
            spent = sum(parts) or 1
            texts = [f"{ns / 1e9:.3f} s {ns / spent:>7.1%}" for ns in parts]
            lines.append(f"{vcpu:<11} " + " ".join(f"{text:>18}" for text in texts))
        return "\n".join(lines)


def _line(name: str, where: str, rows: Iterable[ExitRow], total: int) -> str:
    rows = list(rows)
    count = sum(row.exits for row in rows)
    host = f"{sum(r.host_ns for r in rows) / 1e6:.1f}" if any(r.timed for r in rows) else "-"
    share = f"{count / total:.1%}" if total else "-"
    return f"{name:<11} {where:<18} {count:>10} {share:>7} {host:>10}"


def _where(reason: str, address: int | None, size: int) -> str:
    if address is None:
        return ""
    return f"{address:#06x}/{size}" if reason.startswith("io ") else f"{address:#x}/{size}"


def _vcpu_time(vcpu: int, times: _Times, now: int) -> VcpuTime:
    in_guest, since, begun, guest, host = times
    until = since
    if in_guest:
        guest += now - since
        until = now
    return VcpuTime(vcpu, guest, host, until - begun - guest - host)
