"""The firmware configuration device: what the machine tells its firmware, item by item.

As QEMU has it on a PC (its docs/specs/fw_cfg.rst): a selector and a data register at ports, and
DMA. All items are read-only.
"""

import struct
import threading
from collections.abc import Mapping

from vmexit.abi.fw_cfg import (
    DIRECTORY_COUNT,
    DIRECTORY_ENTRY,
    DMA_ACCESS,
    DMA_ERROR,
    DMA_KEY_SHIFT,
    DMA_READ,
    DMA_SELECT,
    DMA_SIGNATURE,
    DMA_SKIP,
    DMA_WRITE,
    FILE_DIR,
    FILE_FIRST,
    FILE_NAME_SIZE,
    ID,
    SIGNATURE,
    SIGNATURE_TEXT,
    VERSION_DMA,
    VERSION_TRADITIONAL,
    WRITE_CHANNEL,
)
from vmexit.core.bus import State
from vmexit.core.errors import ConfigError, GuestAddressError
from vmexit.core.memory import GuestMemory
from vmexit.core.saved import Saved

# Registers: the selector with the data register as its second byte, and the address for DMA.
SELECTOR, DATA, DMA_HIGH, DMA_LOW = 0, 1, 4, 8
SIZE = 12

# So many zeros behind the end of an item are written at most, so that an access takes bounded time.
MAX_FILL = 1 << 20

Item = bytes | memoryview


def directory(files: Mapping[str, Item]) -> tuple[bytes, dict[int, Item]]:
    """The directory of `files`, and their contents by key. Raises ConfigError for a bad name."""
    entries, items = [], {}
    for key, name in enumerate(sorted(files), FILE_FIRST):
        raw = name.encode("ascii", "replace")
        if not raw or len(raw) >= FILE_NAME_SIZE or not name.isascii() or b"\0" in raw:
            raise ConfigError(
                f"{name!r} cannot be the name of a firmware file; use up to "
                f"{FILE_NAME_SIZE - 1} ASCII characters"
            )
        entries.append(DIRECTORY_ENTRY.pack(len(files[name]), key, raw))
        items[key] = files[name]
    return DIRECTORY_COUNT.pack(len(entries)) + b"".join(entries), items


class FwCfg:
    """Selector at 0, data at 1, DMA address at 4 (high half) and 8 (low half).

    Any vCPU may enter: one lock, held while guest memory is written. What a guest asks for outside
    of its RAM, or far behind the end of an item, is an error that it is told of.
    """

    widths = (1, 2, 4)

    def __init__(
        self, memory: GuestMemory, items: Mapping[int, Item], files: Mapping[str, Item]
    ) -> None:
        """`items` by key, `files` by name; those that every such device has are added."""
        listed, by_key = directory(files)
        self._memory = memory
        self._items: dict[int, Item] = {
            **items,
            **by_key,
            SIGNATURE: SIGNATURE_TEXT,
            ID: struct.pack("<I", VERSION_TRADITIONAL | VERSION_DMA),
            FILE_DIR: listed,
        }
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        with self._lock:
            self._select(SIGNATURE)
            self._high = 0  # half of the address; the other one starts the transfer

    def _select(self, key: int) -> None:
        self._key = key
        self._item = self._items.get(key & ~WRITE_CHANNEL, b"")
        self._offset = 0

    # Registers.

    def read(self, offset: int, size: int) -> int:
        if offset <= DATA:
            # As the selector cannot be read, its byte gives data, too.
            return self._next() if size == 1 else 0
        if offset < DMA_HIGH:
            return (1 << 8 * size) - 1
        start = offset - DMA_HIGH
        return int.from_bytes(DMA_SIGNATURE[start : start + size], "little")

    def _next(self) -> int:
        with self._lock:
            if self._offset >= len(self._item):
                return 0
            value = self._item[self._offset]
            self._offset += 1
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset == SELECTOR and size == 2:
                self._select(value)
            elif size == 4 and offset in (DMA_HIGH, DMA_LOW):
                half = int.from_bytes(value.to_bytes(4, "little"), "big")
                if offset == DMA_HIGH:
                    self._high = half
                else:
                    at, self._high = self._high << 32 | half, 0
                    self._transfer(at)

    # DMA.

    def _transfer(self, at: int) -> None:
        """Do what the descriptor at GPA `at` says, and write there how it went."""
        try:
            control, length, address = DMA_ACCESS.unpack(self._memory.read(at, DMA_ACCESS.size))
        except GuestAddressError:
            self._put(at, DMA_ERROR.to_bytes(4, "big"))
            return
        if control & DMA_SELECT:
            self._select(control >> DMA_KEY_SHIFT)
        done = True
        if control & DMA_READ:
            done = self._copy(address, length)
        elif control & DMA_WRITE:
            done = length == 0  # every item is read-only
        elif control & DMA_SKIP:
            self._offset = min(self._offset + length, len(self._item))
        self._put(at, (0 if done else DMA_ERROR).to_bytes(4, "big"))

    def _copy(self, address: int, length: int) -> bool:
        """Copy the next `length` bytes of the item to GPA `address`: whether that was possible.

        Behind its end there are zeros.
        """
        data = memoryview(self._item)[self._offset : self._offset + length]
        zeros = length - len(data)
        if length == 0:
            return True
        if zeros > MAX_FILL or not self._is_ram(address, length):
            return False
        self._memory.write(address, data)
        if zeros:
            self._memory.write(address + len(data), bytes(zeros))
        self._offset += len(data)
        return True

    def _put(self, address: int, data: bytes) -> None:
        """Write `data` if there is RAM."""
        if self._is_ram(address, len(data)):
            self._memory.write(address, data)

    def _is_ram(self, address: int, size: int) -> bool:
        try:
            return not self._memory.region(address, size).readonly
        except GuestAddressError:
            return False

    # Saving.

    def state(self) -> State:
        """Without the items, which come from the configuration."""
        with self._lock:
            return {"version": 1, "key": self._key, "offset": self._offset, "high": self._high}

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        saved = Saved(state, "a firmware configuration device", 1)
        key, high = saved.number("key", 0xFFFF), saved.number("high", 0xFFFF_FFFF)
        offset = saved.number("offset", (1 << 32) - 1)
        with self._lock:
            self._select(key)
            self._offset, self._high = min(offset, len(self._item)), high
