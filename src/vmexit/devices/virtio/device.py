"""What a virtio device offers a transport, and what it may ask of it."""

from collections.abc import Callable, Sequence
from typing import Protocol

from vmexit.core.bus import State
from vmexit.core.rate import Limit
from vmexit.core.saved import Saved
from vmexit.devices.virtio.flow import Flow
from vmexit.devices.virtio.queue import Queue


class Transport(Protocol):
    """What a device may ask, from any thread. No call of one device is made within another."""

    def enter(self, function: Callable[[], None]) -> None:
        """Call `function` as if the driver had called: after other calls, and within no other.

        Not at all before the driver is ready. A QueueError that it raises breaks the device.
        """
        ...

    def config_changed(self) -> None:
        """The configuration is another one now: tell the driver."""
        ...


class VirtioDevice:
    """One type of device (virtio 5): the base of all. Its transport calls it, never twice at once.

    What comes from elsewhere, as from the event loop when a socket can be read, goes through
    `transport.enter()`.
    """

    device_id: int
    """Its type (5)."""

    features = 0
    """The bits of its type that it offers."""

    queue_sizes: Sequence[int] = ()
    """The greatest size of each queue."""

    waits = False
    """Whether a request may take as long as the host's disks do. Then it has a thread of its own
    where the accelerator can notify one."""

    transport: Transport
    """Set before anything else happens."""

    limit: Limit | None = None
    """How much there may be in a time, on all queues together."""

    flows: Sequence[Flow] = ()
    """What it counts of its operations; where that is nothing, its queues do."""

    queues: Sequence[Queue] = ()
    """Those that the driver has set up; none before it is ready."""

    @property
    def unsaved(self) -> str:
        """Why its state cannot be saved now, and after a semicolon the remedy; else empty."""
        return ""

    def require_fits(self, state: State) -> None:
        """Raises ConfigError if `state` is that of a device with something else behind it."""

    def config(self) -> bytes:
        """The device configuration space as it is now."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space, within its size."""

    def activate(self, queues: Sequence[Queue], features: int) -> None:
        """The driver is ready, with these of the features."""
        self.queues = queues
        for queue in queues:
            queue.limit = self.limit

    def notify(self, index: int) -> None:
        """There may be buffers in a queue. Raises QueueError for what breaks its rules."""
        raise NotImplementedError

    def settle(self) -> None:
        """The machine is about to be paused: what goes on by itself ends before this returns.

        What comes by `transport.enter()` waits until it goes on.
        """

    def reset(self) -> None:
        """Forget the driver."""
        self.queues = ()

    def state(self) -> State:
        """What the device itself has to keep, as plain versioned data."""
        return {"version": 1}

    def restore(self, state: State) -> None:
        """Take over what `state()` gave; `activate()` follows, if the driver was ready.

        Raises ConfigError for what is no state of this.
        """
        Saved(state, f"a {type(self).__name__}", 1)
