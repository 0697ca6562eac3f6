"""A virtio device whose requests another program serves (vhost-user): disks, shared folders."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from vmexit.core.bus import State
from vmexit.core.clock import Clock
from vmexit.core.errors import ConfigError, HostError, VmexitError
from vmexit.core.rate import Limit
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.flow import Flow
from vmexit.devices.virtio.queue import Chain, Queue, QueueError

Segment = tuple[int, int, bool]

_AGAIN = 200_000_000  # nanoseconds between two tries to connect again


class VhostBackend(Protocol):
    """The other program. Methods raise HostError if it does not do as it should."""

    @property
    def name(self) -> str:
        """How a message calls it."""
        ...

    @property
    def features(self) -> int:
        """The bits that it offers."""
        ...

    @property
    def connected(self) -> bool: ...

    def open(self) -> None:
        """Connect again. Raises OSError, too."""
        ...

    def start(self, index: int, features: int) -> None:
        """Have queue `index` served, which is empty."""
        ...

    def drain(self) -> None:
        """Wait until all is done that was asked for, or it has ended."""
        ...

    def stop(self) -> None:
        """Nothing is served any more once this returns."""
        ...

    def reaches(self, gpa: int, size: int) -> bool:
        """Whether it has all of `[gpa, gpa + size)`."""
        ...

    def has_slot(self, index: int) -> bool:
        """Whether `add()` takes a request."""
        ...

    def add(self, index: int, segments: Sequence[Segment]) -> int:
        """Ask for something: GPA, size, whether it is written to. The number of the request."""
        ...

    def kick(self, index: int) -> None:
        """Tell of what was added."""
        ...

    def done(self, index: int) -> list[tuple[int, int]]:
        """Requests that are done since, and the bytes written for each."""
        ...

    def when_done(self, index: int, function: Callable[[], None]) -> None:
        """Call `function` once, from the event loop, when something is done."""
        ...

    def when_gone(self, function: Callable[[], None]) -> None:
        """Call `function` from the event loop when it has ended."""
        ...


class RequestFlows(Protocol):
    """Who knows what the requests of a type of device are."""

    @property
    def all(self) -> Sequence[Flow]: ...

    def count_request(self, chain: Chain) -> None:
        """Count one that is passed on."""
        ...


class Vhost(VirtioDevice):
    """Each request is checked and passed on, and its answer passed back.

    What is under way is known here: if the other program ends, and is there again in time, it is
    asked once more for what it has not done.
    """

    def __init__(
        self,
        device_id: int,
        backend: VhostBackend,
        features: int,
        config: bytes,
        queue_sizes: Sequence[int],
        clock: Clock,
        fail: Callable[[BaseException], None],
        patience: float = 0,
        limit: Limit | None = None,
        flows: RequestFlows | None = None,
    ) -> None:
        """`features` are those of its type that may be offered; `limit` is for all queues together.

        `flows` count requests; without, the queues do.
        If the other program is gone for more than `patience` seconds, `fail` is told.
        """
        self.device_id = device_id
        self.features = features & backend.features
        self.queue_sizes = queue_sizes
        self._backend = backend
        self._config = config
        self._clock = clock
        self._fail = fail
        self._patience = round(patience * 1e9)
        self.limit = limit
        self._flows = flows
        self.flows = flows.all if flows is not None else ()
        self._give_up_at = 0
        self._retry = clock.timer(self._connect)
        self._agreed = 0
        self._under_way: list[dict[int, Chain]] = []
        self._back: list[Callable[[], None]] = []
        # One object, as what waits for the transport waits only once.
        self._again = partial(self._guarded, self._ask_again)
        backend.when_gone(self._gone)

    def config(self) -> bytes:
        return self._config

    @property
    def unsaved(self) -> str:
        return f"{self._backend.name} keeps a state of its own; use a raw image with snapshot=on"

    def require_fits(self, state: State) -> None:
        raise ConfigError(self.unsaved)

    def activate(self, queues: Sequence[Queue], features: int) -> None:
        super().activate(queues, features)
        self._agreed = features
        self._under_way = [{} for _ in queues]
        self._back = [
            partial(self._guarded, partial(self._pass_back, i)) for i in range(len(queues))
        ]
        self._guarded(self._start)

    def _start(self) -> None:
        if not self._backend.connected:
            return  # as soon as it is
        for index, queue in enumerate(self.queues):
            if queue.ready:
                self._backend.start(index, self._agreed)
                self._backend.when_done(index, partial(self._called, index))

    def settle(self) -> None:
        if any(self._under_way):
            self._guarded(self._settle)

    def _settle(self) -> None:
        self._backend.drain()
        for index in range(len(self.queues)):
            self._take_back(index)

    def reset(self) -> None:
        if self.queues:
            self._guarded(self._backend.stop)
        super().reset()
        self._under_way = []

    def notify(self, index: int) -> None:
        self._pass_on(index)

    def _pass_on(self, index: int) -> None:
        queue, backend, under_way = self.queues[index], self._backend, self._under_way[index]
        added = False
        while backend.has_slot(index) and not queue.must_wait():
            chain = queue.pop()
            if chain is None:
                break
            if not all(backend.reaches(gpa, size) for gpa, size in chain.sources):
                raise QueueError("a request lies in ROM, which is not shared")
            queue.count(chain.size())
            if self._flows is not None:
                self._flows.count_request(chain)
            # Without its views: each part of each request that may be under way would have one.
            kept = chain._replace(readable=[], writable=[])
            under_way[backend.add(index, chain.segments())] = kept
            added = True
        if added:
            backend.kick(index)

    def _called(self, index: int) -> None:
        self.transport.enter(self._back[index])
        self._backend.when_done(index, partial(self._called, index))

    def _pass_back(self, index: int) -> None:
        self._take_back(index)
        self._pass_on(index)  # what had no slot

    def _take_back(self, index: int) -> None:
        queue, under_way = self.queues[index], self._under_way[index]
        for number, written in self._backend.done(index):
            chain = under_way.pop(number)
            queue.push(chain, min(written, chain.writable_size()))
        queue.tell()

    def _guarded(self, function: Callable[[], None]) -> None:
        """What the other program does wrong is no fault of the guest's."""
        try:
            function()
        except HostError as error:
            self._fail(error)

    # It ends.

    def _gone(self) -> None:
        self._give_up_at = self._clock.now() + self._patience
        self._connect()

    def _connect(self) -> None:
        why = "it has ended"
        try:
            if self._patience:
                self._backend.open()
                self.transport.enter(self._again)
                return
        except (OSError, VmexitError) as error:
            why = str(error)
        if self._clock.now() < self._give_up_at:
            self._retry.set(self._clock.now() + _AGAIN)
        else:
            self._fail(HostError(f"{self._backend.name}: {why}; start it, and the machine anew"))

    def _ask_again(self) -> None:
        if not self._backend.connected:
            return  # it has ended again while this waited
        self._start()
        for index, queue in enumerate(self.queues):
            if not queue.ready:
                continue
            chains = list(self._under_way[index].values())
            self._under_way[index] = {
                self._backend.add(index, chain.segments()): chain for chain in chains
            }
            self._backend.kick(index)
            self._pass_on(index)
