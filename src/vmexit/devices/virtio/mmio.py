"""Virtio over MMIO (virtio 4.2), version 2: the registers between a driver and one device.

Interrupts are edges: the driver learns from InterruptStatus what they are for, and what comes
between its look and its acknowledgement makes another edge.
"""

import threading
from collections.abc import Callable
from functools import partial

from vmexit.abi import virtio as v
from vmexit.core.bus import State
from vmexit.core.clock import Clock
from vmexit.core.errors import ConfigError
from vmexit.core.irq import EdgeLine
from vmexit.core.memory import GuestMemory
from vmexit.core.saved import Saved
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.flow import Flow
from vmexit.devices.virtio.queue import Queue, QueueError

_VENDOR = int.from_bytes(b"VMEX", "little")
_COMMON = 1 << v.F_VERSION_1 | 1 << v.F_INDIRECT_DESC | 1 << v.F_EVENT_IDX
_LOW32 = 0xFFFF_FFFF

# The three parts of a queue, by the register of their lower half.
_PARTS = {
    v.MMIO_QUEUE_DESC_LOW: "desc",
    v.MMIO_QUEUE_DRIVER_LOW: "driver",
    v.MMIO_QUEUE_DEVICE_LOW: "device",
}
_SHM = (v.MMIO_SHM_LEN_LOW, v.MMIO_SHM_LEN_HIGH, v.MMIO_SHM_BASE_LOW, v.MMIO_SHM_BASE_HIGH)


