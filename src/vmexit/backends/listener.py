"""A socket that a client connects to, as the other end of a character device."""

import socket
import threading
from collections.abc import Callable

from vmexit.backends.wait import Ending, Slow, never, reason
from vmexit.core.errors import ConfigError, shown
from vmexit.core.loop import EventLoop
from vmexit.core.unix_socket import SocketFile

_PAUSE = 100 * 10**6  # ns before an accept() is tried again that this process cannot do


class Listener:
    """A listening socket. It serves one client at a time; output with no client is dropped.

    `address` is the path of a Unix socket, or host and port. Raises ConfigError.
    A client that has closed its sending side still gets output, until another one comes.
    """

    def __init__(
        self,
        address: str | tuple[str, int],
        loop: EventLoop,
        ending: Ending = never,
    ) -> None:
        self._loop = loop
        self._slow = Slow(ending)
        self._waiting: Callable[[], None] | None = None  # called when there may be input
        self._lock = threading.Lock()  # vCPUs may come at once; not held while waiting
        self._client: socket.socket | None = None
        self._silent = False  # the client has said that it sends no more
        self._rests = False  # nothing is waited for, as it would come again and again
        self._timer = loop.timer(self._go_on)
        self._file: SocketFile | None = None
        self._path = address if isinstance(address, str) else ""
        where = shown(address if isinstance(address, str) else "{}:{}".format(*address))
        try:
            family, place = _resolve(address)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"cannot listen at {where}: {reason(error)}; use another address"
            ) from error
        self._server = socket.socket(family, socket.SOCK_STREAM)
        try:
            if not self._path:
                self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._server.bind(place)
            else:
                self._file = SocketFile(self._server, self._path)
            self._server.listen(1)
        except (OSError, OverflowError, ValueError) as error:
            self._server.close()
            raise ConfigError(
                f"cannot listen at {where}: {reason(error)}; use another address"
            ) from error
        self._server.setblocking(False)
        name = self._server.getsockname()
        self.where = f"unix:{shown(self._path)}" if self._path else f"tcp:{name[0]}:{name[1]}"

    def _connected(self) -> socket.socket | None:
        if self._client is None or self._silent:
            try:
                client, _ = self._server.accept()
            except BlockingIOError:  # nobody there yet, or gone again already
                return self._client
            except OSError:
                if self._server.fileno() >= 0:  # no more descriptors: it stays ready
                    self._rests = True
                    self._timer.set(self._loop.now() + _PAUSE)
                return self._client
            self._drop()
            client.setblocking(False)
            self._client = client
            self._watch()
        return self._client

    def _drop(self) -> None:
        if self._client is not None:
            self._loop.unwatch(self._client.fileno())
            self._client.close()
            self._client = None
        self._silent = False
        self._slow.took()
        self._watch()

    def when_readable(self, function: Callable[[], None]) -> None:
        """Call `function` once, from the loop, when a client has come, or has sent something."""
        with self._lock:
            self._waiting = function
            self._watch()

    def _watch(self) -> None:
        if self._waiting is not None and self._server.fileno() >= 0 and not self._rests:
            client = self._client
            source = self._server if client is None or self._silent else client
            self._loop.watch(source.fileno(), self._arrived)

    def _go_on(self) -> None:
        with self._lock:
            self._rests = False
            self._watch()

    def _arrived(self) -> None:
        function, self._waiting = self._waiting, None
        if function is not None:
            function()

    def write(self, data: bytes) -> None:
        while data:
            with self._lock:
                client = self._connected()
                if client is None:
                    return
                try:
                    data = data[client.send(data, socket.MSG_NOSIGNAL) :]
                    self._slow.took()
                    continue
                except BlockingIOError:
                    fd = client.fileno()
                except OSError:
                    self._drop()
                    return
            if not self._slow.wait(fd):
                return

    def read(self, size: int) -> bytes:
        with self._lock:
            client = self._connected()
            if client is None or self._silent:
                return b""
            try:
                data = client.recv(size)
            except BlockingIOError:
                return b""
            except OSError:
                self._drop()
                return b""
            self._silent = not data
            return data

    def running(self, runs: bool) -> None:
        """It makes no difference."""

    def size(self) -> None:
        """It is no terminal."""

    def close(self) -> None:
        """Stop listening; the path of a Unix socket is removed."""
        self._waiting = None
        self._timer.set(None)
        self._drop()
        self._loop.unwatch(self._server.fileno())
        if self._server.fileno() >= 0:
            self._server.close()
            if self._file is not None:
                self._file.remove()


def _resolve(
    address: str | tuple[str, int],
) -> tuple[socket.AddressFamily, str | tuple[str | int | bytes, ...]]:
    if isinstance(address, str):
        return socket.AF_UNIX, address
    host, port = address
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return found[0], found[4]
