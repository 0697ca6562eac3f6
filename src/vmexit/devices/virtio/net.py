"""The network device (virtio 5.1): Ethernet frames between the guest and a backend."""

import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from vmexit.abi import virtio as v
from vmexit.core.bus import State
from vmexit.core.rate import Limit
from vmexit.core.saved import Saved
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.flow import Flow
from vmexit.devices.virtio.queue import Chain, Queue, QueueError, without_first

QUEUE_SIZE = 256
RECEIVE, TRANSMIT, CONTROL = range(3)

# MAC address, status, number of queue pairs, MTU (5.1.4)
_CONFIG = struct.Struct("<6sHHH")
_MAC_SIZE = 6
_MERGED = struct.Struct("<H")  # num_buffers, at the end of the header
_MERGED_AT = v.NET_HEADER_SIZE - _MERGED.size
_NO_HEADER = bytes(v.NET_HEADER_SIZE)

_ETHERNET = 14  # two addresses and a type
_LARGEST = v.NET_HEADER_SIZE + _ETHERNET + (1 << 16)  # with all of an IP packet
_COMMAND_MOST = 2048  # bytes of a control command that are looked at

_OFFLOADS = [v.NET_F_CSUM, v.NET_F_GUEST_CSUM, v.NET_F_CTRL_GUEST_OFFLOADS]
_OFFLOADS += [v.NET_F_GUEST_TSO4, v.NET_F_GUEST_TSO6, v.NET_F_GUEST_ECN]
_OFFLOADS += [v.NET_F_HOST_TSO4, v.NET_F_HOST_TSO6, v.NET_F_HOST_ECN]
# Those of them about what comes to the guest, which it may switch (5.1.6.5.6).
_GUEST_OFFLOADS = [v.NET_F_GUEST_CSUM, v.NET_F_GUEST_TSO4, v.NET_F_GUEST_TSO6, v.NET_F_GUEST_ECN]
_SWITCHABLE = sum(1 << bit for bit in _GUEST_OFFLOADS)


class NetBackend(Protocol):
    """The host side of a network interface. No call raises for what a guest sends."""

    @property
    def offloads(self) -> bool:
        """Whether frames have a virtio header, and checksums and segmentation are its business."""
        ...

    @property
    def mtu(self) -> int:
        """Bytes of the largest packet in a frame."""
        ...

    def has_room(self) -> bool:
        """Whether `send()` takes a frame now."""
        ...

    def send(self, frame: Sequence[memoryview]) -> None:
        """Send one frame, in parts; only after `has_room()`."""
        ...

    def receive(self) -> memoryview | None:
        """The next frame, valid until the next call; None if there is none now, or any more."""
        ...

    @property
    def gone(self) -> bool:
        """Whether there will be none any more: the other side has ended."""
        ...

    def when_readable(self, function: Callable[[], None]) -> None:
        """Call `function` once, from the event loop, when there may be a frame."""
        ...

    def when_room(self, function: Callable[[], None]) -> None:
        """Call `function` once, from the event loop, when there may be room."""
        ...

    def set_offloads(self, features: int) -> None:
        """What frames to the guest may need of it: bits of features of the device."""
        ...


