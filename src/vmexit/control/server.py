"""Sockets that other programs connect to, or that we connect to them by."""

import math
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Self

from vmexit.core.errors import ConfigError, VmexitError, quoted, shown
from vmexit.core.threads import start_without_signals
from vmexit.core.unix_socket import SocketFile

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine

# A client that does not read for so long, in seconds, is cut off.
_PATIENCE = 10
# How long, in seconds, a client is waited for at the end.
_GRACE = 1
# So many may come at once, before they are looked at.
_BACKLOG = 64


class Address(NamedTuple):
    """`unix:PATH` or `tcp:HOST:PORT`; `listens`, or else connects to one who does."""

    path: str
    host: str
    port: int
    listens: bool

    @classmethod
    def parse(cls, text: str, option: str) -> "Address":
        """From what the user gave to `option`: `WHERE[,server=off]`. Raises ConfigError."""
        where, *settings = text.split(",")
        listens = True
        for setting in settings:
            name, _, value = setting.partition("=")
            if name == "server" and value in ("on", "off"):
                listens = value == "on"
            elif (name, value) != ("wait", "off"):  # as in QEMU, where it has to be said
                raise ConfigError(
                    f"{option}: there is no {quoted(setting)}; use {option} WHERE,server=off to "
                    "connect to WHERE in place of listening there"
                )
        kind, _, rest = where.partition(":")
        if kind == "unix" and rest:
            return cls(rest, "", 0, listens)
        host, _, port = rest.rpartition(":")
        if kind == "tcp" and port.isdecimal() and int(port) < 1 << 16:
            return cls("", host.strip("[]") or "127.0.0.1", int(port), listens)
        raise ConfigError(
            f"{option} {quoted(where)} is no address; use unix:PATH or tcp:127.0.0.1:PORT"
        )

    def __str__(self) -> str:
        return f"unix:{shown(self.path)}" if self.path else f"tcp:{shown(self.host)}:{self.port}"


class Server:
    """Serves up to `most` clients at once, each in a thread of its own.

    `serve(client)` gets a blocking socket, which is closed once it returns. One more client than
    there may be goes to `refuse`, and is closed.
    """

    def __init__(
        self,
        address: Address,
        serve: Callable[[socket.socket], None],
        name: str,
        *,
        most: int = 16,
        refuse: Callable[[socket.socket], None] = lambda client: None,
    ) -> None:
        """Listen, or connect. Raises ConfigError if that cannot be."""
        self._serve = serve
        self._refuse = refuse
        self._name = name
        self._most = most
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._process = os.getpid()
        self._gone = threading.Event()
        self._listener: socket.socket | None = None
        self._file: SocketFile | None = None
        self.where = str(address)
        try:
            family, place = _resolve(address)
            end = socket.socket(family, socket.SOCK_STREAM)
            try:
                self._open(end, address, place)
            except BaseException:
                end.close()
                raise
        except (OSError, OverflowError, ValueError) as error:
            verb = "listen at" if address.listens else "connect to"
            why = (error.strerror if isinstance(error, OSError) else None) or error
            raise ConfigError(f"cannot {verb} {self.where}: {why}; use another address") from error

    def _open(self, end: socket.socket, address: Address, place: "_Place") -> None:
        if not address.listens:
            end.connect(place)
            self._begin(end)
            return
        if address.path:
            self._file = SocketFile(end, address.path)
        else:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end.bind(place)
            host, port = end.getsockname()[:2]
            self.where = f"tcp:{host}:{port}"
        end.listen(_BACKLOG)
        self._listener = end
        self._thread = self._new_thread(self._accept, end)
        start_without_signals(self._thread)

    def _new_thread(
        self, function: Callable[[socket.socket], None], end: socket.socket
    ) -> threading.Thread:
        name = f"vmexit-{self._name}"
        return threading.Thread(target=function, args=(end,), name=name, daemon=True)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                if self._closing or listener.fileno() < 0:
                    return
                # No more descriptors, perhaps: wait until a client goes.
                self._wait_for_one_to_go()
                continue
            self._begin(client)

    def _wait_for_one_to_go(self) -> None:
        self._gone.clear()
        self._gone.wait(1)

    def _begin(self, client: socket.socket) -> None:
        client.settimeout(None)
        _cut_off_after(client, _PATIENCE)
        with self._lock:
            full = len(self._clients) >= self._most
            if not full and not self._closing:
                thread = self._new_thread(self._run, client)
                self._clients[client] = thread
                try:
                    start_without_signals(thread)
                except RuntimeError:  # no thread can be made
                    del self._clients[client]
                    client.close()
                return
        with client, suppress(OSError):
            self._refuse(client)

    def _run(self, client: socket.socket) -> None:
        try:
            self._serve(client)
        except OSError:
            return  # it has gone
        finally:
            with self._lock:
                self._clients.pop(client, None)
            client.close()
            self._gone.set()

    def close(self) -> None:
        """Cut all clients off and wait for their threads; a Unix socket's path is removed."""
        if os.getpid() != self._process:
            self._drop()
            return
        with self._lock:
            self._closing = True
            self._gone.set()
            clients = dict(self._clients)
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # which ends accept()
            self._thread.join()
            self._listener.close()
            if self._file is not None:
                self._file.remove()
        clients = {c: t for c, t in clients.items() if t is not threading.current_thread()}
        # To read the end tells a client's thread; what it has to say still may go out.
        for how, end in (
            (socket.SHUT_RD, time.monotonic() + _GRACE),
            (socket.SHUT_RDWR, math.inf),
        ):
            for client in clients:
                with suppress(OSError):
                    client.shutdown(how)
            for thread in clients.values():
                thread.join(min(max(0, end - time.monotonic()), threading.TIMEOUT_MAX))

    def _drop(self) -> None:
        """In a fork: the sockets are still its parent's, and it has none of the threads."""
        if self._listener is not None:
            self._listener.close()
        for client in tuple(self._clients):
            client.close()


class Service:
    """A protocol that is served from when this is made until `close()`, which `with` calls."""

    _server: Server
    _machine: "Machine"

    @property
    def where(self) -> str:
        """The address, with the port that port 0 has become."""
        return self._server.where

    def close(self) -> None:
        """Cut all clients off, whatever they wait for, and listen no more.

        Raises VmexitError in a vCPU's thread, for which a client may wait.
        """
        if self._machine.in_access:
            raise VmexitError("a server cannot be closed from within an access; stop() the machine")
        self._finish()
        self._server.close()

    def _finish(self) -> None:
        """What there is to do before clients are cut off."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_Place = str | tuple[str | int | bytes, ...]


def _resolve(address: Address) -> tuple[socket.AddressFamily, _Place]:
    if address.path:
        return socket.AF_UNIX, address.path
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    return found[0], found[4]


def _cut_off_after(client: socket.socket, seconds: int) -> None:
    """Have sending fail if the other end does not read for so long."""
    value = seconds.to_bytes(8, "little") + bytes(8)  # struct timeval
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
