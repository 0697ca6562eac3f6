"""`QmpServer`: a machine that other programs steer by QMP."""

import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from vmexit.control.qmp.events import Relay
from vmexit.control.qmp.session import Session, Sessions, refuse
from vmexit.control.server import Address, Server, Service
from vmexit.core.exit_stats import ExitStats
from vmexit.machine.machine import Machine

MOST_CLIENTS = 16
# How long the end waits for clients to read what was sent, in seconds.
_PATIENCE = 2.0


class Served(NamedTuple):
    """What all clients of one server share."""

    vm: Machine
    name: str
    """What the user calls the machine; may be empty."""
    exits: ExitStats | None
    """Who counts exits, if somebody does."""
    relay: Relay
    ending: Callable[[], bool]
    """Whether all is about to be closed: nothing should wait any more."""


class QmpServer(Service):
    """Listens for clients, or connects to one, from now until `close()`.

    >>> with Machine(memory="1M") as vm, QmpServer(vm, "unix:qmp.sock"):
    ...     vm.run()
    """

    def __init__(
        self, vm: Machine, address: str, *, name: str = "", exits: ExitStats | None = None
    ) -> None:
        """`address` is `unix:PATH` or `tcp:HOST:PORT`, with `,server=off` to connect there.

        `exits` is the observer of the machine that `x-query-exits` asks. Raises
        ConfigError for an address that cannot be.
        """
        self._machine = vm
        self._sessions = Sessions()
        self._relay = Relay(vm, self._sessions)
        self._closing = threading.Event()
        self._served = Served(vm, name, exits, self._relay, self._closing.is_set)
        where = Address.parse(address, "--qmp")
        self._server = Server(where, self._serve, "qmp", most=MOST_CLIENTS, refuse=refuse)
        self._unsubscribe = vm.subscribe(self._relay.tell)

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

    def _finish(self) -> None:
        """Let answers and events reach who reads them."""
        self._unsubscribe()
        end = time.monotonic() + _PATIENCE
        for session in self._sessions:
            session.finish(end)
        self._closing.set()
