"""KVM's dirty rings: in each, the pages that one vCPU has written to (KVM API 8.29).

What is read of a ring is what is new, however large memory is; a log has to be read whole.
"""

import mmap
import threading
from ctypes import sizeof
from fcntl import ioctl

from vmexit.abi.kvm_caps import KVM_CAP_DIRTY_LOG_RING
from vmexit.abi.kvm_state import (
    KVM_DIRTY_GFN_F_DIRTY,
    KVM_DIRTY_GFN_F_RESET,
    KVM_DIRTY_LOG_PAGE_OFFSET,
    KVM_RESET_DIRTY_RINGS,
    kvm_dirty_gfn,
)
from vmexit.accel.kvm.dirty_log import empty_bitmap, enable
from vmexit.accel.kvm.system import System
from vmexit.core.errors import HostError

_ENTRY = sizeof(kvm_dirty_gfn)
_WORDS, _QUADS = _ENTRY // 4, _ENTRY // 8
_SLOT: int = kvm_dirty_gfn.slot.offset // 4
_OFFSET: int = kvm_dirty_gfn.offset.offset // 8
_SLOT_BITS = 0xFFFF  # above them is the address space, of which we have one


def most_entries(system: System) -> int:
    """How many a ring can have; 0 where this KVM has none."""
    return system.check_extension(KVM_CAP_DIRTY_LOG_RING) // _ENTRY


class _Ring:
    """That of one vCPU."""

    def __init__(self, vcpu: int, entries: int) -> None:
        size = entries * _ENTRY
        self._pages = mmap.mmap(vcpu, size, offset=KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE)
        self.words = memoryview(self._pages).cast("I")
        self.quads = memoryview(self._pages).cast("Q")
        self.next = 0  # the entry that is to come
        self.taken = 0  # so many since KVM had all of them back

    def close(self) -> None:
        self.words.release()
        self.quads.release()
        self._pages.close()


class DirtyRings:
    """All rings of a VM, and the pages of its slots that they have told of. Any thread may ask."""

    def __init__(self, vm: int, entries: int) -> None:
        """`entries` for each vCPU, a power of two; before there is any. Raises HostError."""
        try:
            enable(vm, KVM_CAP_DIRTY_LOG_RING, entries * _ENTRY)
        except OSError as error:
            raise HostError(
                f"KVM refused dirty rings of {entries} entries: {error.strerror}; use a larger "
                "dirty_ring, or none"
            ) from error
        self._vm = vm
        self._entries = entries
        self._rings: list[_Ring] = []
        self._written: dict[int, bytearray] = {}  # by the slot, a bit for each page
        self._told: dict[int, bytes] = {}  # the same, as it was told last
        self._changed: set[int] = set()  # where it may not be like that any more
        self._overflown = False
        self._lock = threading.Lock()

    def add(self, vcpu: int) -> None:
        """The ring of the vCPU with this descriptor, too. Raises OSError."""
        self._rings.append(_Ring(vcpu, self._entries))

    def log(self, slot: int, pages: int) -> "RingLog":
        """What is written in `slot`, mapped with KVM_MEM_LOG_DIRTY_PAGES, from now on."""
        with self._lock:
            if slot not in self._written:  # else KVM may still hold back what is in there
                self._written[slot] = empty_bitmap(pages)
                self._told[slot] = bytes(self._written[slot])
        return RingLog(self, slot)

    def written(self, slot: int) -> bytes:
        """See `RingLog.read()`."""
        with self._lock:
            self._collect()
            if slot in self._changed:
                self._changed.remove(slot)
                if self._told[slot] != self._written[slot]:
                    self._told[slot] = bytes(self._written[slot])
            return self._told[slot]

    def forget(self, slot: int) -> None:
        """See `RingLog.forget()`."""
        with self._lock:
            written, told = self._written[slot], self._told[slot]
            left = int.from_bytes(written, "little") & ~int.from_bytes(told, "little")
            written[:] = left.to_bytes(len(written), "little")
            self._changed.add(slot)
            self._reset()

    def make_room(self) -> None:
        """A vCPU's ring is full (KVM_EXIT_DIRTY_RING_FULL): take what is in there. HostError."""
        with self._lock:
            self._collect()
            self._reset()

    def _collect(self) -> None:
        last = self._entries - 1
        for ring in self._rings:
            at, words = ring.next, ring.words
            for _ in range(self._entries):
                if not words[at * _WORDS] & KVM_DIRTY_GFN_F_DIRTY:
                    break
                slot = words[at * _WORDS + _SLOT] & _SLOT_BITS
                self._note(slot, ring.quads[at * _QUADS + _OFFSET])
                words[at * _WORDS] = KVM_DIRTY_GFN_F_RESET
                at = at + 1 & last
                ring.taken += 1
            ring.next = at
            # KVM ends a run before a ring is full. One that emulates much at a time may not, and
            # then overwrites entries: of those that nobody has read nothing is known.
            self._overflown |= ring.taken >= self._entries
        if self._overflown:
            raise HostError(
                "KVM let a dirty ring overflow, so that it is not known what was written; leave "
                "out dirty_ring"
            )

    def _note(self, slot: int, page: int) -> None:
        bitmap = self._written.get(slot)
        if bitmap is None or page >> 3 >= len(bitmap):
            return
        bit = 1 << (page & 7)
        if not bitmap[page >> 3] & bit:  # who emulates tells of the same ones again and again
            bitmap[page >> 3] |= bit
            self._changed.add(slot)

    def _reset(self) -> None:
        """KVM has back what was collected, and tells of these pages when they are written again."""
        while True:
            try:
                ioctl(self._vm, KVM_RESET_DIRTY_RINGS)
                break
            except InterruptedError:  # by a signal, and some entries may be left
                continue
            except OSError as error:
                raise HostError(
                    f"KVM does not take its dirty rings back: {error.strerror}; make a new machine"
                ) from error
        for ring in self._rings:
            ring.taken = 0

    def close(self) -> None:
        """Before the vCPUs are."""
        for ring in self._rings:
            ring.close()
        self._rings.clear()


class RingLog:
    """The pages of one slot: as `SlotLog`, from rings."""

    def __init__(self, rings: DirtyRings, slot: int) -> None:
        self._rings = rings
        self._slot = slot

    def read(self) -> bytes:
        """A bit for each page that was written since it was forgotten, the lowest first.

        The same object as long as it is the same pages.
        """
        return self._rings.written(self._slot)

    def forget(self) -> None:
        """The pages that `read()` has given are told of when they are written again."""
        self._rings.forget(self._slot)
