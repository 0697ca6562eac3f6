"""`QmpServer`: a machine that other programs steer by QMP."""

import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from vmexit.control.qmp.events import Relay
from vmexit.control.qmp.exits import ExitCounts
from vmexit.control.qmp.session import Session, Sessions, refuse
from vmexit.control.server import Address, Server
from vmexit.machine.machine import Machine

MOST_CLIENTS = 16
# How long the end waits for clients to read what was sent, in seconds.
_PATIENCE = 2.0


class Served(NamedTuple):
    """What all clients of one server share."""

    vm: Machine
    name: str
    """What the user calls the machine; may be empty."""
    exits: ExitCounts | None
    """Who counts exits, if somebody does."""
    relay: Relay
    ending: Callable[[], bool]
    """Whether all is about to be closed: nothing should wait any more."""


class QmpServer:
    """Listens for clients, or connects to one, from now until `close()`.

    >>> with Machine(memory="1M") as vm, QmpServer(vm, "unix:qmp.sock"):
    ...     vm.run()
    """

    def __init__(self, vm: Machine, address: str, *, name: str = "", exits: object = None) -> None:
        """`address` is `unix:PATH` or `tcp:HOST:PORT`, with `,server=off` to connect there.

        `exits` is an observer of the machine that `x-query-exits` asks: `ExitStats`. Raises
        ConfigError for an address that cannot be.
        """
        self._sessions = Sessions()
        self._relay = Relay(vm, self._sessions)
        counts = exits if isinstance(exits, ExitCounts) else None
        self._closing = threading.Event()
        self._served = Served(vm, name, counts, self._relay, self._closing.is_set)
        where = Address.parse(address, "--qmp")
        self._server = Server(where, self._serve, "qmp", most=MOST_CLIENTS, refuse=refuse)
        self._unsubscribe = vm.subscribe(self._relay.tell)

    @property
    def where(self) -> str:
        """The address, with the port that port 0 has become."""
        return self._server.where

    def _serve(self, client: socket.socket) -> None:
        session = Session(client, self._served)
        self._sessions.add(session)
        try:
            session.run()
        finally:
            self._sessions.remove(session)

    def tell_end(self) -> None:
        """The program is about to end, and not by the guest's doing nor by `quit`: tell so."""
        self._relay.tell_end()

    def close(self) -> None:
        """Let answers and events reach who reads them, then cut all clients off."""
        self._unsubscribe()
        end = time.monotonic() + _PATIENCE
        for session in self._sessions:
            session.finish(end)
        self._closing.set()
        self._server.close()

    def __enter__(self) -> "QmpServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
