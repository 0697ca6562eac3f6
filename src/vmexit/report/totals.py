"""What a report shows, added up in one pass, in memory that does not grow with the trace."""

from collections.abc import Iterable
from typing import NamedTuple

from vmexit.core.chrome_trace import MemorySlot
from vmexit.report.reader import AboutEvent, DirtyEvent, Event, ExitEvent, GuestEvent

# A trace may name any number of things: the first so many are told apart.
_MAX_REASONS = 12
_MAX_ADDRESSES = 20_000
_MAX_DEVICES = 500
_MAX_CHUNKS = 1 << 16

OTHERS = "others"


class Timeline:
    """How many events there were over time, by name: bins that become wider as time goes on."""

    BINS = 240

    def __init__(self) -> None:
        self.width = 1_000_000  # nanoseconds
        self.series: dict[str, list[int]] = {}

    def add(self, time: int, name: str) -> None:
        """One event at `time`, in nanoseconds."""
        while time >= self.width * self.BINS:
            self.width *= 2
            for bins in self.series.values():
                merged = [a + b for a, b in zip(bins[::2], bins[1::2], strict=True)]
                bins[:] = merged + [0] * (self.BINS - len(merged))
        found = self.series.get(name)
        if found is None:
            if len(self.series) >= _MAX_REASONS:
                name = OTHERS
            found = self.series.setdefault(name, [0] * self.BINS)
        found[time // self.width] += 1


class Place:
    """The exits at one address, or of one device."""

    __slots__ = ("device", "exits", "host_ns", "reads", "writes")

    def __init__(self, device: str = "") -> None:
        self.device = device
        self.exits = self.reads = self.writes = self.host_ns = 0

    def add(self, event: ExitEvent) -> None:
        """One more."""
        self.exits += 1
        self.host_ns += event.host_ns or 0
        if event.reason.endswith((" in", " read")):
            self.reads += 1
        else:
            self.writes += 1


class VcpuTotals:
    """What a vCPU did with its time."""

    __slots__ = ("exits", "guest_ns", "host_ns")

    def __init__(self) -> None:
        self.exits = self.guest_ns = self.host_ns = 0


class Heat(NamedTuple):
    """How often a chunk of memory was found written, and how many pages of it in all."""

    times: int
    pages: int


class Totals:
    """All of a trace. `timed`: it says how long exits took."""

    def __init__(self) -> None:
        self.about = AboutEvent("", "", ())
        self.exits = 0
        self.timed = False
        self.first: int | None = None  # nanoseconds
        self.last = 0
        self.timeline = Timeline()
        self.reasons: dict[str, Place] = {}
        self.ports: dict[int, Place] = {}
        self.mmio: dict[int, Place] = {}
        self.elsewhere = Place()
        self.devices: dict[str, Place] = {}
        self.vcpus: dict[int, VcpuTotals] = {}
        self.heat: dict[int, Heat] = {}
        self.chunk = 0
        self.looks = 0

    @property
    def slots(self) -> tuple[MemorySlot, ...]:
        """The memory slots of the machine, where the trace tells of them."""
        return self.about.slots

    def add_all(self, events: Iterable[Event]) -> None:
        """Add up `events`."""
        for event in events:
            if isinstance(event, ExitEvent):
                self._add_exit(event)
            elif isinstance(event, GuestEvent):
                self._span(event.time, event.duration)
                self._vcpu(event.vcpu).guest_ns += event.duration
            elif isinstance(event, DirtyEvent):
                self._add_dirty(event)
            else:
                self.about = event

    def _span(self, begin: int, duration: int) -> None:
        if self.first is None or begin < self.first:
            self.first = begin
        self.last = max(self.last, begin + duration)

    def _vcpu(self, number: int) -> VcpuTotals:
        found = self.vcpus.get(number)
        if found is None:
            found = self.vcpus[number] = VcpuTotals()
        return found

    def _add_exit(self, event: ExitEvent) -> None:
        self.exits += 1
        self._span(event.time, event.host_ns or 0)
        self.timeline.add(event.time, event.reason)
        if event.host_ns is not None:
            self.timed = True
        vcpu = self._vcpu(event.vcpu)
        vcpu.exits += 1
        vcpu.host_ns += event.host_ns or 0
        _place(self.reasons, event.reason, _MAX_REASONS, OTHERS).add(event)
        if event.kind:
            places = self.ports if event.kind == "port" else self.mmio
            place = places.get(event.address)
            if place is None:
                if len(self.ports) + len(self.mmio) < _MAX_ADDRESSES:
                    place = places[event.address] = Place(event.device)
                else:
                    place = self.elsewhere
            place.add(event)
        if event.device:
            _place(self.devices, event.device, _MAX_DEVICES, OTHERS).add(event)

    def _add_dirty(self, event: DirtyEvent) -> None:
        if not event.pages:
            self.looks += 1  # the counter that goes before the chunks
            return
        self.chunk = event.chunk
        for gpa, pages in event.pages.items():
            times, before = self.heat.get(gpa, (0, 0))
            if times or len(self.heat) < _MAX_CHUNKS:
                self.heat[gpa] = Heat(times + 1, before + pages)


def _place(places: dict[str, Place], name: str, most: int, rest: str) -> Place:
    found = places.get(name)
    if found is None:
        if len(places) >= most:
            name = rest
        found = places.setdefault(name, Place())
    return found
