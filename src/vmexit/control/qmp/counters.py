"""The command that tells how much the machine has done: what `vm.counters()` has."""

import time
from typing import NamedTuple

from vmexit.control.process import process_counters
from vmexit.control.qmp.commands import command
from vmexit.control.qmp.session import Session
from vmexit.machine.counters import BalloonCounters, DeviceCounters, MemoryCounters
from vmexit.machine.events import RunState


class FlowInfo(NamedTuple):
    operation: str
    operations: int
    size: int


class DeviceInfo(NamedTuple):
    """`waited_ns` is how long limits have held requests back, where there may be any."""

    name: str
    kind: str
    flows: list[FlowInfo]
    waited_ns: int | None = None


class UnclaimedInfo(NamedTuple):
    bus: str
    reads: int
    writes: int


class ProcessInfo(NamedTuple):
    """CPU time in seconds, bytes in memory, and the start in seconds since 1970."""

    cpu_seconds: float
    resident: int
    started: float


class CountersInfo(NamedTuple):
    """`time_ns` is when that was, on a clock of the host that only goes forward."""

    time_ns: int
    state: RunState
    accelerator: str
    machine: str
    vcpus: int
    memory: MemoryCounters
    unclaimed: list[UnclaimedInfo]
    devices: list[DeviceInfo]
    process: ProcessInfo
    balloon: BalloonCounters | None = None


@command("x-query-counters")
def query_counters(session: Session) -> CountersInfo:
    vm = session.vm
    now = vm.counters()
    return CountersInfo(
        time.monotonic_ns(),
        now.state,
        vm.accel,
        vm.config.machine,
        vm.config.smp,
        now.memory,
        [UnclaimedInfo(*one) for one in now.unclaimed],
        [_device(one) for one in now.devices],
        ProcessInfo(*process_counters()),
        now.balloon,
    )


def _device(one: DeviceCounters) -> DeviceInfo:
    flows = [FlowInfo(*flow) for flow in one.flows]
    return DeviceInfo(one.name, one.kind, flows, one.waited_ns)
