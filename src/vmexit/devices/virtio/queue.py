"""A split virtqueue (virtio 2.7): requests from the driver, and what was done about them.

All that lies in guest memory is the guest's to change at any time. So each value is read once, and
checked before it is used; a chain has a limit, in the descriptor table and in an indirect one.
"""

import struct
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from vmexit.abi.virtio import (
    AVAIL_F_NO_INTERRUPT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
)
from vmexit.core.bus import State
from vmexit.core.errors import GuestAddressError, VmexitError
from vmexit.core.memory import GuestMemory
from vmexit.core.rate import Limit
from vmexit.core.saved import Saved
from vmexit.core.words import words
from vmexit.devices.virtio.flow import Flow

_DESC = struct.Struct("<QIHH")  # address, length, flags, next
_U16 = struct.Struct("<H")
_USED = struct.Struct("<II")  # head of the chain, bytes written
_RING = 4  # offset of the entries in either ring: behind flags and index
_INDEX = 1  # the word of the index there

# A driver makes no chain longer than the queue (2.7.5.3.1); an indirect table may have more room.
MOST_SEGMENTS = 1024
"""Parts of a chain at most."""
_MOST_AT_ONCE = 256 << 20  # bytes, though one request may have more
_MASK16 = 0xFFFF
_MASK32 = 0xFFFF_FFFF


def _always() -> bool:
    return True


class QueueError(VmexitError):
    """The driver has broken the rules of a queue: the device needs a reset."""


