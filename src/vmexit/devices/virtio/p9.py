"""The 9P transport (Linux, net/9p/trans_virtio.c): carries messages to a file server.

A chain is one message in its readable part, and room for the answer in its writable part. All
else that there is to say is the tag, by which the guest names the share when it mounts it.
"""

from typing import Protocol

from vmexit.abi import virtio as v
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.queue import Chain, QueueError

QUEUE_SIZE = 128
_LEAST = 11  # bytes of an answer that is an error


class FileServer(Protocol):
    """The host side. It serves one guest, one call at a time."""

    @property
    def msize(self) -> int:
        """Bytes of the longest message that it takes."""
        ...

    def answer(self, request: bytes, room: int) -> bytes:
        """The message to answer one with, of at most `room` bytes, which are at least 11.

        What is wrong with the request is an answer, too: it raises nothing.
        """
        ...

    @property
    def in_use(self) -> bool:
        """Whether the guest has anything open, the folder itself above all."""
        ...

    def reset(self) -> None:
        """Forget the guest."""
        ...


class P9(VirtioDevice):
    """One queue of messages, each of which is answered before the next one is looked at."""

    device_id = v.P9
    features = 1 << v.P9_MOUNT_TAG
    queue_sizes = (QUEUE_SIZE,)
    waits = True

    def __init__(self, server: FileServer, tag: str) -> None:
        """`tag` has less than 64 KiB."""
        self._server = server
        name = tag.encode()
        self._config = len(name).to_bytes(2, "little") + name

    def config(self) -> bytes:
        return self._config

    @property
    def unsaved(self) -> str:
        return "the guest has the folder mounted; unmount it first" if self._server.in_use else ""

    def notify(self, index: int) -> None:
        self.queues[index].serve(self._serve)

    def reset(self) -> None:
        super().reset()
        self._server.reset()

    def _serve(self, chain: Chain) -> int:
        room = chain.writable_size()
        if room < _LEAST:
            raise QueueError("a message of 9P has no room for its answer")
        return chain.write(self._server.answer(chain.read(self._server.msize), room))
