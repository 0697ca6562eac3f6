"""Which metrics there are, in the base units and by the conventions of Prometheus.

https://prometheus.io/docs/practices/naming/
"""

from collections.abc import Iterator, Mapping

from vmexit import __version__
from vmexit.control.metrics.exposition import Family, Sample, counter, gauge
from vmexit.control.process import ProcessCounters, process_counters
from vmexit.core.exit_stats import ExitStats, StatsSnapshot
from vmexit.machine.counters import DeviceCounters, MachineCounters
from vmexit.machine.events import RunState
from vmexit.machine.machine import Machine

_NANO = 1e9
_ELSEWHERE = "elsewhere"
_BUS = {"port": "pio", "MMIO": "mmio"}


def families(vm: Machine, stats: ExitStats | None) -> Iterator[Family]:
    """All that is known of `vm` now, and of its exits if `stats` observes them."""
    counters = vm.counters()
    yield from _machine(vm, counters)
    yield from _devices(counters.devices)
    if stats is not None:
        snapshot = stats.snapshot()
        yield from _exits(vm, snapshot)
        yield _vcpus(snapshot)
    yield from _process(process_counters())


def _machine(vm: Machine, now: MachineCounters) -> Iterator[Family]:
    about = {"version": __version__, "accelerator": vm.accel, "machine": vm.config.machine}
    yield gauge("vmexit_info", "What runs, in the labels.", [Sample(1, about)])
    yield gauge(
        "vmexit_state",
        "What the machine is doing: 1 for the one of the states that it is in.",
        [Sample(int(state is now.state), {"state": state.value}) for state in RunState],
    )
    yield gauge("vmexit_vcpus", "vCPUs of the guest.", [Sample(vm.config.smp)])
    yield gauge("vmexit_memory_bytes", "RAM of the guest.", [Sample(now.memory.size)])
    yield gauge(
        "vmexit_memory_resident_bytes",
        "RAM of the guest that the host has given, also what is swapped out.",
        [Sample(now.memory.resident)],
    )
    if now.balloon is not None:
        for name, text, size in (
            ("target", "Memory that the balloon shall take from the guest.", now.balloon.target),
            ("actual", "Memory that the balloon has, as the guest says.", now.balloon.actual),
        ):
            yield gauge(f"vmexit_balloon_{name}_bytes", text, [Sample(size)])
    yield counter(
        "vmexit_unclaimed_accesses_total",
        "Accesses that no device answered.",
        [
            Sample(count, {"bus": _BUS[bus], "access": access})
            for bus, reads, writes in now.unclaimed
            for access, count in (("read", reads), ("write", writes))
        ],
    )


def _devices(devices: tuple[DeviceCounters, ...]) -> Iterator[Family]:
    flows = [
        ({"device": device.name, "type": device.kind, "operation": flow.operation}, flow)
        for device in devices
        for flow in device.flows
    ]
    yield counter(
        "vmexit_virtio_operations_total",
        "Requests of virtio devices; of networks, frames.",
        [Sample(flow.operations, labels) for labels, flow in flows],
    )
    yield counter(
        "vmexit_virtio_bytes_total",
        "Bytes of these requests or frames.",
        [Sample(flow.size, labels) for labels, flow in flows],
    )
    yield counter(
        "vmexit_virtio_limit_wait_seconds_total",
        "Time for which a limit (iops, bps, pps) has held requests back.",
        [
            Sample(device.waited_ns / _NANO, {"device": device.name, "type": device.kind})
            for device in devices
            if device.waited_ns is not None
        ],
    )


def _exits(vm: Machine, snapshot: StatsSnapshot) -> Iterator[Family]:
    # Accesses of several sizes at one address are one series.
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    names: dict[tuple[str, str], str] = {}
    for row in snapshot.rows:
        where = _ELSEWHERE if row.elsewhere else "" if row.address is None else f"{row.address:#x}"
        key = row.reason, where
        exits, host_ns = counts.get(key, (0, 0))
        counts[key] = exits + row.exits, host_ns + row.host_ns
        if row.address is not None and key not in names:
            names[key] = vm.device_at(row.address, mmio=row.reason.startswith("mmio"))

    def labels(key: tuple[str, str]) -> Mapping[str, str]:
        reason, where = key
        return {"reason": reason, "address": where, "device": names.get(key, "")}

    yield counter(
        "vmexit_exits_total",
        "Exits to the host, by reason and by port or guest physical address.",
        [Sample(exits, labels(key)) for key, (exits, _) in counts.items()],
    )
    yield counter(
        "vmexit_exit_seconds_total",
        "Time on the host with these exits.",
        [Sample(host_ns / _NANO, labels(key)) for key, (_, host_ns) in counts.items()],
    )


def _vcpus(snapshot: StatsSnapshot) -> Family:
    return counter(
        "vmexit_vcpu_seconds_total",
        "How each vCPU has spent its time; elsewhere: paused, halted, or waiting for its turn.",
        [
            Sample(ns / _NANO, {"vcpu": str(vcpu), "where": where})
            for vcpu, *parts in snapshot.vcpus
            for where, ns in zip(("guest", "host", _ELSEWHERE), parts, strict=True)
        ],
    )


def _process(now: ProcessCounters) -> Iterator[Family]:
    yield counter(
        "process_cpu_seconds_total",
        "CPU time of the process, user and system.",
        [Sample(now.cpu_seconds)],
    )
    yield gauge("process_resident_memory_bytes", "Memory of the process.", [Sample(now.resident)])
    yield gauge(
        "process_start_time_seconds",
        "Start of the process, since the epoch.",
        [Sample(now.started)],
    )
