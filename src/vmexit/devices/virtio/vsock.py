"""The socket device (virtio 5.10): streams between sockets of the guest and of the host."""

import struct
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from vmexit.abi import virtio as v
from vmexit.core.bus import State
from vmexit.devices.virtio import vsock_packet
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.queue import Chain, Queue, QueueError
from vmexit.devices.virtio.vsock_connection import BUF_ALLOC, Connection, HostStream
from vmexit.devices.virtio.vsock_packet import Packet

_CONFIG = struct.Struct("<Q")
_EVENT = struct.Struct("<I")
_QUEUE_SIZE, _EVENT_QUEUE_SIZE = 128, 16

MOST_CONNECTIONS = 1024
# With so many resets to send, no more packets are taken from the driver until it gives buffers.
_MOST_RESETS = 256
# Ports of the host for what it begins. Programs use small numbers for what they listen at.
_FIRST_PORT, _LAST_PORT = 1 << 30, (1 << 31) - 1


class VsockHost(Protocol):
    """The host's side: what can be connected to, and who connects. No call blocks."""

    @property
    def capacity(self) -> int:
        """So many streams there may be at a time."""
        ...

    def connect(self, port: int) -> HostStream:
        """Connect to what listens on the host for `port`. Raises OSError."""
        ...

    def listen(self, arrived: Callable[[], None]) -> None:
        """Have `arrived` called, from elsewhere, when `accept()` has something new."""
        ...

    def accept(self) -> tuple[HostStream, int] | None:
        """A stream that is for this port of the guest."""
        ...


