"""Watching exits: as JSON lines, and as text; exit_stats.py and chrome_trace.py have more.

An observer is told of each exit once its access is known (reads after the answer, writes before
the device sees them), and of the two moments around it: the guest was left, the guest goes on.
While nobody observes, vCPUs do not call here at all.
"""

import time
from collections.abc import Iterable
from typing import Protocol


class TextOutput(Protocol):
    """Where text goes: an open file, or what has its `write`."""

    def write(self, text: str, /) -> object: ...


class ExitObserver(Protocol):
    """What a vCPU tells of its exits. Several vCPU threads may call at once.

    One exit is `left`, then `io`, `mmio` or `other`, then `enters`; after an exit that ends the
    run, `enters` comes with the next one. A class that derives from this defines what it wants
    to know of, and the rest does nothing.
    """

    def left(self, vcpu: int) -> None:
        """The guest executes no more: a VM exit, or the beginning of a run.

        Where this comes twice without `enters`, the vCPU was elsewhere in between: paused, or,
        on the software CPU, halted or waiting for its turn.
        """
        return

    def enters(self, vcpu: int) -> None:
        """The guest executes from now on: VM entry."""
        return

    def io(self, vcpu: int, write: bool, port: int, size: int, count: int, data: bytes) -> None:
        """Port I/O: `count` elements of `size` bytes; `data` in guest order."""
        return

    def mmio(self, vcpu: int, write: bool, gpa: int, data: bytes) -> None:
        """A memory access of `len(data)` bytes that no RAM answered."""
        return

    def other(self, vcpu: int, exit: str, detail: str) -> None:
        """Any exit that is not I/O: `exit` is its name, `detail` may be empty."""
        return


class JsonTrace(ExitObserver):
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


class TextLog(ExitObserver):
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


class Tee(ExitObserver):
    """Tells several observers."""

    def __init__(self, observers: Iterable[ExitObserver]) -> None:
        self._observers = tuple(observers)

    def left(self, vcpu: int) -> None:
        for observer in self._observers:
            observer.left(vcpu)

    def enters(self, vcpu: int) -> None:
        for observer in self._observers:
            observer.enters(vcpu)

    def io(self, vcpu: int, write: bool, port: int, size: int, count: int, data: bytes) -> None:
        for observer in self._observers:
            observer.io(vcpu, write, port, size, count, data)

    def mmio(self, vcpu: int, write: bool, gpa: int, data: bytes) -> None:
        for observer in self._observers:
            observer.mmio(vcpu, write, gpa, data)

    def other(self, vcpu: int, exit: str, detail: str) -> None:
        for observer in self._observers:
            observer.other(vcpu, exit, detail)
