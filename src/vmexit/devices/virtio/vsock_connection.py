"""One connection between a socket of the guest and one of the host, with its credit (5.10.6.3)."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from vmexit.abi import virtio as v

BUF_ALLOC = 256 << 10
"""Bytes that wait for the host's socket at most."""

# The guest is told of new room when there is so much of it.
_WORTH_TELLING = BUF_ALLOC // 4
# So much is read of the host's socket in advance, at most, and sent in one packet.
_READ = 64 << 10
_MASK32 = 0xFFFF_FFFF
_BOTH = v.VSOCK_SHUTDOWN_F_RECEIVE | v.VSOCK_SHUTDOWN_F_SEND


class HostStream(Protocol):
    """The host's end: a stream that does not block. Each call may raise OSError."""

    def accepted(self, port: int) -> None:
        """The guest has accepted what the host has begun; `port` is the host's."""
        ...

    def read(self, size: int) -> bytes | None:
        """At most so many bytes; none at the end, and None if there are none now."""
        ...

    def write(self, data: bytes | bytearray) -> int:
        """How many bytes were taken. Raises BrokenPipeError if nobody will read them."""
        ...

    def gone(self) -> bool:
        """Whether the other end has closed both directions."""
        ...

    def finish(self) -> None:
        """Nothing more will be written."""
        ...

    def stop_reading(self) -> None:
        """Nothing more will be read."""
        ...

    def when_readable(self, function: Callable[[], None]) -> None:
        """Call `function` once, from elsewhere, when there is something to read."""
        ...

    def when_writable(self, function: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


class Outgoing(NamedTuple):
    """What a packet for the guest says, but for its addresses and the credit."""

    op: int
    flags: int = 0
    payload: bytes | memoryview = b""


class Connection:
    """A method that raises OSError cannot go on: the connection has to be reset.

    Packets for the guest are asked for, one after the other, when there is room for them.
    """

    def __init__(
        self, stream: HostStream, guest_port: int, host_port: int, *, by_guest: bool
    ) -> None:
        """`by_guest` tells who has begun it; if the host has, the guest is to be asked."""
        self.key = guest_port, host_port
        self.closed = False
        self.forwarded = 0
        """Bytes that the host's socket has taken, modulo 2**32."""
        self._stream = stream
        self._open = by_guest
        # What to tell the guest: operations and their flags, in this order.
        self._controls = {v.VSOCK_OP_RESPONSE if by_guest else v.VSOCK_OP_REQUEST: 0}
        self._told = 0  # of `forwarded`
        # From host to guest.
        self._readable = False  # or at its end
        self._input = memoryview(b"")
        self._shut = 0  # flags that the guest was told
        self._sent = self._guest_alloc = self._guest_forwarded = 0
        self._asked = False  # for credit
        # From guest to host.
        self._output = bytearray()
        self._deaf = False  # the host reads no more
        self._awaited = False  # that the host's socket takes more
        self._guest_shut = 0

    def start(self, readable: Callable[[], None], writable: Callable[[], None]) -> None:
        """The functions to call when the host's socket can be read or written."""
        self._when_readable, self._when_writable = readable, writable
        if self._open:
            self._stream.when_readable(readable)

    def close(self) -> None:
        """End it at the host's side."""
        self.closed = True
        self._stream.close()

    @property
    def known(self) -> bool:
        """Whether the guest has been told of it."""
        return v.VSOCK_OP_REQUEST not in self._controls

    @property
    def waits(self) -> bool:
        """Whether there is something that the host's socket has not taken yet."""
        return bool(self._output)

    # From the guest.

    def credit(self, buf_alloc: int, forwarded: int) -> None:
        """What a packet from the guest says of its room."""
        self._guest_alloc, self._guest_forwarded = buf_alloc, forwarded

    def _credit(self) -> int:
        return max(0, self._guest_alloc - (self._sent - self._guest_forwarded & _MASK32))

    def check_room(self, size: int) -> None:
        """Raises ConnectionAbortedError for so many bytes that the guest may not send."""
        if self._guest_shut & v.VSOCK_SHUTDOWN_F_SEND or len(self._output) + size > BUF_ALLOC:
            raise ConnectionAbortedError("the guest has sent what it may not")

    def receive(self, op: int, flags: int, payload: bytes) -> None:
        """A packet has come, which is neither a request nor a reset."""
        if op == v.VSOCK_OP_RESPONSE and not self._open and self.known:
            self._open = True
            self._stream.accepted(self.key[1])
            self._stream.when_readable(self._when_readable)
        elif not self._open:
            raise ConnectionAbortedError("the guest has not accepted the connection")
        elif op == v.VSOCK_OP_RW:
            self._deliver(payload)
        elif op == v.VSOCK_OP_SHUTDOWN:
            self._shutdown(flags & _BOTH)
        elif op == v.VSOCK_OP_CREDIT_REQUEST:
            self._controls[v.VSOCK_OP_CREDIT_UPDATE] = 0
        elif op != v.VSOCK_OP_CREDIT_UPDATE:
            raise ConnectionAbortedError("the guest has sent something that is not known here")

    @property
    def over(self) -> bool:
        """Whether the guest neither sends nor receives any more."""
        return self._guest_shut == _BOTH

    def _deliver(self, payload: bytes) -> None:
        self.check_room(len(payload))
        done = 0 if self._output else self._write(payload)
        self._output += payload[done:]
        self._await_room()

    def _write(self, data: bytes | bytearray) -> int:
        """How many bytes are done with. What nobody will read is thrown away, and the guest told:
        a reset would cost it what it has not read yet.
        """
        try:
            done = len(data) if self._deaf else self._stream.write(data)
        except BrokenPipeError:
            self._deaf, done = True, len(data)
            self._tell_shut(v.VSOCK_SHUTDOWN_F_RECEIVE)
        self.forwarded = self.forwarded + done & _MASK32
        if self.forwarded - self._told & _MASK32 >= _WORTH_TELLING:
            self._controls[v.VSOCK_OP_CREDIT_UPDATE] = 0
        return done

    def _await_room(self) -> None:
        if self._output and not self._awaited:
            self._awaited = True
            self._stream.when_writable(self._when_writable)

    def _shutdown(self, flags: int) -> None:
        new = flags & ~self._guest_shut  # a bit that was set stays so (5.10.6.5)
        self._guest_shut |= flags
        if new & v.VSOCK_SHUTDOWN_F_RECEIVE:
            self._readable, self._input = False, memoryview(b"")
            self._stream.stop_reading()
        if new & v.VSOCK_SHUTDOWN_F_SEND and not self._output:
            self._stream.finish()

    # From the host.

    def host_readable(self) -> None:
        """The host's socket can be read."""
        self._readable = not self._guest_shut & v.VSOCK_SHUTDOWN_F_RECEIVE

    def host_writable(self) -> None:
        """It takes more, or has failed."""
        self._awaited = False
        if self._output:
            del self._output[: self._write(self._output)]
        self._await_room()
        if not self._output and self._guest_shut & v.VSOCK_SHUTDOWN_F_SEND:
            self._stream.finish()

    def _read(self) -> None:
        """Have something to send, if the guest has room and the host has sent something."""
        if self._controls or not (self._input or self._readable):
            return
        credit = self._credit()
        if not credit:
            if not self._asked:
                self._asked = True
                self._controls[v.VSOCK_OP_CREDIT_REQUEST] = 0
            return
        self._asked = False
        if self._input:
            return
        data = self._stream.read(min(credit, _READ))
        if data:
            self._input = memoryview(data)
            return
        self._readable = False
        if data is None:
            self._stream.when_readable(self._when_readable)
        else:
            self._tell_shut(_BOTH if self._stream.gone() else v.VSOCK_SHUTDOWN_F_SEND)

    def _tell_shut(self, flags: int) -> None:
        if flags & ~self._shut:
            self._shut |= flags
            self._controls[v.VSOCK_OP_SHUTDOWN] = self._shut

    # To the guest.

    def has_packet(self) -> bool:
        """Whether there is something to send; reads from the host's socket if need be."""
        self._read()
        return bool(self._controls) or (bool(self._input) and self._credit() > 0)

    def packet(self, room: int) -> Outgoing:
        """What to send, with at most `room` bytes of payload; `has_packet()` has told that there
        is something.
        """
        self._told = self.forwarded
        if self._controls:
            op = next(iter(self._controls))
            return Outgoing(op, self._controls.pop(op))
        size = min(room, self._credit())
        if not size:  # the buffer is used up by then, so say what can be said always
            return Outgoing(v.VSOCK_OP_CREDIT_UPDATE)
        payload, self._input = self._input[:size], self._input[size:]
        self._sent = self._sent + len(payload) & _MASK32
        return Outgoing(v.VSOCK_OP_RW, 0, payload)
