"""The virtio devices of a machine: registers, an interrupt and notifications for each."""

import os
from collections.abc import Callable

from vmexit.abi.virtio import MMIO_QUEUE_NOTIFY
from vmexit.accel.base import Notifier
from vmexit.arch.x86 import layout
from vmexit.core.bus import Bus
from vmexit.core.errors import HostError
from vmexit.core.irq import EdgeLine, EventfdLine, IrqChip, IrqLine
from vmexit.core.loop import EventLoop
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.mmio import MmioTransport


class VirtioSlots:
    """Where virtio devices are attached.

    With a `notifier` (KVM) the guest's notifications are eventfds that an event loop waits for, so
    that vCPUs go on meanwhile. Without, the vCPU that notifies does what there is to do.
    """

    def __init__(
        self,
        mmio: Bus,
        chip: IrqChip,
        memory: GuestMemory,
        loop: EventLoop,
        notifier: Notifier | None,
        on_close: Callable[[Callable[[], None]], object],
    ) -> None:
        """`on_close` takes what is to be called at the end, last first."""
        self._mmio = mmio
        self._chip = chip
        self._memory = memory
        self._loop = loop
        self._notifier = notifier
        self._on_close = on_close
        self._transports: list[MmioTransport] = []

    def attach(self, device: VirtioDevice) -> MmioTransport:
        """Give `device` the next place. Raises HostError."""
        number = len(self._transports)
        gpa = layout.VIRTIO_MMIO + number * layout.VIRTIO_MMIO_SIZE
        loop = self._loop
        if self._notifier is not None and device.waits:
            loop = loop.another()
            self._on_close(loop.close)
        irq = self._irq(layout.VIRTIO_GSIS[number])
        transport = MmioTransport(device, self._memory, irq, loop)
        transport.hold(True)
        self._mmio.attach(gpa, layout.VIRTIO_MMIO_SIZE, transport)
        if self._notifier is not None:
            for index in range(len(device.queue_sizes)):
                eventfd = self._eventfd()
                self._notifier.assign_ioeventfd(gpa + MMIO_QUEUE_NOTIFY, 4, index, eventfd)
                _Kick(loop, eventfd, transport, index).watch()
            self._on_close(loop.close)  # before the eventfds
        self._transports.append(transport)
        return transport

    def _irq(self, gsi: int) -> EdgeLine:
        if self._notifier is None:
            return IrqLine(self._chip, gsi)
        eventfd = self._eventfd()
        self._notifier.assign_irqfd(gsi, eventfd)
        return EventfdLine(eventfd)

    def _eventfd(self) -> int:
        try:
            eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as error:
            raise HostError(
                f"cannot make an eventfd: {error.strerror}; raise the limit (ulimit -n)"
            ) from error
        self._on_close(lambda: os.close(eventfd))
        return eventfd

    def running(self, runs: bool) -> None:
        """A run begins, or has ended: in between, no device does anything to the guest."""
        for transport in self._transports:
            transport.hold(not runs)


class _Kick:
    """The notifications of one queue."""

    def __init__(self, loop: EventLoop, eventfd: int, transport: MmioTransport, index: int) -> None:
        self._loop = loop
        self._eventfd = eventfd
        self._transport = transport
        self._index = index

    def watch(self) -> None:
        self._loop.watch(self._eventfd, self._arrived)

    def _arrived(self) -> None:
        os.eventfd_read(self._eventfd)
        self.watch()
        self._transport.kick(self._index)
