"""The entropy device (virtio 5.4): fills buffers with random bytes of the host."""

import os

from vmexit.abi.virtio import ENTROPY
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.queue import Chain

# For one buffer: a driver asks again for more, and the host is not held up for long.
_MOST = 64 << 10


def _fill(chain: Chain) -> int:
    return chain.write(os.urandom(min(chain.writable_size(), _MOST)))


class Rng(VirtioDevice):
    """One queue of buffers to fill."""

    device_id = ENTROPY
    queue_sizes = (64,)

    def notify(self, index: int) -> None:
        self.queues[index].serve(_fill)
