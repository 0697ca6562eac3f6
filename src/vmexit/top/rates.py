"""What has happened between two moments, per second."""

from typing import NamedTuple

from vmexit.top.sample import Exits, Flow, FlowName, Place, Sample, Spent

_SECOND = 1e9


class ExitRate(NamedTuple):
    """Exits at one place: how many a second, of all (0 to 1), how long one took, and in all."""

    place: Place
    rate: float
    share: float
    nanoseconds: float | None
    total: int


class VcpuShare(NamedTuple):
    """Where a vCPU was, each from 0 to 1; all 0 where its time stood still."""

    vcpu: int
    guest: float
    host: float
    elsewhere: float

    @property
    def doing(self) -> str:
        """What it did most of the time."""
        if not any(self[1:]):
            return "paused"
        words = {self.guest: "running", self.host: "exits", self.elsewhere: "waiting"}
        return words[max(words)]


class FlowRate(NamedTuple):
    """Operations and bytes a second; and of its device, for which part of the time it waited."""

    name: FlowName
    operations: float
    size: float
    waited: float | None


class Rates(NamedTuple):
    """`cpu` is CPU seconds of the process per second; the busiest exits come first."""

    now: Sample
    cpu: float
    exits: list[ExitRate] | None
    exit_rate: float
    vcpus: list[VcpuShare] | None
    flows: list[FlowRate]


def rates(before: Sample, now: Sample) -> Rates:
    """From `before` to `now`, which come from one connection."""
    seconds = max(now.time_ns - before.time_ns, 1) / _SECOND
    exits, total = _exits(before.exits or {}, now.exits, seconds)
    return Rates(
        now,
        max(0.0, now.cpu_seconds - before.cpu_seconds) / seconds,
        exits,
        total,
        _vcpus(before.vcpus or {}, now.vcpus),
        [
            FlowRate(
                name,
                (flow.operations - old.operations) / seconds,
                (flow.size - old.size) / seconds,
                _waited(before, now, name.device, seconds),
            )
            for name, flow in now.flows.items()
            for old in (before.flows.get(name, Flow(0, 0)),)
        ],
    )


def _exits(
    before: dict[Place, Exits], now: dict[Place, Exits] | None, seconds: float
) -> tuple[list[ExitRate] | None, float]:
    if now is None:
        return None, 0.0
    nothing = Exits(0, 0)
    new = {
        place: Exits(one.exits - old.exits, one.host_ns - old.host_ns)
        for place, one in now.items()
        for old in (before.get(place, nothing),)
    }
    total = sum(one.exits for one in new.values())
    found = [
        ExitRate(
            place,
            one.exits / seconds,
            one.exits / total if total else 0.0,
            one.host_ns / one.exits if one.exits else None,
            now[place].exits,
        )
        for place, one in new.items()
    ]
    found.sort(key=lambda one: (-one.rate, -one.total))
    return found, total / seconds


def _vcpus(before: dict[int, Spent], now: dict[int, Spent] | None) -> list[VcpuShare] | None:
    if now is None:
        return None
    shares = []
    for vcpu, spent in sorted(now.items()):
        old = before.get(vcpu, Spent(0, 0, 0))
        parts = [max(0, new - was) for new, was in zip(spent, old, strict=True)]
        whole = sum(parts) or 1
        guest, host, elsewhere = (part / whole for part in parts)
        shares.append(VcpuShare(vcpu, guest, host, elsewhere))
    return shares


def _waited(before: Sample, now: Sample, device: str, seconds: float) -> float | None:
    if device not in now.waited_ns:
        return None
    waited = now.waited_ns[device] - before.waited_ns.get(device, 0)
    return min(1.0, max(0.0, waited / _SECOND / seconds))
