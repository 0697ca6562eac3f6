"""How much a machine has done so far, as plain numbers that any thread may ask for."""

from collections.abc import Callable
from typing import NamedTuple

from vmexit.core.bus import Bus
from vmexit.core.memory import GuestMemory
from vmexit.machine.balloon import MemoryBalloon
from vmexit.machine.events import RunState


class FlowCounters(NamedTuple):
    """Operations of one kind of one device, and their bytes; neither ever goes down.

    Disks `read`, `write`, `flush`, `discard` and `write_zeroes`; network interfaces `receive` and
    `transmit` frames. All others have requests with bytes `to_guest` and `from_guest`; one that
    has both counts for either.
    """

    operation: str
    operations: int
    size: int


class DeviceCounters(NamedTuple):
    """A virtio device by its name (`disk0`, `net0`, …) and kind (`virtio-blk`, …).

    Its limits, if it may have any, have held requests back for `waited_ns`.
    """

    name: str
    kind: str
    flows: tuple[FlowCounters, ...]
    waited_ns: int | None


class MemoryCounters(NamedTuple):
    """Bytes of the guest's RAM, and how many of them the host has given."""

    size: int
    resident: int


class BalloonCounters(NamedTuple):
    """Bytes that the balloon shall have, and has, as the guest says."""

    target: int
    actual: int


class UnclaimedCounters(NamedTuple):
    """Accesses that no device answered."""

    bus: str
    """`port` or `MMIO`."""
    reads: int
    writes: int


class MachineCounters(NamedTuple):
    """All of it; `balloon` is None for a machine without one."""

    state: RunState
    memory: MemoryCounters
    balloon: BalloonCounters | None
    unclaimed: tuple[UnclaimedCounters, ...]
    devices: tuple[DeviceCounters, ...]


class CounterReader:
    """Reads them where they are counted. It takes no lock that a vCPU would wait for."""

    def __init__(
        self,
        size: int,
        memory: GuestMemory,
        pio: Bus,
        mmio: Bus,
        balloon: MemoryBalloon | None,
        devices: Callable[[], tuple[DeviceCounters, ...]],
    ) -> None:
        """`size` is that of the RAM in bytes."""
        self._size = size
        self._memory = memory
        self._buses = (pio, mmio)
        self._balloon = balloon
        self._devices = devices

    def read(self, state: RunState) -> MachineCounters:
        """The numbers of now, of a machine in `state`."""
        balloon = self._balloon
        return MachineCounters(
            state,
            MemoryCounters(self._size, self._memory.resident),
            None if balloon is None else BalloonCounters(balloon.target, balloon.actual),
            tuple(
                UnclaimedCounters(bus.name, bus.unclaimed_reads, bus.unclaimed_writes)
                for bus in self._buses
            ),
            self._devices(),
        )