class Vsock(VirtioDevice):
    """Queues for packets to the driver, from the driver, and for events.

    Nothing is kept over a reset. A saved state has no connections, and the driver is told so
    after it was restored (5.10.6.7).
    """

    device_id = v.VSOCK
    queue_sizes = (_QUEUE_SIZE, _QUEUE_SIZE, _EVENT_QUEUE_SIZE)

    def __init__(self, cid: int, host: VsockHost) -> None:
        """`cid` is the guest's."""
        self._cid = cid
        self._host = host
        self._most = min(MOST_CONNECTIONS, host.capacity)
        self._connections: dict[tuple[int, int], Connection] = {}
        # Ended by the guest, while the host's sockets have not taken all yet.
        self._draining: set[Connection] = set()
        # Those that may have packets for the guest; each has its turn.
        self._ready: dict[Connection, None] = {}
        self._resets: deque[Packet] = deque()
        self._paused = False  # by too many of these
        self._reset_event = False  # the driver has to be told of a reset
        self._last_port = _LAST_PORT
        host.listen(self._arrived)

    def config(self) -> bytes:
        return _CONFIG.pack(self._cid)

    def activate(self, queues: Sequence[Queue], features: int) -> None:
        super().activate(queues, features)
        self.transport.enter(self._begin)

    def _begin(self) -> None:
        self._tell_reset()
        self._accept()

    def notify(self, index: int) -> None:
        if index == v.VSOCK_EVENT:
            self._tell_reset()
        elif index == v.VSOCK_RX:
            self._fill()
            if self._paused:
                self._transmit()
        else:
            self._transmit()

    def reset(self) -> None:
        super().reset()
        for connection in (*self._connections.values(), *self._draining):
            connection.close()
        for kept in (self._connections, self._draining, self._ready, self._resets):
            kept.clear()
        self._paused = self._reset_event = False

    def restore(self, state: State) -> None:
        super().restore(state)
        self._reset_event = True

    def _tell_reset(self) -> None:
        self.queues[v.VSOCK_EVENT].serve(self._write_event, lambda: self._reset_event)

    def _write_event(self, chain: Chain) -> int:
        if chain.writable_size() < _EVENT.size:
            raise QueueError("a buffer for events has no room for one")
        self._reset_event = False
        return chain.write(_EVENT.pack(v.VSOCK_EVENT_TRANSPORT_RESET))

    # Connections.

    def _add(self, connection: Connection) -> None:
        self._connections[connection.key] = connection
        # Each is one object, as what waits for the transport waits only once.
        readable = partial(self._host_readable, connection)
        writable = partial(self._host_writable, connection)
        try:
            connection.start(
                lambda: self.transport.enter(readable), lambda: self.transport.enter(writable)
            )
        except OSError:
            self._abort(connection)
        else:
            self._wake(connection)

    def _full(self) -> bool:
        return len(self._connections) + len(self._draining) >= self._most

    def _forget(self, connection: Connection) -> None:
        del self._connections[connection.key]
        self._ready.pop(connection, None)

    def _abort(self, connection: Connection) -> None:
        """It cannot go on: close it at both ends."""
        self._forget(connection)
        connection.close()
        if connection.known:
            self._resets.append(self._packet(connection, v.VSOCK_OP_RST))

    def _wake(self, connection: Connection) -> None:
        """There may be packets of it for the guest."""
        try:
            if connection.has_packet():
                self._ready[connection] = None
        except OSError:
            self._abort(connection)

    # From the host.

    def _arrived(self) -> None:
        if self.queues:  # else they are asked for by activate()
            self.transport.enter(self._accept)

    def _accept(self) -> None:
        while (client := self._host.accept()) is not None:
            stream, guest_port = client
            if self._full():
                stream.close()
                continue
            host_port = self._free_port(guest_port)
            self._add(Connection(stream, guest_port, host_port, by_guest=False))
        self._fill()

    def _free_port(self, guest_port: int) -> int:
        while True:
            port = self._last_port + 1 if self._last_port < _LAST_PORT else _FIRST_PORT
            self._last_port = port
            if (guest_port, port) not in self._connections:
                return port

    def _host_readable(self, connection: Connection) -> None:
        if connection.closed or connection in self._draining:
            return
        connection.host_readable()
        self._wake(connection)
        self._fill()

    def _host_writable(self, connection: Connection) -> None:
        if connection.closed:
            return
        draining = connection in self._draining
        try:
            connection.host_writable()
            done = draining and not connection.waits
        except OSError:
            done = True
        if draining:
            if done:
                self._draining.discard(connection)
                connection.close()
        elif done:
            self._abort(connection)
        else:
            self._wake(connection)
        self._fill()

    # To the guest.

    def _fill(self) -> None:
        self.queues[v.VSOCK_RX].serve(self._send, self._has_packet)

    def _has_packet(self) -> bool:
        while not self._resets and self._ready:
            connection = next(iter(self._ready))
            try:
                if connection.has_packet():
                    return True
                del self._ready[connection]
            except OSError:
                self._abort(connection)
        return bool(self._resets)

    def _packet(self, connection: Connection, op: int, flags: int = 0, size: int = 0) -> Packet:
        guest_port, host_port = connection.key
        return Packet(
            v.VSOCK_CID_HOST, self._cid, host_port, guest_port, size, v.VSOCK_TYPE_STREAM,
            op, flags, BUF_ALLOC, connection.forwarded,
        )  # fmt: skip

    def _send(self, chain: Chain) -> int:
        room = chain.writable_size() - vsock_packet.SIZE
        if room < 0:
            raise QueueError("a buffer for packets has no room for a header")
        if self._resets:
            return chain.write(self._resets.popleft().pack())
        connection = next(iter(self._ready))
        del self._ready[connection]
        op, flags, payload = connection.packet(room)
        header = self._packet(connection, op, flags, len(payload)).pack()
        self._ready[connection] = None  # as the last one
        return chain.write(header + payload)

    # From the guest.

    def _transmit(self) -> None:
        if len(self._resets) >= _MOST_RESETS:
            self._fill()
        self._paused = len(self._resets) >= _MOST_RESETS
        if not self._paused:
            self.queues[v.VSOCK_TX].serve(self._receive)
            self._fill()

    def _receive(self, chain: Chain) -> int:
        data = chain.read(vsock_packet.SIZE)
        if len(data) < vsock_packet.SIZE:
            raise QueueError("a packet has no header")
        packet = Packet.unpack(data)
        if packet.src_cid != self._cid:
            return 0  # whoever that is, it cannot be answered
        connection = self._connections.get((packet.src_port, packet.dst_port))
        if packet.dst_cid != v.VSOCK_CID_HOST or packet.type != v.VSOCK_TYPE_STREAM:
            self._refuse(packet)
        elif connection is not None:
            self._receive_for(connection, packet, chain)
        elif packet.op == v.VSOCK_OP_REQUEST:
            self._connect(packet)
        else:
            self._refuse(packet)
        return 0

    def _refuse(self, packet: Packet) -> None:
        if packet.op != v.VSOCK_OP_RST:
            self._resets.append(packet.answer(v.VSOCK_OP_RST))

    def _connect(self, packet: Packet) -> None:
        if self._full():
            self._refuse(packet)
            return
        try:
            stream = self._host.connect(packet.dst_port)
        except OSError:
            self._refuse(packet)
            return
        connection = Connection(stream, packet.src_port, packet.dst_port, by_guest=True)
        connection.credit(packet.buf_alloc, packet.fwd_cnt)
        self._add(connection)

    def _receive_for(self, connection: Connection, packet: Packet, chain: Chain) -> None:
        if packet.op == v.VSOCK_OP_RST:
            self._forget(connection)
            connection.close()
            return
        connection.credit(packet.buf_alloc, packet.fwd_cnt)
        try:
            payload = b""
            if packet.op == v.VSOCK_OP_RW:
                connection.check_room(packet.size)
                payload = chain.read(vsock_packet.SIZE + packet.size)[vsock_packet.SIZE :]
                if len(payload) < packet.size:
                    raise QueueError("a packet is shorter than its header says")
            connection.receive(packet.op, packet.flags, payload)
        except OSError:
            self._forget(connection)
            connection.close()
            self._refuse(packet)
            return
        if connection.over:
            self._end(connection, packet)
        else:
            self._wake(connection)

    def _end(self, connection: Connection, packet: Packet) -> None:
        """The guest has ended it in both directions. The answer allows it to use the port for
        another connection at once (5.10.6.5), even if the host's socket has not taken all yet.
        """
        self._forget(connection)
        self._refuse(packet)
        if connection.waits:
            self._draining.add(connection)
        else:
            connection.close()
