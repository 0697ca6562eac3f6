"""The memory balloon (virtio 5.5): takes pages from the guest, which go back to the host."""

import struct
from collections.abc import Callable, Sequence

from vmexit.abi import virtio as v
from vmexit.core.bus import State
from vmexit.core.errors import ConfigError
from vmexit.core.memory import GuestMemory
from vmexit.core.saved import Saved
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.queue import Chain, Queue

INFLATE, DEFLATE, STATISTICS, REPORTING = range(4)

_CONFIG = struct.Struct("<II")  # pages wanted, pages there (5.5.4)
_ACTUAL = 4
_PFN = struct.Struct("<I")
_STATISTIC = struct.Struct("<HQ")
_LOW32 = 0xFFFF_FFFF

# Of one buffer so much is looked at; Linux's have 256 pages, and a statistic each.
_MOST = 4096


class Balloon(VirtioDevice):
    """Queues of pages that are taken, pages that are given back, statistics, and free pages.

    What the guest does not use it reports by itself, and it has it back when it needs it.
    """

    device_id = v.BALLOON
    queue_sizes = (128, 128, 16, 128)
    features = (
        1 << v.BALLOON_F_STATS_VQ
        | 1 << v.BALLOON_F_DEFLATE_ON_OOM
        | 1 << v.BALLOON_F_PAGE_REPORTING
    )

    def __init__(self, memory: GuestMemory, target: int = 0) -> None:
        """`target` is how many bytes to take from the guest."""
        self._memory = memory
        self._target = target // v.BALLOON_PAGE
        self._actual = 0
        self.statistics: dict[str, int] = {}
        """What the guest has told last, by name; sizes in bytes."""
        self._roles: list[Callable[[Queue], None]] = []
        self._told: Callable[[int], None] | None = None

    @property
    def target(self) -> int:
        """How many bytes the balloon shall have."""
        return self._target * v.BALLOON_PAGE

    @property
    def actual(self) -> int:
        """How many bytes it has, as the guest says."""
        return self._actual * v.BALLOON_PAGE

    def set_target(self, size: int) -> None:
        """Ask the guest for `size` bytes in all; from any thread. Raises ConfigError."""
        if size < 0:
            raise ConfigError(f"a balloon of {size} bytes cannot be; use 0 or more")
        self._target = min(size // v.BALLOON_PAGE, _LOW32)
        self.transport.config_changed()

    def ask_for_statistics(self) -> None:
        """Have the guest tell its statistics anew; from any thread."""
        self.transport.enter(self._return_statistics)

    def config(self) -> bytes:
        return _CONFIG.pack(self._target & _LOW32, self._actual)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == _ACTUAL and len(data) == 4:
            self._actual = int.from_bytes(data, "little")
            if self._told is not None:
                self._told(self.actual)

    def on_change(self, function: Callable[[int], None]) -> None:
        """Call `function` with how many bytes it has whenever the guest says so."""
        self._told = function

    def activate(self, queues: Sequence[Queue], features: int) -> None:
        super().activate(queues, features)
        # A queue that was not agreed on has no number (5.5.2; so does Linux).
        self._roles = [self._inflate, self._deflate]
        if features >> v.BALLOON_F_STATS_VQ & 1:
            self._roles.append(self._read_statistics)
        if features >> v.BALLOON_F_PAGE_REPORTING & 1:
            self._roles.append(self._report)

    def notify(self, index: int) -> None:
        if index < len(self._roles):
            self._roles[index](self.queues[index])

    def reset(self) -> None:
        super().reset()
        self._actual = 0
        self.statistics = {}
        self._roles = []

    def _inflate(self, queue: Queue) -> None:
        queue.serve(self._take)

    def _take(self, chain: Chain) -> int:
        data = chain.read(_MOST)
        data = data[: len(data) // _PFN.size * _PFN.size]
        pages = sorted({number for (number,) in _PFN.iter_unpack(data)})
        for first, count in _runs(pages):
            self._memory.discard(first * v.BALLOON_PAGE, count * v.BALLOON_PAGE)
        return 0

    def _deflate(self, queue: Queue) -> None:
        queue.serve(lambda chain: 0)  # it may use them again: pages of zeros

    def _report(self, queue: Queue) -> None:
        queue.serve(self._free)

    def _free(self, chain: Chain) -> int:
        for gpa, size in chain.ranges:
            self._memory.discard(gpa, size)
        return 0

    def _read_statistics(self, queue: Queue) -> None:
        """The guest's buffer stays where it is until it shall be filled anew (5.5.6.3)."""
        chain = queue.pop()
        if chain is None:
            return
        if queue.pop() is not None:  # asked for so that the driver notifies of the next one
            queue.give_back(1)
        queue.give_back(1)
        data = chain.read(_MOST)
        data = data[: len(data) // _STATISTIC.size * _STATISTIC.size]
        self.statistics = {
            v.BALLOON_STATISTICS[tag]: value
            for tag, value in _STATISTIC.iter_unpack(data)
            if tag < len(v.BALLOON_STATISTICS)
        }

    def _return_statistics(self) -> None:
        if self._read_statistics in self._roles:
            queue = self.queues[STATISTICS]
            chain = queue.pop()
            if chain is not None:
                queue.push(chain, 0)
                queue.tell()

    def state(self) -> State:
        return {"version": 1, "target": self._target, "actual": self._actual}

    def restore(self, state: State) -> None:
        """Raises ConfigError for what is no state of this."""
        saved = Saved(state, "a memory balloon", 1)
        target, actual = saved.number("target", _LOW32), saved.number("actual", _LOW32)
        self._target, self._actual = target, actual


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """`(first, count)` of numbers that follow each other."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs
