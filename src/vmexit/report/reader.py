"""The events of a trace, of either format, one by one. What they say is not trusted."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from vmexit.core.chrome_trace import MemorySlot
from vmexit.core.errors import shown
from vmexit.report.json_stream import JsonStream, TraceError

REMEDY = "give a file that vmexit run --trace has written"

# What a trace can say at most.
_MAX_VCPU = 4095
_MAX_SECONDS = 1e9
_MAX_ADDRESS = (1 << 64) - 1
_MAX_SLOTS = 64
_MAX_MEMBERS = 64
_MAX_NAME = 64


class ExitEvent(NamedTuple):
    """One exit. Times are in nanoseconds; `host_ns` is None where the trace does not say.

    `kind` is "port", "mmio", or empty for what is no access.
    """

    time: int
    vcpu: int
    reason: str
    kind: str
    address: int
    device: str
    host_ns: int | None


class GuestEvent(NamedTuple):
    """A stretch in the guest."""

    time: int
    vcpu: int
    duration: int


class DirtyEvent(NamedTuple):
    """Pages written since the last of these, by the GPA of each chunk of so many bytes."""

    chunk: int
    pages: dict[int, int]


class AboutEvent(NamedTuple):
    """What the machine was."""

    version: str
    accelerator: str
    slots: tuple[MemorySlot, ...]


Event = ExitEvent | GuestEvent | DirtyEvent | AboutEvent


class TraceFile:
    """A trace to be read once, from the beginning to the end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.format = "json"
        self.cut_off = False
        """Whether it ends too early, as where vmexit was killed."""
        self.skipped = 0
        """How many events could not be understood."""

    def events(self) -> Iterator[Event]:
        """Raises TraceError."""
        try:
            with open(self._path, encoding="utf-8-sig", errors="replace", newline="") as file:
                stream = JsonStream(file.read)
                yield from self._events(stream)
                self.cut_off = stream.cut_off
        except OSError as error:
            raise TraceError(
                f"cannot read {shown(self._path)}: {error.strerror}; {REMEDY}"
            ) from error
        except (ValueError, TraceError) as error:  # a path with a null byte
            raise TraceError(f"{shown(self._path)} is no trace: {error}; {REMEDY}") from error

    def _events(self, stream: JsonStream) -> Iterator[Event]:
        first = stream.peek()
        if not first:
            raise TraceError("it is empty")
        if first == "[":
            self.format = "chrome"
            yield from self._chrome(stream)
            return
        members: dict[str, object] = {}
        for key in stream.members():
            if key == "traceEvents" and stream.peek() == "[":
                self.format = "chrome"
                yield from self._chrome(stream)
            elif key == "otherData":
                yield _about(stream.value())
            else:
                value = stream.value()
                if len(members) < _MAX_MEMBERS:
                    members[key] = value
        if self.format == "json" and not stream.cut_off:
            yield from self._lines(members, stream)

    def _chrome(self, stream: JsonStream) -> Iterator[Event]:
        for value in stream.elements():
            if not isinstance(value, dict):
                continue
            category = value.get("cat")
            if isinstance(category, str) and category in _CHROME:
                try:
                    yield _CHROME[category](value)
                except _Odd:
                    self.skipped += 1

    def _lines(self, first: object, stream: JsonStream) -> Iterator[Event]:
        value = first
        while True:
            try:
                line = _dict(value)
                time = _number(line.get("t"), _MAX_SECONDS)
                yield _exit(line, round(time * 1e9), _integer(line.get("vcpu"), _MAX_VCPU), None)
            except _Odd:
                self.skipped += 1
            if not stream.peek():
                return
            value = stream.value()
            if stream.cut_off:
                return


class _Odd(Exception):
    """An event is not as one of ours."""


def _dict(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _Odd
    return value


def _number(value: object, most: float) -> float:
    # A bool is an int, and not meant.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Odd
    if not 0 <= value <= most:  # nor is it NaN
        raise _Odd
    return value


def _integer(value: object, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise _Odd
    return value


def _text(value: object) -> str:
    return value[:_MAX_NAME] if isinstance(value, str) else ""


def _exit(fields: Mapping[str, object], time: int, vcpu: int, host_ns: int | None) -> ExitEvent:
    name, way = _text(fields.get("exit")), _text(fields.get("dir"))
    device = _text(fields.get("device"))
    if name in ("io", "mmio"):
        if way not in ("in", "out", "read", "write"):
            raise _Odd
        address = _integer(fields.get("port" if name == "io" else "gpa"), _MAX_ADDRESS)
        kind = "port" if name == "io" else "mmio"
        return ExitEvent(time, vcpu, f"{name} {way}", kind, address, device, host_ns)
    if not name:
        raise _Odd
    return ExitEvent(time, vcpu, name, "", 0, device, host_ns)


def _nanoseconds(value: object) -> int:
    return round(_number(value, _MAX_SECONDS * 1e6) * 1e3)


def _vcpu(event: Mapping[str, object]) -> int:
    return _integer(event.get("tid"), _MAX_VCPU + 1) - 1


def _chrome_exit(event: Mapping[str, object]) -> ExitEvent:
    time, vcpu = _nanoseconds(event.get("ts")), _vcpu(event)
    host_ns = _nanoseconds(event.get("dur")) if event.get("ph") == "X" else None
    return _exit(_dict(event.get("args")), time, max(vcpu, 0), host_ns)


def _chrome_guest(event: Mapping[str, object]) -> GuestEvent:
    time, vcpu = _nanoseconds(event.get("ts")), _vcpu(event)
    return GuestEvent(time, max(vcpu, 0), _nanoseconds(event.get("dur")))


def _chrome_memory(event: Mapping[str, object]) -> DirtyEvent:
    args = _dict(event.get("args"))
    if event.get("ph") == "C":  # the sum, for Perfetto
        return DirtyEvent(1, {})
    pages: dict[int, int] = {}
    for text, number in _dict(args.get("pages")).items():
        try:
            gpa = int(text[:20], 16)
        except ValueError as error:
            raise _Odd from error
        pages[_integer(gpa, _MAX_ADDRESS)] = _integer(number, _MAX_ADDRESS)
    chunk = _integer(args.get("chunk"), _MAX_ADDRESS)
    if not chunk:
        raise _Odd
    return DirtyEvent(chunk, pages)


_CHROME: dict[str, Callable[[Mapping[str, object]], Event]] = {
    "exit": _chrome_exit,
    "guest": _chrome_guest,
    "memory": _chrome_memory,
}


def _about(value: object) -> AboutEvent:
    fields = value if isinstance(value, dict) else {}
    slots = fields.get("slots")
    found = []
    for slot in slots[:_MAX_SLOTS] if isinstance(slots, list) else ():
        try:
            found.append(_slot(_dict(slot)))
        except _Odd:
            continue
    return AboutEvent(_text(fields.get("version")), _text(fields.get("accelerator")), tuple(found))


def _slot(fields: Mapping[str, object]) -> MemorySlot:
    gpa, size, hva = (_integer(fields.get(k), _MAX_ADDRESS) for k in ("gpa", "size", "hva"))
    if not size:
        raise _Odd
    return MemorySlot(gpa, size, hva, fields.get("readonly") is True)


def size_of(path: str) -> int:
    """The file's size in bytes; 0 where that is not known."""
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except (OSError, ValueError):
        return 0