class MmioTransport:
    """Any vCPU and the event loop may enter at any time. One lock, held while the device works."""

    widths = (1, 2, 4)

    def __init__(
        self, device: VirtioDevice, memory: GuestMemory, irq: EdgeLine, clock: Clock
    ) -> None:
        self.device = device
        device.transport = self
        self._irq = irq
        self._lock = threading.RLock()  # a device tells of its configuration from within a call
        self._offered = device.features | _COMMON
        self._queues = [
            Queue(memory, size, self._used, self._kick_later(index, clock))
            for index, size in enumerate(device.queue_sizes)
        ]
        self.flows = device.flows
        """How much has gone through the device; any thread may read."""
        if not self.flows:
            self.flows = both = (Flow("from_guest"), Flow("to_guest"))
            for queue in self._queues:
                queue.flows = both
        self._notify = [partial(device.notify, i) for i in range(len(self._queues))]
        self.driven = False
        """Whether a driver was ready once."""
        self._held = self._closed = False
        self._waiting: dict[Callable[[], None], None] = {}  # in this order, each once
        self._generation = 0
        self._clear()

    def _clear(self) -> None:
        self._status = 0
        self._accepted = 0
        self._device_sel = self._driver_sel = self._queue_sel = 0
        self._interrupts = 0

    def reset(self) -> None:
        """As after power-on, and as the driver asks by writing 0 to Status (4.2.2.1)."""
        with self._lock:
            self.device.reset()
            for queue in self._queues:
                queue.reset()
            self._waiting.clear()
            self._clear()

    def _kick_later(self, index: int, clock: Clock) -> Callable[[int | None], None]:
        timer = clock.timer(lambda: self.kick(index))
        return lambda when: timer.set(clock.now() if when is None else when)

    # Counters.

    @property
    def waited_ns(self) -> int | None:
        """How long limits have held requests back; None where there can be none."""
        limits = {self.device.limit, *(queue.limit for queue in self._queues)} - {None}
        return sum(limit.waited_ns for limit in limits if limit is not None) if limits else None

    # Interrupts.

    def _used(self) -> None:
        self._raise(v.INTERRUPT_USED)

    def config_changed(self) -> None:
        """The device's configuration is another one now; from any thread."""
        with self._lock:
            self._generation = self._generation + 1 & _LOW32
            if self._status & v.DRIVER_OK:
                self._raise(v.INTERRUPT_CONFIG)

    def _raise(self, why: int) -> None:
        self._interrupts |= why
        if not self._closed:
            self._irq.pulse()

    def _break(self) -> None:
        """The driver has broken the rules: only a reset helps (2.1.2)."""
        self._status |= v.NEEDS_RESET
        if self._status & v.DRIVER_OK:
            self._raise(v.INTERRUPT_CONFIG)

    # Registers.

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            if offset >= v.MMIO_CONFIG:
                at = offset - v.MMIO_CONFIG
                data = self.device.config()[at : at + size]
                return int.from_bytes(data, "little")
            return self._read(offset) if size == 4 and offset % 4 == 0 else 0

    def _read(self, offset: int) -> int:
        queue = self._queue()
        if offset == v.MMIO_INTERRUPT_STATUS:
            return self._interrupts
        if offset == v.MMIO_STATUS:
            return self._status
        if offset == v.MMIO_QUEUE_READY:
            return int(queue is not None and queue.ready)
        if offset == v.MMIO_QUEUE_SIZE_MAX:
            return queue.size_max if queue is not None else 0
        if offset == v.MMIO_DEVICE_FEATURES:
            return self._offered >> 32 * self._device_sel & _LOW32 if self._device_sel < 2 else 0
        if offset in _SHM:
            return _LOW32  # there is no such region (4.2.2.1)
        return {
            v.MMIO_MAGIC_VALUE: v.MAGIC,
            v.MMIO_VERSION: 2,
            v.MMIO_DEVICE_ID: self.device.device_id,
            v.MMIO_VENDOR_ID: _VENDOR,
            v.MMIO_CONFIG_GENERATION: self._generation,
        }.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset >= v.MMIO_CONFIG:
                at = offset - v.MMIO_CONFIG
                if at + size <= len(self.device.config()):
                    self.device.write_config(at, value.to_bytes(size, "little"))
            elif size == 4 and offset % 4 == 0:
                self._write(offset, value)

    def _write(self, offset: int, value: int) -> None:
        if offset == v.MMIO_QUEUE_NOTIFY:
            self.kick(value)
        elif offset == v.MMIO_INTERRUPT_ACK:
            self._interrupts &= ~value
        elif offset == v.MMIO_STATUS:
            self._set_status(value & 0xFF)
        elif offset == v.MMIO_QUEUE_SEL:
            self._queue_sel = value
        elif offset == v.MMIO_DEVICE_FEATURES_SEL:
            self._device_sel = value
        elif offset == v.MMIO_DRIVER_FEATURES_SEL:
            self._driver_sel = value
        elif offset == v.MMIO_DRIVER_FEATURES:
            if self._driver_sel < 2 and not self._status & v.FEATURES_OK:
                shift = 32 * self._driver_sel
                self._accepted = self._accepted & ~(_LOW32 << shift) | value << shift
        else:
            self._set_up_queue(offset, value)

    def _queue(self) -> Queue | None:
        return self._queues[self._queue_sel] if self._queue_sel < len(self._queues) else None

    def _set_up_queue(self, offset: int, value: int) -> None:
        queue = self._queue()
        if queue is None:
            return
        if offset == v.MMIO_QUEUE_READY:
            if not value & 1:
                queue.disable()
            elif not queue.ready and self._status & v.FEATURES_OK:
                try:
                    queue.enable(event_idx=bool(self._accepted >> v.F_EVENT_IDX & 1))
                except QueueError:
                    self._break()
        elif queue.ready:
            return  # its parts stay where they are (4.2.2.2)
        elif offset == v.MMIO_QUEUE_SIZE:
            queue.size = value & 0xFFFF
        elif (part := _PARTS.get(offset & ~7)) is not None and offset & 3 == 0:
            shift = 8 * (offset & 4)
            kept = getattr(queue, part) & ~(_LOW32 << shift)
            setattr(queue, part, kept | value << shift)

    def _set_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        new = value & ~self._status  # bits are set one after the other, and none is taken back
        if new & v.FEATURES_OK and (
            self._accepted & ~self._offered or not self._accepted >> v.F_VERSION_1 & 1
        ):
            new &= ~v.FEATURES_OK  # the driver looks whether it stays (3.1.1)
        if new & v.DRIVER_OK and not (self._status | new) & v.FEATURES_OK:
            new &= ~v.DRIVER_OK  # too early (3.1.1): nothing is agreed yet
        self._status |= new & ~v.NEEDS_RESET
        if new & v.DRIVER_OK:
            self._activate()

    def _activate(self) -> None:
        """The driver is ready. It may have offered buffers before, when nobody looked (3.1.1)."""
        self.driven = True
        self.device.activate(self._queues, self._accepted)
        for index in range(len(self._queues)):
            self.kick(index)

    def kick(self, index: int) -> None:
        """There may be requests in queue `index`; from any thread."""
        if index < len(self._notify):
            self.enter(self._notify[index])

    def enter(self, function: Callable[[], None]) -> None:
        """See `vmexit.devices.virtio.device.Transport`."""
        with self._lock:
            if self._held:
                self._waiting[function] = None
                return
            ready = v.DRIVER_OK | v.FEATURES_OK
            if self._status & (ready | v.NEEDS_RESET) != ready:
                return
            try:
                function()
            except QueueError:
                self._break()

    def hold(self, held: bool) -> None:
        """While `held` the device does nothing to the guest: what it is called for waits."""
        with self._lock:
            if held and not self._held:
                self._held = True
                self.device.settle()
            self._held = held
            waiting, self._waiting = self._waiting, {}
            for function in waiting:
                self.enter(function)

    def close(self) -> None:
        """The machine ends: who still holds the device does nothing to it any more."""
        with self._lock:
            self._held = self._closed = True
            self._waiting.clear()

    # State.

    def state(self) -> State:
        """Raises ConfigError if what is behind the device cannot be saved."""
        with self._lock:
            self._require_saved()
            return {
                "version": 1,
                "device": self.device.state(),
                "status": self._status,
                "accepted": self._accepted,
                "selected": [self._device_sel, self._driver_sel, self._queue_sel],
                "interrupts": self._interrupts,
                "generation": self._generation,
                "queues": {str(i): queue.state() for i, queue in enumerate(self._queues)},
            }

    def require_fits(self, state: State) -> None:
        """Raises ConfigError if what is behind the device is not what `state` was saved with."""
        device = state.get("device")
        if not isinstance(device, dict):
            raise Saved(state, "a virtio device over MMIO", 1).error()
        self.device.require_fits(device)

    def _require_saved(self) -> None:
        if why := self.device.unsaved:
            raise ConfigError(why)

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        saved = Saved(state, "a virtio device over MMIO", 1)
        status, accepted = saved.number("status", 0xFF), saved.number("accepted", (1 << 64) - 1)
        selected = saved.numbers("selected", _LOW32, 3)
        interrupts = saved.number("interrupts", 3)
        generation = saved.number("generation", _LOW32)
        queues, device = saved.part("queues"), state.get("device")
        agreed = status & v.FEATURES_OK
        wrong = accepted & ~self._offered if agreed else status & v.DRIVER_OK
        if not isinstance(device, dict) or wrong:
            raise saved.error()
        with self._lock:
            self.reset()
            self._require_saved()
            for index, queue in enumerate(self._queues):
                queue.restore(queues.part(str(index)))
            self.device.restore(device)
            self._status, self._accepted = status, accepted
            self._device_sel, self._driver_sel, self._queue_sel = selected
            self._interrupts, self._generation = interrupts, generation
            if interrupts:  # its edge may have been on the way: one more does no harm
                self._raise(0)
            ready = v.DRIVER_OK | v.FEATURES_OK
            if status & ready == ready:
                self._activate()
