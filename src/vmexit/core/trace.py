"""Watching exits: as JSON lines, as text, and as a table of counts.

An observer is told of each exit once its access is known (reads after the answer, writes before
the device sees them). While nobody observes, vCPUs do not call here at all.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Protocol


class TextOutput(Protocol):
    """Where text goes: an open file, or what has its `write`."""

    def write(self, text: str, /) -> object: ...


class ExitObserver(Protocol):
    """What a vCPU tells of its exits. Several vCPU threads may call at once."""

    def io(self, vcpu: int, write: bool, port: int, size: int, count: int, data: bytes) -> None:
        """Port I/O: `count` elements of `size` bytes; `data` in guest order."""
        ...

    def mmio(self, vcpu: int, write: bool, gpa: int, data: bytes) -> None:
        """A memory access of `len(data)` bytes that no RAM answered."""
        ...

    def other(self, vcpu: int, exit: str, detail: str) -> None:
        """Any exit that is not I/O: `exit` is its name, `detail` may be empty."""
        ...


class JsonTrace:
    """One JSON object an exit, one a line, to `stream`; `t` counts seconds from creation."""

    def __init__(self, stream: TextOutput) -> None:
        self._write = stream.write
        self._start = time.perf_counter()

    def _head(self, vcpu: int) -> str:
        return f'{{"t":{time.perf_counter() - self._start:.6f},"vcpu":{vcpu},"exit":'

    def io(self, vcpu: int, write: bool, port: int, size: int, count: int, data: bytes) -> None:
        self._write(
            f'{self._head(vcpu)}"io","dir":"{"out" if write else "in"}","port":{port},'
            f'"size":{size},"count":{count},"data":"{data.hex()}"}}\n'
        )

    def mmio(self, vcpu: int, write: bool, gpa: int, data: bytes) -> None:
        self._write(
            f'{self._head(vcpu)}"mmio","dir":"{"write" if write else "read"}","gpa":{gpa},'
            f'"size":{len(data)},"data":"{data.hex()}"}}\n'
        )

    def other(self, vcpu: int, exit: str, detail: str) -> None:
        self._write(f'{self._head(vcpu)}"{exit}"}}\n')


class TextLog:
    """One line an exit, for people."""

    def __init__(self, stream: TextOutput) -> None:
        self._write = stream.write

    def io(self, vcpu: int, write: bool, port: int, size: int, count: int, data: bytes) -> None:
        times = f" x{count}" if count != 1 else ""
        verb = "out" if write else "in "
        self._write(
            f"vcpu {vcpu}: io {verb} port {port:#06x} size {size}{times} data {data.hex()}\n"
        )

    def mmio(self, vcpu: int, write: bool, gpa: int, data: bytes) -> None:
        verb = "write" if write else "read "
        self._write(f"vcpu {vcpu}: mmio {verb} gpa {gpa:#x} size {len(data)} data {data.hex()}\n")

    def other(self, vcpu: int, exit: str, detail: str) -> None:
        self._write(f"vcpu {vcpu}: {exit}{': ' + detail if detail else ''}\n")


class ExitStats:
    """Counts exits by reason and address; `table()` says which were the most."""

    # A hostile guest can touch any number of addresses; the table must not grow with them.
    MAX_ADDRESSES = 4096

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def _count(self, reason: str, where: str) -> None:
        key = (reason, where)
        with self._lock:
            if key not in self.counts and len(self.counts) >= self.MAX_ADDRESSES:
                key = (reason, "elsewhere")
            self.counts[key] += 1

    def io(self, vcpu: int, write: bool, port: int, size: int, count: int, data: bytes) -> None:
        self._count("io out" if write else "io in", f"{port:#06x}/{size}")

    def mmio(self, vcpu: int, write: bool, gpa: int, data: bytes) -> None:
        self._count("mmio write" if write else "mmio read", f"{gpa:#x}/{len(data)}")

    def other(self, vcpu: int, exit: str, detail: str) -> None:
        self._count(exit, "")

    @property
    def total(self) -> int:
        """The number of all exits."""
        return sum(self.counts.values())

    def table(self, rows: int = 20) -> str:
        """The most frequent exits, one a line, the most frequent first."""
        lines = [f"{'exit':<11} {'address/size':<18} {'count':>10} {'share':>7}"]
        shown = self.counts.most_common(rows)
        total = self.total or 1
        for (reason, where), count in shown:
            lines.append(f"{reason:<11} {where:<18} {count:>10} {count / total:>7.1%}")
        if len(self.counts) > len(shown):
            rest = total - sum(count for _, count in shown)
            lines.append(f"{'others':<11} {'':<18} {rest:>10} {rest / total:>7.1%}")
        lines.append(f"{'total':<11} {'':<18} {self.total:>10}")
        return "\n".join(lines)


class Tee:
    """Tells several observers."""

    def __init__(self, observers: Iterable[ExitObserver]) -> None:
        self._observers = tuple(observers)

    def io(self, vcpu: int, write: bool, port: int, size: int, count: int, data: bytes) -> None:
        for observer in self._observers:
            observer.io(vcpu, write, port, size, count, data)

    def mmio(self, vcpu: int, write: bool, gpa: int, data: bytes) -> None:
        for observer in self._observers:
            observer.mmio(vcpu, write, gpa, data)

    def other(self, vcpu: int, exit: str, detail: str) -> None:
        for observer in self._observers:
            observer.other(vcpu, exit, detail)
