"""The front end of vhost-user: virtqueues that another program serves, reached by a Unix socket.

It gets the guest's memory and rings of ours (see vhost_ring), and eventfds to be told by, and to
tell by.
"""

import array
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from vmexit.abi import vhost_user as u
from vmexit.abi.virtio import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from vmexit.backends.vhost_ring import DriverRing, RingMemory, Segment
from vmexit.backends.wait import ready
from vmexit.core.errors import HostError
from vmexit.core.loop import EventLoop

_PATIENCE = 10.0  # seconds for an answer
_LONGEST = 4096  # bytes of an answer
_LONG = 60.0  # seconds for requests that are under way
_SLICE = 0.001  # seconds between two looks at them
_LATER = 1_000_000  # nanoseconds until the connection is looked at again
_PROTOCOL = 1 << u.PROTOCOL_F_MQ | 1 << u.PROTOCOL_F_REPLY_ACK | 1 << u.PROTOCOL_F_CONFIG

Connect = Callable[[], socket.socket]
"""Gives a connected socket. Raises OSError."""


class Shared(NamedTuple):
    """A range of guest memory that the other side maps."""

    gpa: int
    size: int
    hva: int
    fd: int
    offset: int


class VhostUser:
    """`vmexit.devices.virtio.vhost.VhostBackend`."""

    def __init__(
        self,
        name: str,
        connect: Connect,
        loop: EventLoop,
        memory: Sequence[Shared],
        queues: int,
        rings_at: int,
    ) -> None:
        """`name` is how messages call it; `rings_at` a GPA where there is no memory.

        Raises HostError.
        """
        self.name = name
        self.features = 0
        self._connect = connect
        self._loop = loop
        self._memory = memory
        self._socket: socket.socket | None = None
        self._lock = threading.RLock()  # for questions and their answers
        self._acknowledges = False
        self._needs_table = True
        self._when_gone: Callable[[], None] = lambda: None
        self._rings: dict[int, DriverRing] = {}
        self._ring_memory = RingMemory(queues, rings_at)
        self._kicks: list[int] = []
        self._calls: list[int] = []
        try:
            for fds in (self._kicks, self._calls):
                for _ in range(queues):
                    fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            self.open()
        except OSError as error:
            self.close()
            raise HostError(f"cannot use {name}: {error.strerror or error}; start it") from error
        except HostError:
            self.close()
            raise

    # The connection.

    @property
    def connected(self) -> bool:
        """Whether there is somebody to serve requests."""
        return self._socket is not None

    def open(self) -> None:
        """Connect, again if need be, and agree. Raises OSError, HostError."""
        with self._lock:
            self._open()

    def _open(self) -> None:
        self._drop()
        self._socket = self._connect()
        self._socket.settimeout(_PATIENCE)
        self._acknowledges = False
        self._needs_table = True
        self._offered = self._number(u.GET_FEATURES)
        needed = 1 << F_VERSION_1 | 1 << u.F_PROTOCOL_FEATURES | 1 << F_INDIRECT_DESC
        if needed & ~self._offered:
            raise self._error("it has no virtio 1, protocol features or indirect descriptors")
        if self.features & ~self._offered:
            raise self._error("it offers less than before")
        self.features = self._offered
        self._protocol = self._number(u.GET_PROTOCOL_FEATURES) & _PROTOCOL
        self._tell(u.SET_PROTOCOL_FEATURES, u.U64.pack(self._protocol))
        self._acknowledges = bool(self._protocol >> u.PROTOCOL_F_REPLY_ACK & 1)
        self._tell(u.SET_OWNER)
        self._watch()

    def config(self, size: int) -> bytes:
        """The first `size` bytes of the device's configuration; zeros if it has none."""
        if not self._protocol >> u.PROTOCOL_F_CONFIG & 1:
            return bytes(size)
        answer = self._ask(u.GET_CONFIG, u.CONFIG.pack(0, size, 0) + bytes(size))
        return answer[u.CONFIG.size :].ljust(size, b"\0")[:size]

    def when_gone(self, function: Callable[[], None]) -> None:
        """Call `function` from the event loop when the other side has ended."""
        self._when_gone = function

    def _watch(self) -> None:
        if self._socket is not None:
            self._loop.watch(self._socket.fileno(), self._ended)

    def _ended(self) -> None:
        """It says something, on the loop's thread, which must not wait for what it says."""
        if not self._lock.acquire(blocking=False):  # an answer, for who has asked
            self._loop.timer(self._watch).set(self._loop.now() + _LATER)
            return
        try:
            if self._socket is None:
                return
            if not ready(self._socket.fileno(), select.POLLIN):  # it was taken
                self._watch()
                return
            self._drop()  # the end, or what nobody has asked for
        finally:
            self._lock.release()
        self._when_gone()

    def _drop(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            self._loop.unwatch(connection.fileno())
            connection.close()

    def _error(self, why: str) -> HostError:
        return HostError(f"{self.name}: {why}; use another vhost-user back end")

    def _send(self, request: int, data: bytes, fds: Sequence[int], flags: int) -> None:
        if self._socket is None:
            raise self._error("it has ended")
        message = u.HEADER.pack(request, u.VERSION | flags, len(data)) + data
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self._socket.sendmsg([message], ancillary, socket.MSG_NOSIGNAL)
        if sent < len(message):
            self._socket.sendall(message[sent:])

    def _receive(self, size: int) -> bytes:
        assert self._socket is not None
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise self._error("it has ended")
            data += part
        return data

    def _answer(self, request: int) -> bytes:
        number, flags, size = u.HEADER.unpack(self._receive(u.HEADER.size))
        if number != request or flags & (u.VERSION_MASK | u.REPLY) != u.VERSION | u.REPLY:
            raise self._error(f"it answers {number:#x} to request {request}")
        if size > _LONGEST:
            raise self._error(f"it answers with {size} bytes")
        return self._receive(size)

    def _ask(self, request: int, data: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        try:
            with self._lock:
                self._send(request, data, fds, 0)
                return self._answer(request)
        except OSError as error:
            raise self._error(f"no answer to request {request}: {error}") from error

    def _number(self, request: int) -> int:
        answer = self._ask(request)
        if len(answer) != u.U64.size:
            raise self._error(f"it answers request {request} with {len(answer)} bytes")
        number: int = u.U64.unpack(answer)[0]
        return number

    def _tell(self, request: int, data: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send what has no answer, but whether it was done, if that can be asked for."""
        try:
            with self._lock:
                self._send(request, data, fds, u.NEED_REPLY * self._acknowledges)
                failed = self._acknowledges and any(self._answer(request))
        except OSError as error:
            raise self._error(f"request {request} was not taken: {error}") from error
        if failed:
            raise self._error(f"it refuses request {request}")

    # Queues.

    def start(self, index: int, features: int) -> None:
        """Have queue `index` served from now on, empty. Raises HostError."""
        ring = self._ring_memory.ring(index)
        if self._needs_table:
            # Of the rings, ours have what we want, whatever the guest's have.
            wanted = features & ~(1 << F_EVENT_IDX) | 1 << F_INDIRECT_DESC
            wanted |= 1 << u.F_PROTOCOL_FEATURES
            self._tell(u.SET_FEATURES, u.U64.pack(wanted & self._offered))
            self._set_memory()
            self._needs_table = False
        self._tell(u.SET_VRING_NUM, u.VRING_STATE.pack(index, len(ring)))
        self._tell(u.SET_VRING_BASE, u.VRING_STATE.pack(index, 0))
        address = u.VRING_ADDR.pack(index, 0, ring.desc, ring.used, ring.avail, 0)
        self._tell(u.SET_VRING_ADDR, address)
        self._tell(u.SET_VRING_CALL, u.U64.pack(index), [self._calls[index]])
        self._tell(u.SET_VRING_KICK, u.U64.pack(index), [self._kicks[index]])
        self._tell(u.SET_VRING_ENABLE, u.VRING_STATE.pack(index, 1))
        self._rings[index] = ring

    def _set_memory(self) -> None:
        rings = self._ring_memory
        own = Shared(rings.gpa, rings.size, rings.hva, rings.fd, 0)
        table = u.MEMORY.pack(len(self._memory) + 1)
        for part in (*self._memory, own):
            table += u.REGION.pack(part.gpa, part.size, part.hva, part.offset)
        self._tell(u.SET_MEM_TABLE, table, [part.fd for part in (*self._memory, own)])

    def drain(self) -> None:
        """Wait until all is done that was asked for, or the other side has ended.

        `done()` tells of it then. Raises HostError where that takes too long.
        """
        until = time.monotonic() + _LONG
        with self._lock:
            while self._socket is not None and not all(r.idle for r in self._rings.values()):
                if time.monotonic() > until:
                    raise self._error(f"requests take more than {_LONG:.0f} s")
                # Not by the eventfds, which are the loop's.
                if ready(self._socket.fileno(), select.POLLRDHUP, _SLICE):
                    return

    def stop(self) -> None:
        """Nothing is served any more, and nothing written, once this returns. Raises HostError.

        What is under way ends before: QEMU's storage daemon stops a queue, but no request.
        """
        self.drain()
        rings, self._rings = self._rings, {}
        for index in rings:
            self._loop.unwatch(self._calls[index])
            if self._socket is not None:
                self._ask(u.GET_VRING_BASE, u.VRING_STATE.pack(index, 0))

    def reaches(self, gpa: int, size: int) -> bool:
        """Whether the other side has all of `[gpa, gpa + size)`: it has RAM, and no ROM."""
        return any(m.gpa <= gpa and gpa + size <= m.gpa + m.size for m in self._memory)

    def has_slot(self, index: int) -> bool:
        """Whether `add()` takes a request."""
        return self.connected and index in self._rings and not self._rings[index].full

    def add(self, index: int, segments: Sequence[Segment]) -> int:
        """Ask for something; only after `has_slot()`. The number that `done()` calls it by."""
        return self._rings[index].add(segments)

    def kick(self, index: int) -> None:
        """Tell the other side of what was added."""
        if index in self._rings and self._rings[index].wants_kick():
            with suppress(BlockingIOError):  # it is told already, or has filled it by itself
                os.eventfd_write(self._kicks[index], 1)

    def done(self, index: int) -> list[tuple[int, int]]:
        """What was done since: numbers, and bytes written. Raises HostError."""
        try:
            return self._rings[index].done() if index in self._rings else []
        except HostError as error:
            raise self._error(str(error).partition(";")[0]) from error

    def when_done(self, index: int, function: Callable[[], None]) -> None:
        """Call `function` once, from the event loop, when something is done."""

        def called() -> None:
            with suppress(BlockingIOError):  # the other side has it, too, and may read it
                os.eventfd_read(self._calls[index])
            function()

        self._loop.watch(self._calls[index], called)

    def close(self) -> None:
        """The other side sees the end of the connection."""
        self._drop()
        for fd in (*self._kicks, *self._calls):
            self._loop.unwatch(fd)
            os.close(fd)
        self._kicks, self._calls = [], []
        self._ring_memory.close()
