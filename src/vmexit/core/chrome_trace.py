"""Exits as a trace for Perfetto and Chrome: the Trace Event Format, as a JSON object.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import NamedTuple

from vmexit.core.trace import ExitObserver, TextOutput


class MemorySlot(NamedTuple):
    """A range of GPAs, and the host virtual address of its first byte."""

    gpa: int
    size: int
    hva: int
    readonly: bool


class TraceInfo(NamedTuple):
    """What a trace tells of a machine besides its exits."""

    version: str
    accelerator: str
    vcpus: int
    slots: tuple[MemorySlot, ...]
    name_at: Callable[[bool, int], str]
    """The name of the device at an address, which is a GPA (True) or a port."""


# All tracks are threads of one process. A thread 0 would be taken for an idle task.
_PROCESS = 1
_FIRST_VCPU = 1
_FIRST_DEVICE = 10_000

# A hostile guest can touch any number of addresses.
_MAX_NAMES = 4096
# An event should not be so long that a reader has to hold much of it.
_MAX_CHUNKS = 1024


class _Vcpu:
    """What is known of a vCPU and not written yet; its own thread alone uses it."""

    __slots__ = ("args", "device", "entered", "left", "name", "tid")

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.entered: int | None = None  # the stretch in the guest, from here
        self.left: int | None = None  # to here, where the exit begins
        self.name = ""  # of the exit; empty where it is not known to be any
        self.args = ""
        self.device = ""


class ChromeTrace(ExitObserver):
    """A track for each vCPU, with its exits and stretches in the guest, and one for each device.

    Between `begin()` and `close()` each exit is written to `stream` once it is over. What is
    missing where the process was killed in between is the end, `]}`.
    """

    def __init__(self, stream: TextOutput) -> None:
        self._write = stream.write
        self._clock = time.perf_counter_ns
        self._start = self._clock()
        self._vcpus: dict[int, _Vcpu] = {}
        self._name_at: Callable[[bool, int], str] = lambda mmio, address: ""
        self._names: dict[tuple[bool, int], str] = {}
        self._tids: dict[str, int] = {}  # of the devices' tracks
        self._busy_until: dict[int, int] = {}
        self._lock = threading.Lock()
        self._open = False

    def begin(self, info: TraceInfo) -> None:
        """Write what comes before the first exit."""
        self._name_at = info.name_at
        other = {
            "version": info.version,
            "accelerator": info.accelerator,
            "vcpus": info.vcpus,
            "slots": [slot._asdict() for slot in info.slots],
        }
        head = f'{{"displayTimeUnit":"ns","otherData":{json.dumps(other)},"traceEvents":[\n'
        process = {"ph": "M", "pid": _PROCESS, "tid": _FIRST_VCPU, "name": "process_name"}
        self._write(head + json.dumps(process | {"args": {"name": "vmexit"}}))
        self._open = True
        for number in range(info.vcpus):
            self._name_track(_FIRST_VCPU + number, f"vCPU {number}")

    def _name_track(self, tid: int, name: str) -> None:
        common = {"ph": "M", "pid": _PROCESS, "tid": tid}
        texts = [
            json.dumps(common | {"name": "thread_name", "args": {"name": name}}),
            json.dumps(common | {"name": "thread_sort_index", "args": {"sort_index": tid}}),
        ]
        self._write("".join(f",\n{text}" for text in texts))

    def close(self) -> None:
        """Write what is still to come, and the end. No vCPU runs any more."""
        if not self._open:
            return
        self._open = False
        for vcpu in self._vcpus.values():
            self._flush(vcpu)
        self._write("\n]}\n")

    # What vCPUs tell.

    def left(self, vcpu: int) -> None:
        now = self._clock()
        state = self._vcpus.get(vcpu)
        if state is None:
            state = self._vcpus[vcpu] = _Vcpu(_FIRST_VCPU + vcpu)
        if state.left is not None:
            self._flush(state)
        state.left = now

    def enters(self, vcpu: int) -> None:
        state = self._vcpus[vcpu]
        now, left = self._clock(), state.left
        assert left is not None
        text = self._guest(state, left)
        if state.name:
            span, name = self._span(left, now), f'"name":"{state.name}"'
            text += (
                f',\n{{"ph":"X","cat":"exit",{name},"pid":{_PROCESS},"tid":{state.tid},{span},'
                f'"args":{state.args}}}'
            )
            if state.device:
                text += self._on_device(state.device, name, left, now)
        if text:
            self._write(text)
        state.name = ""
        state.left, state.entered = None, now

    def _flush(self, state: _Vcpu) -> None:
        """Write what has no end: an exit with which a run has ended."""
        left = state.left
        if left is None:
            return
        text = self._guest(state, left)
        if state.name:
            text += (
                f',\n{{"ph":"i","s":"t","cat":"exit","name":"{state.name}","pid":{_PROCESS},'
                f'"tid":{state.tid},"ts":{self._since(left)},"args":{state.args}}}'
            )
        if text:
            self._write(text)
        state.name = ""
        state.left = state.entered = None

    def _guest(self, state: _Vcpu, left: int) -> str:
        if state.entered is None:
            return ""
        return (
            f',\n{{"ph":"X","cat":"guest","name":"guest","pid":{_PROCESS},"tid":{state.tid},'
            f"{self._span(state.entered, left)}}}"
        )

    def _on_device(self, device: str, name: str, begin: int, end: int) -> str:
        with self._lock:
            tid = self._tids.get(device)
            if tid is None:
                tid = self._tids[device] = _FIRST_DEVICE + len(self._tids)
                self._name_track(tid, device)
            # Several vCPUs may be in a device at once, and the spans of a track may not overlap.
            begin = max(begin, self._busy_until.get(tid, 0))
            if begin >= end:
                return ""
            self._busy_until[tid] = end
        return (
            f',\n{{"ph":"X","cat":"device",{name},"pid":{_PROCESS},"tid":{tid},'
            f"{self._span(begin, end)}}}"
        )

    def _since(self, moment: int) -> str:
        """Microseconds since the beginning."""
        return f"{(moment - self._start) / 1e3:.3f}"

    def _span(self, begin: int, end: int) -> str:
        return f'"ts":{self._since(begin)},"dur":{(end - begin) / 1e3:.3f}'

    def _note(self, vcpu: int, name: str, args: str, device: str) -> None:
        state = self._vcpus.get(vcpu)
        if state is None:
            self.left(vcpu)
            state = self._vcpus[vcpu]
        state.name, state.args, state.device = name, args, device

    def _device(self, mmio: bool, address: int) -> str:
        key = mmio, address
        name = self._names.get(key)
        if name is None:
            if len(self._names) >= _MAX_NAMES:
                self._names.clear()
            name = self._names[key] = self._name_at(mmio, address)
        return name

    def io(self, vcpu: int, write: bool, port: int, size: int, count: int, data: bytes) -> None:
        device, way = self._device(False, port), "out" if write else "in"
        self._note(
            vcpu,
            f"{way} {port:#x}",
            f'{{"exit":"io","dir":"{way}","port":{port},"size":{size},"count":{count},'
            f'"data":"{data.hex()}"{_named(device)}}}',
            device,
        )

    def mmio(self, vcpu: int, write: bool, gpa: int, data: bytes) -> None:
        device, way = self._device(True, gpa), "write" if write else "read"
        self._note(
            vcpu,
            f"{way} {gpa:#x}",
            f'{{"exit":"mmio","dir":"{way}","gpa":{gpa},"size":{len(data)},'
            f'"data":"{data.hex()}"{_named(device)}}}',
            device,
        )

    def other(self, vcpu: int, exit: str, detail: str) -> None:
        said = f',"detail":{json.dumps(detail)}' if detail else ""
        self._note(vcpu, exit, f'{{"exit":"{exit}"{said}}}', "")

    # What is known of memory.

    def dirty(self, chunk: int, pages: Mapping[int, int]) -> None:
        """Which memory was written since the last time: pages by the GPA of each `chunk` bytes."""
        ts = self._since(self._clock())
        common = f'"cat":"memory","pid":{_PROCESS},"tid":{_FIRST_VCPU},"ts":{ts}'
        text = (
            f',\n{{"ph":"C","name":"dirty pages",{common},'
            f'"args":{{"pages":{sum(pages.values())}}}}}'
        )
        for some in _pieces(pages.items()):
            args = json.dumps({"chunk": chunk, "pages": {f"{gpa:#x}": n for gpa, n in some}})
            text += f',\n{{"ph":"i","s":"p","name":"dirty",{common},"args":{args}}}'
        self._write(text)


def _named(device: str) -> str:
    return f',"device":{json.dumps(device)}' if device else ""


def _pieces(items: Iterable[tuple[int, int]]) -> Iterable[list[tuple[int, int]]]:
    rest = iter(items)
    while some := list(islice(rest, _MAX_CHUNKS)):
        yield some
