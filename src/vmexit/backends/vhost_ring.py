"""The driver's half of split virtqueues (virtio 2.7) that another program serves.

What the guest offers is offered on, in rings of ours: the other program never sees the guest's own
rings, so what it does is known here, and can be told to whoever has to know.
"""

import ctypes
import mmap
import os
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress

from vmexit.abi.virtio import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    USED_F_NO_NOTIFY,
)
from vmexit.core.errors import HostError
from vmexit.core.memory import MEMFD_FLAGS, set_size
from vmexit.core.words import words

Segment = tuple[int, int, bool]
"""GPA, size, and whether the other side writes to it."""

SLOTS = 256
"""Entries of each ring: as many requests may be under way at once."""

_DESC = struct.Struct("<QIHH")  # address, length, flags, next
_U16 = struct.Struct("<H")
_USED = struct.Struct("<II")  # slot, bytes written
_MASK16 = 0xFFFF

# A request has one descriptor, for a table of its own, as large as a driver's may be.
_TABLE = 1024 * DESC_SIZE
_AVAIL = SLOTS * DESC_SIZE
_USED_AT = _AVAIL + 0x1000
_TABLES = _USED_AT + 0x1000
_RING_SIZE = _TABLES + SLOTS * _TABLE


class RingMemory:
    """Memory for rings, which another process can map."""

    def __init__(self, count: int, gpa: int) -> None:
        """For so many rings; `gpa` is where the other side shall think that it is."""
        self.gpa = gpa
        self.size = count * _RING_SIZE
        self.fd = -1
        self._view = memoryview(b"")
        self._pages: mmap.mmap | None = None
        try:
            self.fd = os.memfd_create("vmexit-rings", MEMFD_FLAGS)
            set_size(self.fd, self.size)
            self._pages = pages = mmap.mmap(self.fd, self.size)
        except OSError as error:
            self.close()
            raise HostError(f"cannot make rings: {error.strerror}; free memory") from error
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self._view = memoryview(pages)

    def ring(self, index: int) -> "DriverRing":
        """The ring with this number, empty."""
        at = index * _RING_SIZE
        return DriverRing(self._view[at : at + _RING_SIZE], self.hva + at, self.gpa + at)

    def close(self) -> None:
        """Nobody uses the rings any more."""
        self._view.release()
        if self._pages is not None:
            with suppress(BufferError):  # a ring is still held: the last one to go unmaps them
                self._pages.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class DriverRing:
    """One ring. The caller guards it."""

    def __init__(self, view: memoryview, hva: int, gpa: int) -> None:
        self._view = view
        self._words = words(view)
        self._gpa = gpa
        self.desc, self.avail, self.used = hva, hva + _AVAIL, hva + _USED_AT
        view[:_TABLES] = bytes(_TABLES)
        self._free = list(range(SLOTS))
        self._next_avail = self._next_used = 0
        self._fence = threading.Lock()  # see devices.virtio.queue

    def __len__(self) -> int:
        """Its entries."""
        return SLOTS

    @property
    def full(self) -> bool:
        """Whether there is no slot for another request."""
        return not self._free

    @property
    def idle(self) -> bool:
        """Whether all requests are done, though `done()` may have to tell of them."""
        used: int = _U16.unpack_from(self._view, _USED_AT + 2)[0]
        return used == self._next_avail

    def add(self, segments: Sequence[Segment]) -> int:
        """Offer a request; its slot. There is one, and there are 1024 segments at most."""
        slot = self._free.pop()
        view, table = self._view, _TABLES + slot * _TABLE
        last = len(segments) - 1
        for number, (gpa, size, writes) in enumerate(segments):
            flags = DESC_F_WRITE * writes | DESC_F_NEXT * (number < last)
            at = table + number * DESC_SIZE
            _DESC.pack_into(view, at, gpa, size, flags, number + 1 if number < last else 0)
        size = len(segments) * DESC_SIZE
        _DESC.pack_into(view, slot * DESC_SIZE, self._gpa + table, size, DESC_F_INDIRECT, 0)
        _U16.pack_into(view, _AVAIL + 4 + 2 * (self._next_avail % SLOTS), slot)
        self._next_avail = self._next_avail + 1 & _MASK16
        self._words[_AVAIL // 2 + 1] = self._next_avail
        return slot

    def wants_kick(self) -> bool:
        """Whether the other side asks to be told of requests."""
        with self._fence:
            pass
        flags: int = _U16.unpack_from(self._view, _USED_AT)[0]
        return not flags & USED_F_NO_NOTIFY

    def done(self) -> list[tuple[int, int]]:
        """Slots of requests that are done, and how many bytes were written; they are free again.

        Raises HostError for what a device may not do.
        """
        end: int = _U16.unpack_from(self._view, _USED_AT + 2)[0]
        found: list[tuple[int, int]] = []
        if end - self._next_used & _MASK16 > SLOTS - len(self._free):
            raise HostError("it has done more than it was asked for; use another back end")
        while self._next_used != end:
            at = _USED_AT + 4 + 8 * (self._next_used % SLOTS)
            slot, written = _USED.unpack_from(self._view, at)
            if slot >= SLOTS or slot in self._free:
                raise HostError(f"it has done {slot}, which was not asked for; use another")
            self._free.append(slot)
            found.append((slot, written))
            self._next_used = self._next_used + 1 & _MASK16
        return found
