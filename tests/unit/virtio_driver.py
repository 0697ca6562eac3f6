"""A driver for a virtio device over MMIO, small enough to be wrong on purpose."""

import struct

from fakes import ManualClock

from vmexit.abi import virtio as v
from vmexit.core.irq import IrqLine
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.mmio import MmioTransport

F_ALL = (1 << 64) - 1


class Lines:
    """An interrupt controller that counts the edges of each input."""

    def __init__(self) -> None:
        self.edges = 0
        self._level = False

    def set_level(self, gsi: int, level: bool) -> None:
        self.edges += level and not self._level
        self._level = level


class Ring:
    """The driver's half of a queue, at a place in memory of 64 KiB; buffers are above."""

    def __init__(self, memory: GuestMemory, at: int, size: int, event_idx: bool) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.desc, self.avail, self.used = at, at + 0x4000, at + 0x8000
        self.index = self.seen = 0

    def describe(self, number: int, gpa: int, size: int, flags: int = 0, after: int = 0) -> None:
        at = self.desc + 16 * number
        self.memory.write(at, struct.pack("<QIHH", gpa, size, flags, after))

    def offer(self, *heads: int) -> None:
        """Make chains available."""
        for head in heads:
            self.memory.write_u16(self.avail + 4 + 2 * (self.index % self.size), head)
            self.index = self.index + 1 & 0xFFFF
        self.memory.write_u16(self.avail + 2, self.index)

    def chain(self, out: list[tuple[int, int]], into: list[tuple[int, int]], first: int = 0) -> int:
        """A chain of direct descriptors, from number `first`; its head."""
        parts = [(gpa, size, 0) for gpa, size in out]
        parts += [(gpa, size, v.DESC_F_WRITE) for gpa, size in into]
        for number, (gpa, size, flags) in enumerate(parts, first):
            last = number == first + len(parts) - 1
            self.describe(number, gpa, size, flags | (0 if last else v.DESC_F_NEXT), number + 1)
        return first

    def done(self) -> list[tuple[int, int]]:
        """Heads and lengths of what was used since the last call."""
        end = self.memory.read_u16(self.used + 2)
        found = []
        while self.seen != end:
            at = self.used + 4 + 8 * (self.seen % self.size)
            found.append((self.memory.read_u32(at), self.memory.read_u32(at + 4)))
            self.seen = self.seen + 1 & 0xFFFF
        return found

    def want_interrupt_at(self, index: int) -> None:
        self.memory.write_u16(self.avail + 4 + 2 * self.size, index)


class Driver:
    """Sets a device up as Linux does."""

    def __init__(self, device, memory: GuestMemory, clock: ManualClock | None = None) -> None:
        self.lines = Lines()
        self.memory = memory
        self.clock = clock or ManualClock()
        self.registers = MmioTransport(device, memory, IrqLine(self.lines, 5), self.clock)
        self.device = device
        self.rings: list[Ring] = []

    def get(self, register: int) -> int:
        return self.registers.read(register, 4)

    def set(self, register: int, value: int) -> None:
        self.registers.write(register, 4, value)

    def features(self) -> int:
        value = 0
        for half in (0, 1):
            self.set(v.MMIO_DEVICE_FEATURES_SEL, half)
            value |= self.get(v.MMIO_DEVICE_FEATURES) << 32 * half
        return value

    def accept(self, features: int) -> bool:
        """Up to FEATURES_OK; whether the device agrees."""
        self.set(v.MMIO_STATUS, 0)
        self.set(v.MMIO_STATUS, v.ACKNOWLEDGE)
        self.set(v.MMIO_STATUS, v.ACKNOWLEDGE | v.DRIVER)
        for half in (0, 1):
            self.set(v.MMIO_DRIVER_FEATURES_SEL, half)
            self.set(v.MMIO_DRIVER_FEATURES, features >> 32 * half & 0xFFFF_FFFF)
        self.set(v.MMIO_STATUS, v.ACKNOWLEDGE | v.DRIVER | v.FEATURES_OK)
        return bool(self.get(v.MMIO_STATUS) & v.FEATURES_OK)

    def start(self, features: int = F_ALL, size: int = 16, at: int = 0x1_0000) -> None:
        """All queues with `size` entries, and DRIVER_OK."""
        accepted = self.features() & features | 1 << v.F_VERSION_1
        assert self.accept(accepted)
        event_idx = bool(accepted >> v.F_EVENT_IDX & 1)
        self.rings = []
        for number, most in enumerate(self.device.queue_sizes):
            ring = Ring(self.memory, at + 0x1_0000 * number, min(size, most), event_idx)
            for place in (ring.desc, ring.avail, ring.used):
                self.memory.write(place, bytes(0x4000))
            self.rings.append(ring)
            self.set(v.MMIO_QUEUE_SEL, number)
            self.set(v.MMIO_QUEUE_SIZE, ring.size)
            self.place(ring.desc, ring.avail, ring.used)
            self.set(v.MMIO_QUEUE_READY, 1)
            assert self.get(v.MMIO_QUEUE_READY) == 1
        self.set(v.MMIO_STATUS, self.get(v.MMIO_STATUS) | v.DRIVER_OK)

    def place(self, desc: int, avail: int, used: int) -> None:
        """Say where the parts of the selected queue are."""
        for register, gpa in (
            (v.MMIO_QUEUE_DESC_LOW, desc),
            (v.MMIO_QUEUE_DRIVER_LOW, avail),
            (v.MMIO_QUEUE_DEVICE_LOW, used),
        ):
            self.set(register, gpa & 0xFFFF_FFFF)
            self.set(register + 4, gpa >> 32)

    def kick(self, number: int = 0) -> None:
        self.set(v.MMIO_QUEUE_NOTIFY, number)

    @property
    def broken(self) -> bool:
        return bool(self.get(v.MMIO_STATUS) & v.NEEDS_RESET)
