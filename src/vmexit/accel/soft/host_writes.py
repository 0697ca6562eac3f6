"""What devices write to guest memory, for an engine that keeps translations of its code."""

from collections import deque

from vmexit.accel.soft.native import Library
from vmexit.accel.soft.stopping import Stopper
from vmexit.accel.soft.stubs import StopWords
from vmexit.core.memory import GuestMemory

# So many may wait; if there are more, all translations go.
_MOST = 1024


class HostWrites:
    """Drops the translations of code that a device has written over while the guest runs.

    Within an access that is done at once. From another thread it has to wait until the engine can
    be entered, which it is asked for.
    """

    def __init__(
        self,
        library: Library,
        engine: int,
        memory: GuestMemory,
        stopper: Stopper,
    ) -> None:
        self._library = library
        self._engine = engine
        self._memory = memory
        self._stopper = stopper
        self._pending: deque[tuple[int, int]] = deque()
        self._too_many = False
        self._asked = False  # for a stop that has not come yet
        # Where the engine counts each region from, by its HVA.
        self._offsets: dict[int, int] = {}
        memory.on_host_write(self._wrote)

    def _wrote(self, gpa: int, size: int) -> None:
        if self._stopper.in_callback:
            self._drop(gpa, size)
        else:
            if len(self._pending) < _MOST:
                self._pending.append((gpa, size))
            else:
                self._too_many = True
            # In this order, and the other way round in drop(): a stop that was asked for before
            # sees what was added by now.
            if not self._asked:
                self._asked = True
                self._stopper.ask(StopWords.ATTENTION)

    def drop(self) -> None:
        """Do what has waited; on the thread of the engine, which does not execute now."""
        pending = self._pending
        self._asked = False
        if self._too_many:
            self._too_many = False
            pending.clear()
            self._library.flush_translations(self._engine)
        while pending:
            self._drop(*pending.popleft())

    def _drop(self, gpa: int, size: int) -> None:
        region = self._memory.region(gpa, size)
        offset = self._offsets.get(region.hva)
        if offset is None:
            offset = self._library.ram_offset(self._engine, region.hva)
            self._offsets[region.hva] = offset
        start = offset + gpa - region.gpa
        self._library.drop_translations(self._engine, start, start + size)