class Net(VirtioDevice):
    """A pair of queues for frames and one for commands.

    A frame is taken from the backend only when the guest has room for it: the backend's side waits,
    and what cannot wait is lost there. Likewise in the other direction.
    """

    device_id = v.NET
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, 64)

    def __init__(
        self,
        backend: NetBackend,
        mac: bytes,
        sent: Limit | None = None,
        received: Limit | None = None,
    ) -> None:
        """`mac` has 6 bytes; `sent` and `received` limit the frames of the guest, and to it."""
        self._backend = backend
        self._mac = mac
        self._limits = (received, sent)
        self.flows = (Flow("receive"), Flow("transmit"))  # frames, without virtio's header
        self._header = v.NET_HEADER_SIZE if backend.offloads else 0
        self._link = True
        self._frame: memoryview | None = None  # from the backend, and not yet taken by the guest
        self._merges = False
        bits = [v.NET_F_MAC, v.NET_F_MTU, v.NET_F_STATUS, v.NET_F_MRG_RXBUF]
        bits += [v.NET_F_CTRL_VQ, v.NET_F_CTRL_RX, v.NET_F_CTRL_MAC_ADDR]
        bits += _OFFLOADS if backend.offloads else []
        self.features = sum(1 << bit for bit in bits)

    def config(self) -> bytes:
        return _CONFIG.pack(self._mac, v.NET_S_LINK_UP * self._link, 1, self._backend.mtu)

    @property
    def link(self) -> bool:
        """Whether the cable is plugged in, as the guest sees it."""
        return self._link

    def set_link(self, up: bool) -> None:
        """Plug the cable in, or pull it out; from any thread."""
        self._link = up
        self.transport.config_changed()
        if up:
            self.transport.enter(self._receive)

    def activate(self, queues: Sequence[Queue], features: int) -> None:
        super().activate(queues, features)
        for queue, limit in zip(queues, self._limits, strict=False):
            queue.limit = limit
        self._merges = bool(features >> v.NET_F_MRG_RXBUF & 1)
        self._backend.set_offloads(features & _SWITCHABLE)
        self._backend.when_readable(self._readable)

    def reset(self) -> None:
        super().reset()
        self._frame = None
        self._backend.set_offloads(0)

    def notify(self, index: int) -> None:
        if index == RECEIVE:
            self._receive()
        elif index == TRANSMIT:
            self._transmit()
        else:
            self.queues[CONTROL].serve(self._command)

    # To the guest.

    def _readable(self) -> None:
        self.transport.enter(self._receive)

    def _receive(self) -> None:
        """Give the guest what has come, as far as it has room; no more at a time than a queue."""
        queue = self.queues[RECEIVE]
        if not queue.ready:
            return
        for _ in range(queue.size):
            if not self._link or queue.must_wait():
                break
            if self._frame is None:
                self._frame = self._backend.receive()
            if self._frame is None:
                if self._backend.gone:
                    self._link = False
                    self.transport.config_changed()
                else:
                    self._backend.when_readable(self._readable)
                break
            if not self._deliver(queue, self._frame):
                break  # until the guest notifies of new buffers
            queue.count(len(self._frame))
            self.flows[RECEIVE].count(max(0, len(self._frame) - self._header))
            self._frame = None
        else:
            self._backend.when_readable(self._readable)
        queue.tell()

    def _deliver(self, queue: Queue, frame: memoryview) -> bool:
        """Put `frame` into as many buffers as it needs; False if there are not enough of them."""
        data: list[bytes | memoryview] = [frame] if self._backend.offloads else [_NO_HEADER, frame]
        need = sum(map(len, data))
        chains: list[Chain] = []
        room = 0
        while room < need:
            chain = queue.pop()
            if chain is None:
                queue.give_back(len(chains))
                return False
            if chain.readable or not chain.writable:
                raise QueueError("a buffer for a frame cannot be written")
            if not chains and len(chain.writable[0]) < v.NET_HEADER_SIZE:
                raise QueueError("a buffer for a frame has no room for its header")
            chains.append(chain)
            room += chain.writable_size()
            if not self._merges:
                break
        done: list[tuple[Chain, int]] = []
        left = b"".join(data)  # of a frame that does not fit, the driver gets what does
        for chain in chains:
            written = chain.write(left)
            left = left[written:]
            done.append((chain, written))
        _MERGED.pack_into(chains[0].writable[0], _MERGED_AT, len(chains))
        queue.push_all(done)
        return True

    # From the guest.

    def _may_send(self) -> bool:
        if self._backend.has_room():
            return True
        self._backend.when_room(self._room)
        return False

    def _room(self) -> None:
        self.transport.enter(self._transmit)

    def _transmit(self) -> None:
        self.queues[TRANSMIT].serve(self._send, self._may_send)

    def _send(self, chain: Chain) -> int:
        size = chain.size()
        if chain.writable or size < v.NET_HEADER_SIZE:
            raise QueueError("a frame to send has no header, or is to be written to")
        if not v.NET_HEADER_SIZE + _ETHERNET <= size <= _LARGEST or not self._link:
            return 0  # lost, as on a wire
        parts = chain.readable
        if not self._backend.offloads:
            parts = without_first(parts, v.NET_HEADER_SIZE)
        self._backend.send(parts)
        self.flows[TRANSMIT].count(size - v.NET_HEADER_SIZE)
        return 0

    # Commands.

    def _command(self, chain: Chain) -> int:
        if not chain.writable:
            raise QueueError("a command has no room for its answer")
        command = chain.read(_COMMAND_MOST)
        return chain.write(bytes((v.NET_OK if self._do(command) else v.NET_ERR,)))

    def _do(self, command: bytes) -> bool:
        """Whether it is done. Which frames it wants matters little: all come, and it chooses."""
        if len(command) < 2:
            return False
        kind, number = command[:2]
        data = command[2:]
        if kind == v.NET_CTRL_RX:
            return number <= v.NET_CTRL_RX_LAST and len(data) == 1
        if kind == v.NET_CTRL_MAC and number == v.NET_CTRL_MAC_ADDR_SET:
            if len(data) != _MAC_SIZE:
                return False
            self._mac = data
            return True
        if kind == v.NET_CTRL_MAC:
            return number == v.NET_CTRL_MAC_TABLE_SET
        if (kind, number) == (v.NET_CTRL_GUEST_OFFLOADS, v.NET_CTRL_GUEST_OFFLOADS_SET):
            wanted = int.from_bytes(data, "little")
            if len(data) != 8 or wanted & ~_SWITCHABLE or not self._backend.offloads:
                return False
            self._backend.set_offloads(wanted)
            return True
        return False

    # State.

    def state(self) -> State:
        return {"version": 1, "mac": self._mac, "link": int(self._link)}

    def restore(self, state: State) -> None:
        """Raises ConfigError for what is no state of this."""
        saved = Saved(state, "a network device", 1)
        mac, link = saved.data("mac", _MAC_SIZE, _MAC_SIZE), saved.flag("link")
        self._mac, self._link = mac, link
