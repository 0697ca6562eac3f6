"""The socket that gdb connects to: one debugger at a time."""

import socket
import threading
from typing import TYPE_CHECKING

from vmexit.control.gdb.packet import packet
from vmexit.control.gdb.session import Session
from vmexit.control.gdb.target import Target
from vmexit.control.server import Address, Server, Service

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine


class GdbServer(Service):
    """Lets gdb debug `machine`: `target remote` with what `where` says.

    A debugger that attaches pauses the machine; one that goes lets it run again.
    """

    def __init__(self, machine: "Machine", where: str) -> None:
        """`where` is `tcp:HOST:PORT` or `unix:PATH`, with `,arch=x86-64`, `i386` or `i8086`.

        Raises ConfigError.
        """
        parts = where.split(",")
        names = [part.removeprefix("arch=") for part in parts if part.startswith("arch=")]
        rest = [part for part in parts if not part.startswith("arch=")]
        self._machine = machine
        self._closing = threading.Event()
        self._target = Target(names[-1] if names else _architecture(machine))
        address = Address.parse(",".join(rest), "--gdb")
        self._server = Server(address, self._serve, "gdb", most=1, refuse=_refuse)

    def _serve(self, client: socket.socket) -> None:
        Session(self._machine, self._target, client, self._closing.is_set).serve()

    def _finish(self) -> None:
        self._closing.set()


def _architecture(machine: "Machine") -> str:
    """What the guest is, as far as its configuration tells; x86-64 for what has all of it."""
    config = machine.config
    if config.kernel is None and config.firmware is None:
        return {"real": "i8086", "protected": "i386"}.get(config.mode, "x86-64")
    return "x86-64"


def _refuse(client: socket.socket) -> None:
    """Another debugger is here already: an error in place of an answer, which gdb shows."""
    client.sendall(b"+" + packet(b"E.another debugger is attached already"))