class Chain(NamedTuple):
    """One request: views of the guest's own bytes, first those to read, then those to write."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]
    sources: list[tuple[int, int]]
    """GPA and size of each of `readable`."""
    ranges: list[tuple[int, int]]
    """GPA and size of each of `writable`."""

    def segments(self) -> list[tuple[int, int, bool]]:
        """GPA and size of each part, and whether it is to be written."""
        parts = [(gpa, size, False) for gpa, size in self.sources]
        return parts + [(gpa, size, True) for gpa, size in self.ranges]

    def size(self) -> int:
        """Bytes in all."""
        return sum(map(len, self.readable)) + self.writable_size()

    def writable_size(self) -> int:
        """Bytes that the device may write."""
        return sum(size for _, size in self.ranges)

    def read(self, most: int) -> bytes:
        """At most so many of the bytes to read."""
        parts, left = [], most
        for view in self.readable:
            parts.append(bytes(view[:left]))
            left -= len(parts[-1])
            if not left:
                break
        return b"".join(parts)

    def write(self, data: bytes) -> int:
        """Put `data` into the bytes to write, as far as they reach; how many that were."""
        done = 0
        for view in self.writable:
            part = data[done : done + len(view)]
            view[: len(part)] = part
            done += len(part)
        return done


def without_first(views: list[memoryview], size: int) -> list[memoryview]:
    """`views` behind their first `size` bytes, which they have."""
    for number, view in enumerate(views):
        if size < len(view):
            return [view[size:], *views[number + 1 :]]
        size -= len(view)
    return []


class Queue:
    """The device's half of one queue. Whoever uses it holds the lock of its device."""

    def __init__(
        self,
        memory: GuestMemory,
        size_max: int,
        interrupt: Callable[[], None],
        again: Callable[[int | None], None],
    ) -> None:
        """`interrupt` tells the driver that buffers were used; `again` has the device look whether
        there is more to do, at a time on the clock, or soon (None).
        """
        self._memory = memory
        self._interrupt = interrupt
        self._again = again
        # What orders a store before a later load of another word: x86 itself may swap these two,
        # but not across the locked instruction that this takes (Intel SDM vol. 3, 9.2.3.4).
        self._fence = threading.Lock()
        self.size_max = size_max
        self.flows: tuple[Flow, Flow] | None = None
        """Who counts what was done with bytes from the guest, and for it, if nobody else does."""
        self.limit: Limit | None = None
        """How much `serve()` does in a time."""
        self.reset()

    def reset(self) -> None:
        """Not ready, and all as after power-on."""
        self.size = self.size_max
        self.desc = self.driver = self.device = 0
        self.ready = False
        self._event_idx = False
        self._next_avail = 0  # of the driver's ring, free-running
        self._next_used = 0
        self._told = 0  # used index when the driver was last told, or chose not to be

    def enable(self, *, event_idx: bool) -> None:
        """The driver has set the queue up. Raises QueueError for what cannot be."""
        size = self.size
        if not 0 < size <= self.size_max or size & size - 1:
            raise QueueError(f"a queue of {size} entries cannot be")
        for at, alignment in ((self.desc, 16), (self.driver, 2), (self.device, 4)):
            if at % alignment:
                raise QueueError(f"a part of a queue at {at:#x} is not aligned")
        self._event_idx = event_idx
        event = 2 if event_idx else 0
        view = self._view
        self._desc = view(self.desc, DESC_SIZE * size)
        self._avail = view(self.driver, _RING + 2 * size + event)
        self._used = view(self.device, _RING + 8 * size + event, write=True)
        self._memory.exposed.add(self.device, len(self._used))
        self._used_words = words(self._used)
        self.ready = True

    def disable(self) -> None:
        """The driver takes the queue away."""
        self.ready = False

    def _view(self, gpa: int, size: int, *, write: bool = False) -> memoryview:
        try:
            region = self._memory.region(gpa, size)
        except GuestAddressError as error:
            raise QueueError(str(error)) from error
        if write and region.readonly:
            raise QueueError(f"the ROM at {gpa:#x} cannot be written")
        return region.part(gpa, size)

    # Requests.

    def serve(self, do: Callable[[Chain], int], may: Callable[[], bool] = _always) -> None:
        """Do what there is to do, and tell the driver; `do` returns how many bytes it has written.

        Before each request `may` is asked whether there is room for what comes of it.
        No more at a time than the queue holds, nor all too many bytes: a guest that asks for more
        all the time would hold up for ever who looks, and for long who wants to pause it. Raises
        QueueError.
        """
        left = _MOST_AT_ONCE
        for _ in range(self.size):
            if left <= 0:
                self._again(None)
                break
            if not may() or self.must_wait():
                break
            chain = self.pop()
            if chain is None:
                break
            size = chain.size()
            self.count(size)
            left -= size
            self.push(chain, do(chain))
        else:
            self._again(None)
        self.tell()

    def must_wait(self) -> bool:
        """Whether the limit forbids another request now: then `again` is called in time."""
        if self.limit is None or (later := self.limit.ready_at()) is None:
            return False
        if self.ready and self._avail_index() != self._next_avail:
            self.limit.waits_until(later)
        self._again(later)
        return True

    def count(self, size: int) -> None:
        """A request of `size` bytes counts for the limit."""
        if self.limit is not None:
            self.limit.take(size)

    def pop(self) -> Chain | None:
        """The next request, or None. Raises QueueError."""
        if not self.ready:
            return None
        index = self._avail_index()
        if index == self._next_avail:
            if not self._event_idx:
                return None
            # Say from where on a notification is wanted, and look again.
            self._used_words[_RING // 2 + 4 * self.size] = index
            with self._fence:
                pass
            index = self._avail_index()
            if index == self._next_avail:
                return None
        if index - self._next_avail & _MASK16 > self.size:
            raise QueueError(f"the driver's index {index} is more than the queue ahead")
        at = _RING + 2 * (self._next_avail & self.size - 1)
        head: int = _U16.unpack_from(self._avail, at)[0]
        chain = self._chain(head)
        self._next_avail = self._next_avail + 1 & _MASK16
        return chain

    def _avail_index(self) -> int:
        index: int = _U16.unpack_from(self._avail, 2)[0]
        return index

    def _chain(self, head: int) -> Chain:
        table, count, index = self._desc, self.size, head
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        sources: list[tuple[int, int]] = []
        ranges: list[tuple[int, int]] = []
        left = self.size
        indirect = False
        while True:
            if index >= count:
                raise QueueError(f"there is no descriptor {index}")
            gpa, size, flags, index = _DESC.unpack_from(table, DESC_SIZE * index)
            if flags & DESC_F_INDIRECT:
                if indirect or flags & DESC_F_NEXT or size % DESC_SIZE or not size:
                    raise QueueError(f"an indirect table of {size} bytes cannot be here")
                count = min(size // DESC_SIZE, MOST_SEGMENTS)
                left = min(count, MOST_SEGMENTS - len(readable) - len(writable))
                table, index, indirect = self._view(gpa, size), 0, True
                continue
            if left == 0:
                raise QueueError("a chain of descriptors has no end")
            left -= 1
            if not size:
                raise QueueError("a descriptor has no bytes")
            if flags & DESC_F_WRITE:
                writable.append(self._view(gpa, size, write=True))
                ranges.append((gpa, size))
            elif writable:
                raise QueueError("bytes to read come behind bytes to write")
            else:
                readable.append(self._view(gpa, size))
                sources.append((gpa, size))
            if not flags & DESC_F_NEXT:
                self._memory.may_write(ranges)  # however it ends
                return Chain(head, readable, writable, sources, ranges)

    def push(self, chain: Chain, written: int) -> None:
        """`chain` is done, and the first so many bytes of its writable part were written."""
        self.push_all(((chain, written),))

    def push_all(self, done: Iterable[tuple[Chain, int]]) -> None:
        """Likewise for several, which the driver sees at once; not after it has taken the queue."""
        if not self.ready:
            return
        for chain, written in done:
            self._memory.host_wrote(chain.ranges, written)
            if self.flows is not None:
                self._count_flows(chain, written, *self.flows)
            at = _RING + 8 * (self._next_used & self.size - 1)
            # Buffers may name the same memory many times, and have more than there is.
            _USED.pack_into(self._used, at, chain.head, min(written, _MASK32))
            self._next_used = self._next_used + 1 & _MASK16
        self._used_words[_INDEX] = self._next_used

    @staticmethod
    def _count_flows(chain: Chain, written: int, from_guest: Flow, to_guest: Flow) -> None:
        if chain.sources:
            from_guest.count(sum(size for _, size in chain.sources))
        if written:
            to_guest.count(written)

    def give_back(self, count: int) -> None:
        """The last `count` requests are not used after all: `pop()` gives them again."""
        self._next_avail = self._next_avail - count & _MASK16

    def tell(self) -> None:
        """Interrupt the driver, if anything was used and it wants to know (2.7.7)."""
        if not self.ready or self._next_used == self._told:
            return
        with self._fence:
            pass
        before, self._told = self._told, self._next_used
        if self._event_idx:
            event: int = _U16.unpack_from(self._avail, _RING + 2 * self.size)[0]
            wanted = self._next_used - event - 1 & _MASK16 < self._next_used - before & _MASK16
        else:
            wanted = not _U16.unpack_from(self._avail, 0)[0] & AVAIL_F_NO_INTERRUPT
        if wanted:
            self._interrupt()

    # State.

    def state(self) -> State:
        return {
            "size": self.size,
            "desc": self.desc,
            "driver": self.driver,
            "device": self.device,
            "ready": self.ready,
            "event_idx": self._event_idx,
            "next_avail": self._next_avail,
            "next_used": self._next_used,
            "told": self._told,
        }

    def restore(self, saved: Saved) -> None:
        """Raises ConfigError for what is no state of a queue."""
        top = (1 << 64) - 1
        size = saved.number("size", _MASK16)
        places = [saved.number(name, top) for name in ("desc", "driver", "device")]
        indices = [saved.number(name, _MASK16) for name in ("next_avail", "next_used", "told")]
        ready, event_idx = saved.flag("ready"), saved.flag("event_idx")
        self.reset()
        self.size = size
        self.desc, self.driver, self.device = places
        if ready:
            try:
                self.enable(event_idx=event_idx)
            except QueueError as error:
                raise saved.error() from error
        self._event_idx = event_idx
        self._next_avail, self._next_used, self._told = indices
