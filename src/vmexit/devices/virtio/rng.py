"""The entropy device (virtio 5.4): fills buffers with random bytes of the host."""

import os
from collections.abc import Sequence

from vmexit.abi.virtio import ENTROPY
from vmexit.core.bus import State
from vmexit.devices.saved import Saved
from vmexit.devices.virtio.queue import Chain, Queue

# For one buffer: a driver asks again for more, and the host is not held up for long.
_MOST = 64 << 10


def _fill(chain: Chain) -> int:
    return chain.write(os.urandom(min(chain.writable_size(), _MOST)))


class Rng:
    """One queue of buffers to fill."""

    device_id = ENTROPY
    features = 0
    queue_sizes = (64,)

    def __init__(self) -> None:
        self._queue: Queue | None = None

    def config(self) -> bytes:
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """There is none."""

    def activate(self, queues: Sequence[Queue], features: int) -> None:
        self._queue = queues[0]

    def notify(self, index: int) -> None:
        if self._queue is not None:
            self._queue.serve(_fill)

    def reset(self) -> None:
        self._queue = None

    def state(self) -> State:
        return {"version": 1}

    def restore(self, state: State) -> None:
        """Raises ConfigError for what is no state of this."""
        Saved(state, "an entropy device", 1)
