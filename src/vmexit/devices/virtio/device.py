"""What a virtio device offers a transport."""

from collections.abc import Sequence
from typing import Protocol

from vmexit.core.bus import State
from vmexit.devices.virtio.queue import Queue


class VirtioDevice(Protocol):
    """One type of device (virtio 5). Its transport calls it, never two calls at a time."""

    @property
    def device_id(self) -> int:
        """Its type (5)."""
        ...

    @property
    def features(self) -> int:
        """The bits of its type that it offers."""
        ...

    @property
    def queue_sizes(self) -> Sequence[int]:
        """The greatest size of each queue."""
        ...

    def config(self) -> bytes:
        """The device configuration space as it is now."""
        ...

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space, within its size."""
        ...

    def activate(self, queues: Sequence[Queue], features: int) -> None:
        """The driver is ready, with these of the features."""
        ...

    def notify(self, index: int) -> None:
        """There may be requests in a queue. Raises QueueError for what breaks its rules."""
        ...

    def reset(self) -> None:
        """Forget the driver."""
        ...

    def state(self) -> State:
        """What the device itself has to keep, as plain versioned data."""
        ...

    def restore(self, state: State) -> None:
        """Take over what `state()` gave; `activate()` follows, if the driver was ready."""
        ...
