"""The bus: which device answers at which address. One class serves port I/O and MMIO.

The bus owns what devices should not have to know: their address, accesses wider than they
implement, string I/O, and what happens where nobody answers (reads give all ones, writes are
ignored, both are counted).
"""

import struct
from bisect import bisect_right
from collections.abc import Callable
from typing import Protocol

from vmexit.core.errors import ConfigError
from vmexit.core.listeners import Listeners

Read = Callable[[int, int], int]
Write = Callable[[int, int, int], None]

# Plain data: numbers, strings, bytes, and lists and dicts of them.
State = dict[str, object]

_FORMATS = {1: "B", 2: "<%dH", 4: "<%dI"}


class RegisterBlock(Protocol):
    """Registers at offsets, as a bus reaches them. They know neither address nor bus."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Access sizes in bytes that it implements; the bus makes wider ones from these."""
        ...

    def read(self, offset: int, size: int) -> int:
        """The register at `offset`."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """Store `value` in the register at `offset`."""
        ...


class Stateful(Protocol):
    """What can be reset, saved and restored."""

    def reset(self) -> None:
        """Back to the state after power-on."""
        ...

    def state(self) -> State:
        """All guest-visible state, as plain versioned data."""
        ...

    def restore(self, state: State) -> None:
        """Take over what `state()` gave."""
        ...


class Device(RegisterBlock, Stateful, Protocol):
    """The guest side of a device."""


class Bus:
    """An address space of devices.

    Devices are attached and detached while no vCPU runs, or from within an access; look-ups may
    come from any thread, and see the devices as they were before or as they are after.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.unclaimed_reads = 0
        self.unclaimed_writes = 0
        # Both in one tuple that is replaced as a whole: a look-up never sees half a change.
        self._table: tuple[list[int], list[_Range]] = ([], [])
        self._listeners: list[Callable[[], None]] = []
        self._watches: Listeners[tuple[int, Callable[[], None]]] = Listeners()
        self.generation = 0
        """How often devices were attached or detached."""

    def attach(
        self,
        base: int,
        size: int,
        device: RegisterBlock,
        *,
        overhang: bool = False,
        name: str = "",
    ) -> None:
        """Let `device` answer at `[base, base + size)`. Raises ConfigError on overlap.

        With `overhang`, an access that begins in the range and reaches beyond it is the device's
        as a whole; without, the bus splits it. `name` is what traces call it.
        """
        end = base + size
        if size <= 0 or base < 0:
            raise ConfigError(f"{self.name} {base:#x}+{size} is no range; use a size above 0")
        _, ranges = self._table
        for start, stop, other, _, _ in ranges:
            if base < stop and start < end:
                raise ConfigError(
                    f"{self.name} {base:#x}..{end - 1:#x} ({_name(device)}) overlaps "
                    f"{start:#x}..{stop - 1:#x} ({_name(other)}); give one another address"
                )
        self._replace(sorted([*ranges, (base, end, device, overhang, name)], key=_base))

    def detach(self, base: int) -> None:
        """Take away the device attached at `base`. Raises ConfigError where there is none."""
        starts, ranges = self._table
        if base not in starts:
            raise ConfigError(f"nothing is attached to {self.name} {base:#x}; see devices()")
        self._replace([entry for entry in ranges if entry[0] != base])

    def _replace(self, ranges: list["_Range"]) -> None:
        self._table = ([entry[0] for entry in ranges], ranges)
        self._changed()

    def _changed(self) -> None:
        self.generation += 1  # before the listeners: see `KvmVcpu._io`
        for listener in self._listeners:
            listener()

    def watch(self, address: int, tell: Callable[[], None]) -> Callable[[], None]:
        """Call `tell` behind each access that includes `address`; returns what ends that.

        To be called, and ended, as `attach()`. What the kernel takes care of is no access here.
        """
        take_away = self._watches.add((address, tell))
        self._changed()

        def end() -> None:
            take_away()
            self._changed()

        return end

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the answers of `route_read`/`route_write` may differ."""
        self._listeners.append(listener)

    def devices(self) -> list[tuple[int, int, RegisterBlock]]:
        """`(base, size, device)` for each, by address."""
        return [(base, end - base, device) for base, end, device, _, _ in self._table[1]]

    def name_at(self, address: int) -> str:
        """The name of the device that answers at `address`; empty where none does."""
        starts, ranges = self._table
        index = bisect_right(starts, address) - 1
        if index < 0 or address >= ranges[index][1]:
            return ""
        _, _, device, _, name = ranges[index]
        return name or _name(device)

    def read(self, address: int, size: int) -> int:
        """What the guest reads at `address`."""
        read, offset = self.route_read(address, size)
        return read(offset, size)

    def write(self, address: int, size: int, value: int) -> None:
        """The guest writes `value` at `address`."""
        write, offset = self.route_write(address, size)
        write(offset, size, value)

    def read_string(self, address: int, size: int, count: int) -> bytes:
        """`count` elements of `size` bytes from one port, as INS does."""
        read, offset = self.route_read(address, size)
        values = [read(offset, size) for _ in range(count)]
        return bytes(values) if size == 1 else struct.pack(_FORMATS[size] % count, *values)

    def write_string(self, address: int, size: int, data: bytes) -> None:
        """The elements of `size` bytes in `data` to one port, as OUTS does."""
        write, offset = self.route_write(address, size)
        values = data if size == 1 else struct.unpack(_FORMATS[size] % (len(data) // size), data)
        for value in values:
            write(offset, size, value)

    def route_read(self, address: int, size: int) -> tuple[Read, int]:
        """The function that answers a read, and the offset to give it."""
        read, offset = self._answer(address, size)
        tell = self._watching(address, size)
        if not tell:
            return read, offset

        def watched(offset: int, size: int) -> int:
            value = read(offset, size)
            for one in tell:
                one()
            return value

        return watched, offset

    def _answer(self, address: int, size: int) -> tuple[Read, int]:
        found = self._find(address, size)
        if found is not None:
            device, offset = found
            return device.read, offset
        return (self._split_read if self._touches(address, size) else self._no_read), address

    def _watching(self, address: int, size: int) -> list[Callable[[], None]]:
        return [tell for at, tell in self._watches if address <= at < address + size]

    def route_write(self, address: int, size: int) -> tuple[Write, int]:
        """The function that takes a write, and the offset to give it."""
        write, offset = self._taker(address, size)
        tell = self._watching(address, size)
        if not tell:
            return write, offset

        def watched(offset: int, size: int, value: int) -> None:
            write(offset, size, value)
            for one in tell:
                one()

        return watched, offset

    def _taker(self, address: int, size: int) -> tuple[Write, int]:
        found = self._find(address, size)
        if found is not None:
            device, offset = found
            return device.write, offset
        return (self._split_write if self._touches(address, size) else self._no_write), address

    def _find(self, address: int, size: int) -> tuple[RegisterBlock, int] | None:
        starts, ranges = self._table
        index = bisect_right(starts, address) - 1
        if index < 0:
            return None
        base, end, device, overhang, _ = ranges[index]
        if address + (1 if overhang else size) > end or size not in device.widths:
            return None
        return device, address - base

    def _touches(self, address: int, size: int) -> bool:
        """Whether a device would answer a part of the access, so that splitting it is worth it."""
        if size == 1:
            return False
        return any(base < address + size and address < end for base, end, _, _, _ in self._table[1])

    def _split_read(self, address: int, size: int) -> int:
        low = _half(size)
        value = self.read(address, low)
        return value | self.read(address + low, size - low) << 8 * low

    def _split_write(self, address: int, size: int, value: int) -> None:
        low = _half(size)
        self.write(address, low, value & (1 << 8 * low) - 1)
        self.write(address + low, size - low, value >> 8 * low)

    def _no_read(self, address: int, size: int) -> int:
        self.unclaimed_reads += 1
        return (1 << 8 * size) - 1

    def _no_write(self, address: int, size: int, value: int) -> None:
        self.unclaimed_writes += 1


# Base, end, device, whether it takes accesses that reach beyond the end, its name in traces.
_Range = tuple[int, int, RegisterBlock, bool, str]


def _base(entry: _Range) -> int:
    return entry[0]


def _name(device: RegisterBlock) -> str:
    """How a message calls it: by its class, or the device of which it is a part."""
    kind = type(device)
    if kind.__name__.startswith("_"):
        return f"a part of {kind.__module__.rpartition('.')[2]}"
    return kind.__name__


def _half(size: int) -> int:
    """The largest power of two below `size`: 8 → 4, 3 → 2, 2 → 1."""
    return 1 << (size - 1).bit_length() - 1
