"""One client: greeting, negotiation, its commands one after the other, and events."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from vmexit.backends.wait import ready
from vmexit.control.qmp import commands, errors
from vmexit.control.qmp.outbox import Outbox
from vmexit.control.qmp.typed import arguments, to_wire
from vmexit.control.qmp.version import version_info
from vmexit.control.qmp.wire import Json, Malformed, MessageReader, encode
from vmexit.core.errors import VmexitError

if TYPE_CHECKING:
    from vmexit.control.qmp.server import Served

_PIECE = 1 << 16
_MOST_DESCRIPTORS = 16
_NEGOTIATE = "qmp_capabilities"

_MEMBERS = ("execute", "exec-oob", "arguments", "id")


class Session:
    """What commands know of the client whose they are, and the machine that they are for."""

    def __init__(self, client: socket.socket, served: "Served") -> None:
        """A thread sends from now on; `run()` receives."""
        self._client = client
        self._received: list[int] = []
        self.served = served
        self.vm = served.vm
        self.negotiated = False
        """Whether the client has done with the negotiation: only then it gets events."""
        self.descriptors: dict[str, int] = {}
        """What the client has sent by `getfd`, by name."""
        self._busy = threading.Lock()
        self._out = Outbox(client)

    def run(self) -> None:
        """Until the client goes, or is cut off."""
        try:
            self._send({"QMP": {"version": to_wire(version_info()), "capabilities": []}})
            reader = MessageReader()
            while data := self._receive():
                for message in reader.feed(data):
                    with self._busy:
                        self._send(self._answer(message))
                    if not self._out.room():
                        return
        except OSError:
            return  # it has gone
        finally:
            self._out.close()
            for descriptor in (*self._received, *self.descriptors.values()):
                os.close(descriptor)

    def _receive(self) -> bytes:
        # A TCP socket has no descriptors, and that is all.
        data, descriptors, _, _ = socket.recv_fds(
            self._client, _PIECE, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        if descriptors:
            self._close_received()  # as in QEMU: the last that came are there
            self._received = list(descriptors)
        return data

    def _close_received(self) -> None:
        for descriptor in self._received:
            os.close(descriptor)
        self._received = []

    def take_descriptor(self) -> int:
        """The first descriptor that came with the client's messages. Raises QmpError."""
        if not self._received:
            raise errors.QmpError("No file descriptor supplied via SCM_RIGHTS")
        return self._received.pop(0)

    def gone(self) -> bool:
        """Whether the client has closed the connection, so that nobody waits for an answer."""
        return ready(self._client.fileno(), 0)  # hang-ups and errors are told unasked (poll(2))

    def event(self, data: bytes, key: str) -> None:
        """Tell the client of an event; from any thread, and without waiting."""
        if self.negotiated:
            self._out.put(data, key)

    def finish(self, end: float) -> None:
        """Let the command under way be answered, and all be sent, until then (monotonic)."""
        if self._busy.acquire(timeout=max(0.0, end - time.monotonic())):
            self._busy.release()
        self._out.flush(end - time.monotonic())

    def _send(self, message: Json) -> None:
        self._out.put(encode(message))

    def _answer(self, message: Json | Malformed) -> Json:
        if isinstance(message, Malformed):
            return _error(errors.QmpError(f"JSON parse error, {message.reason}"))
        answer: dict[str, Json] = {}
        if isinstance(message, dict) and "id" in message:
            answer["id"] = message["id"]
        try:
            return {"return": self._execute(message)} | answer
        except VmexitError as error:
            return _error(error) | answer

    def _execute(self, message: Json) -> Json:
        """Raises VmexitError."""
        name, given = _command(message)
        command = commands.find(name)
        if not self.negotiated and name != _NEGOTIATE:
            raise errors.CommandNotFound(f"Expecting capabilities negotiation with '{_NEGOTIATE}'")
        if command is None:
            raise errors.CommandNotFound(f"The command {name[:64]} has not been found")
        if self.negotiated and name == _NEGOTIATE:
            raise errors.CommandNotFound(
                "Capabilities negotiation is already complete, command ignored"
            )
        return to_wire(command.function(self, **arguments(command.function, given)))


def _command(message: Json) -> tuple[str, dict[str, Json]]:
    """The name of the command and its arguments. Raises QmpError."""
    if not isinstance(message, dict):
        raise errors.QmpError("QMP input must be a JSON object")
    for member in message:
        if member not in _MEMBERS:
            raise errors.QmpError(f"QMP input member '{member[:64]}' is unexpected")
    if "exec-oob" in message:
        if "execute" in message:
            raise errors.QmpError("QMP input member 'execute' clashes with 'exec-oob'")
        raise errors.QmpError("QMP input member 'exec-oob' is unexpected")
    name = message.get("execute")
    if name is None:
        raise errors.QmpError("QMP input lacks member 'execute'")
    if not isinstance(name, str):
        raise errors.QmpError("QMP input member 'execute' must be a string")
    given = message.get("arguments", {})
    if not isinstance(given, dict):
        raise errors.QmpError("QMP input member 'arguments' must be an object")
    return name, given


def _error(error: VmexitError) -> dict[str, Json]:
    kind = error.error_class if isinstance(error, errors.QmpError) else "GenericError"
    return {"error": {"class": kind, "desc": str(error)}}


class Sessions:
    """Those that there are; any thread may look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: tuple[Session, ...] = ()

    def add(self, session: Session) -> None:
        """A client has come."""
        with self._lock:
            self._all += (session,)

    def remove(self, session: Session) -> None:
        """It has gone."""
        with self._lock:
            self._all = tuple(one for one in self._all if one is not session)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._all)


def refuse(client: socket.socket) -> None:
    """Tell one client too many, who is not waited for."""
    client.setblocking(False)
    with suppress(OSError):
        client.send(encode(_error(errors.QmpError("too many clients; close another one"))))
