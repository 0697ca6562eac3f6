"""Unix sockets as the host's side of a guest's sockets, by the convention of Firecracker.

A client of the host connects to PATH, says "CONNECT <port>", and is told "OK <port>" once the guest
has accepted. What the guest connects to at port P listens at PATH_P.
"""

import os
import resource
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from vmexit.backends.wait import ready, reason
from vmexit.core.errors import ConfigError, shown
from vmexit.core.loop import EventLoop, LoopTimer
from vmexit.core.unix_socket import SocketFile

_BACKLOG = 128
_MOST_WAITING = 64  # clients that are not the guest's yet
_PATIENCE = 30 * 10**9  # ns until such a client has to go
_PAUSE = 100 * 10**6  # ns before an accept() is tried again that this process cannot do
_PLENTY = 1 << 20  # streams
_LINE = 32  # bytes of "CONNECT 4294967295\n", and some
_LAST_PORT = 0xFFFF_FFFF
# sizeof(sockaddr_un.sun_path) with a zero byte (unix(7)), without the longest "_P".
_LONGEST = 107 - len(f"_{_LAST_PORT}")
_HUNG_UP = select.POLLHUP  # reported by poll(2) whatever was asked for


class Stream:
    """A connected socket, `vmexit.devices.virtio.vsock_connection.HostStream`."""

    def __init__(
        self,
        connected: socket.socket,
        loop: EventLoop,
        forget: "Callable[[Stream], None]",
    ) -> None:
        """`forget` is called when it is closed."""
        connected.setblocking(False)
        self._socket = connected
        self._loop = loop
        self._forget = forget
        self._twin = -1  # the same, to be watched for room, too

    def accepted(self, port: int) -> None:
        line = b"OK %d\n" % port
        if self.write(line) < len(line):
            raise ConnectionAbortedError("the client does not read")

    def read(self, size: int) -> bytes | None:
        try:
            return self._socket.recv(size)
        except BlockingIOError:
            return None
        except ConnectionResetError:  # closed without having read all, which it can do
            return b""

    def write(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def gone(self) -> bool:
        return ready(self._socket.fileno(), _HUNG_UP)

    def finish(self) -> None:
        self._shutdown(socket.SHUT_WR)

    def stop_reading(self) -> None:
        self._shutdown(socket.SHUT_RD)

    def _shutdown(self, how: int) -> None:
        with suppress(OSError):  # the other end is closed already
            self._socket.shutdown(how)

    def when_readable(self, function: Callable[[], None]) -> None:
        self._loop.watch(self._socket.fileno(), function)

    def when_writable(self, function: Callable[[], None]) -> None:
        if self._twin < 0:
            self._twin = os.dup(self._socket.fileno())
        self._loop.watch_writable(self._twin, function)

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()
        if self._twin >= 0:
            self._loop.unwatch(self._twin)
            os.close(self._twin)
            self._twin = -1
        self._forget(self)


class _Client:
    """Who has connected, and has not been taken yet."""

    def __init__(self, stream: Stream, connected: socket.socket) -> None:
        self.stream = stream
        self.deadline: LoopTimer | None = None
        self._socket = connected
        self._line = b""

    def port(self) -> int | None:
        """The port that it asks for; None if it has not asked yet.

        Raises ValueError for what is no such line, and OSError.
        """
        while not self._line.endswith(b"\n"):
            # What is behind the line is for the guest.
            try:
                seen = self._socket.recv(_LINE - len(self._line), socket.MSG_PEEK)
            except BlockingIOError:
                return None
            if not seen:
                raise ValueError("it ends, or has no end")
            line, newline, _ = seen.partition(b"\n")
            self._line += self._socket.recv(len(line + newline))
        word, port = self._line.split()
        if word.upper() != b"CONNECT" or not port.isdigit() or int(port) > _LAST_PORT:
            raise ValueError("it says something else")
        return int(port)


class VsockSockets:
    """The socket at PATH, and those at PATH_P: `vmexit.devices.virtio.vsock.VsockHost`.

    Clients wait until the guest's driver is ready, though not for ever, and not more than some.
    """

    def __init__(self, path: str, loop: EventLoop) -> None:
        """Raises ConfigError."""
        self._path = path
        self._loop = loop
        self._arrived: Callable[[], None] = lambda: None
        self._lock = threading.Lock()  # vCPUs and the loop's thread; not held while calling out
        self._streams: set[Stream] = set()
        self._waiting: set[_Client] = set()
        self._asked: deque[tuple[_Client, int]] = deque()
        self._closed = False
        # A stream has two descriptors at most; half of those that there may be stay for others.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.capacity = most // 4 if most != resource.RLIM_INFINITY else _PLENTY
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if len(os.fsencode(path)) > _LONGEST:
                raise ValueError(f"it has more than {_LONGEST} bytes")
            self._file = SocketFile(self._server, path)
            self._server.listen(_BACKLOG)
        except (OSError, ValueError) as error:
            self._server.close()
            raise ConfigError(
                f"cannot listen at {shown(path)}: {reason(error)}; use another path"
            ) from error
        self._server.setblocking(False)
        self._timer = loop.timer(self._watch)
        self._watch()

    def _watch(self) -> None:
        """Wait for clients, if there may be more."""
        with self._lock:
            if not self._closed and len(self._waiting) < _MOST_WAITING:
                self._loop.watch(self._server.fileno(), self._connected)

    def _connected(self) -> None:
        with self._lock:
            if self._closed or len(self._waiting) >= _MOST_WAITING:
                return
            try:
                connected, _ = self._server.accept()
            except BlockingIOError:  # gone again
                connected = None
            except OSError:  # no more descriptors
                self._timer.set(self._loop.now() + _PAUSE)
                return
            if connected is not None:
                client = _Client(self._stream(connected), connected)
                client.deadline = self._loop.timer(lambda: self._drop(client))
                client.deadline.set(self._loop.now() + _PATIENCE)
                self._waiting.add(client)
        if connected is not None:
            self._ask(client)
        self._watch()

    def _stream(self, connected: socket.socket) -> Stream:
        stream = Stream(connected, self._loop, self._streams.discard)
        self._streams.add(stream)
        return stream

    def _ask(self, client: _Client) -> None:
        """See whether it has said what it wants."""
        with self._lock:
            if client not in self._waiting:
                return
            try:
                port = client.port()
                if port is None:
                    client.stream.when_readable(lambda: self._ask(client))
                    return
                self._asked.append((client, port))
            except (OSError, ValueError):
                self._waits_no_more(client)
                client.stream.close()
                port = None
        if port is None:
            self._watch()
        else:
            self._arrived()

    def _drop(self, client: _Client) -> None:
        """It has waited too long."""
        with self._lock:
            if client in self._waiting:
                self._waits_no_more(client)
                client.stream.close()
        self._watch()

    def _waits_no_more(self, client: _Client) -> None:
        self._waiting.discard(client)
        if client.deadline is not None:
            client.deadline.set(None)

    # For the device.

    def listen(self, arrived: Callable[[], None]) -> None:
        self._arrived = arrived

    def accept(self) -> tuple[Stream, int] | None:
        with self._lock:
            while self._asked:
                client, port = self._asked.popleft()
                if client in self._waiting:  # still
                    self._waits_no_more(client)
                    break
            else:
                return None
        self._watch()
        return client.stream, port

    def connect(self, port: int) -> Stream:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.setblocking(False)
            connected.connect(f"{self._path}_{port}")
        except OSError:
            connected.close()
            raise
        return self._stream(connected)

    def close(self) -> None:
        """Stop listening, and close all connections."""
        with self._lock:
            self._closed = True
            self._timer.set(None)
            self._loop.unwatch(self._server.fileno())
            self._server.close()
            self._file.remove()
            for stream in list(self._streams):
                stream.close()
