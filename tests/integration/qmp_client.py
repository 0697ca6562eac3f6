"""QEMU's own client of QMP, one call after the other; and machines that listen for it."""

import asyncio
import json
import socket
from collections.abc import Coroutine
from typing import Any, TypeVar

from linux_guest import SECONDS
from qemu.qmp import QMPClient

_T = TypeVar("_T")


class Client:
    """`qemu.qmp.QMPClient`, connected and negotiated."""

    def __init__(self, where: str | tuple[str, int]) -> None:
        self._loop = asyncio.new_event_loop()
        self.qmp = QMPClient("test")
        self._wait(self.qmp.connect(where))

    def _wait(self, what: Coroutine[Any, Any, _T]) -> _T:
        return self._loop.run_until_complete(asyncio.wait_for(what, SECONDS))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._wait(self.qmp.disconnect())
        except EOFError:
            pass  # it has gone first
        finally:
            self._loop.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """What `command` returns; an underscore in the name of an argument is a dash."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._wait(self.qmp.execute(command, given or None))

    def monitor(self, line: str) -> str:
        """What the monitor for people says to `line`."""
        return self.execute("human-monitor-command", command_line=line)

    def event(self, name: str) -> dict[str, Any]:
        """The data of the next event `name`; those before it are passed over."""
        while True:
            message = self._wait(self.qmp.events.get())
            if message["event"] == name:
                return message.get("data", {})


class Raw:
    """A client that says whatever it likes."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SECONDS)
        self.socket.connect(path)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self.socket.close()

    def read(self) -> Any:
        """The next message; None at the end."""
        line = self._file.readline()
        return json.loads(line) if line else None

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def say(self, data: bytes) -> Any:
        """Send a line; what is answered."""
        self.send(data + b"\n")
        return self.read()

    def negotiated(self) -> "Raw":
        assert "QMP" in self.read()
        assert self.say(b'{"execute":"qmp_capabilities"}') == {"return": {}}
        return self
