"""A client of QMP that asks one thing after the other."""

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping

from vmexit.control.server import Address
from vmexit.core.errors import ConfigError, HostError, VmexitError, shown

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_PATIENCE = 10.0  # seconds for an answer
# Bytes of one message: the exits of 4096 addresses take less than 1 MiB.
_MOST = 8 << 20
_PIECE = 1 << 16


class GoneError(VmexitError):
    """The machine has ended, or has closed the connection."""


class RefusedError(VmexitError):
    """The other side cannot do a command; it says why."""

    def __init__(self, why: str, error_class: str = "") -> None:
        """`error_class` is QMP's."""
        super().__init__(why)
        self.error_class = error_class


class QmpClient:
    """Connected and negotiated, until `close()`."""

    def __init__(self, where: str, asker: str = "vmexit top") -> None:
        """`where` is `unix:PATH`, `tcp:HOST:PORT`, or a path; `asker` is who was given it.

        Raises ConfigError, HostError.
        """
        if not where.startswith(("unix:", "tcp:")):
            where = f"unix:{where}"
        address = Address.parse(where, asker)
        self._name = str(address)
        self._data = bytearray()
        self._socket = self._connect(address)
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def _connect(self, address: Address) -> socket.socket:
        try:
            if not address.path:
                return socket.create_connection((address.host, address.port), _PATIENCE)
            end = socket.socket(socket.AF_UNIX)
            try:
                end.settimeout(_PATIENCE)
                end.connect(address.path)
            except BaseException:
                end.close()
                raise
            return end
        except (OSError, OverflowError, ValueError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or error
            raise ConfigError(
                f"cannot connect to {self._name}: {why}; give the address of a machine that runs "
                "with --qmp"
            ) from error

    def _greet(self) -> None:
        try:
            greeting = self._read(time.monotonic() + _PATIENCE)
        except (HostError, GoneError) as error:
            raise self._no_qmp() from error
        if not isinstance(greeting, dict) or "QMP" not in greeting:
            raise self._no_qmp()
        self.execute("qmp_capabilities")

    def _no_qmp(self) -> ConfigError:
        return ConfigError(f"{self._name} is no QMP; give what the machine's --qmp says")

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Json] | None = None,
        *,
        on_event: Callable[[dict[str, Json]], object] = lambda event: None,
        patience: float = _PATIENCE,
    ) -> Json:
        """What `command` returns, within so many seconds; events that come before are passed on.

        Raises RefusedError, GoneError, HostError.
        """
        until = time.monotonic() + patience
        message = {"execute": command} | ({"arguments": dict(arguments)} if arguments else {})
        try:
            self._socket.settimeout(_PATIENCE)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError as error:
            raise self._silent() from error
        except OSError as error:
            raise GoneError("the machine has ended") from error
        while time.monotonic() < until:
            answer = self._read(until)
            if not isinstance(answer, dict):
                raise self._no_qmp()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise _refused(answer["error"])
            on_event(answer)
        raise self._silent()  # with nothing but events

    def ended(self) -> bool:
        """Take in some of what has come by itself: events, or the end, which it tells."""
        if select.select([self._socket], [], [], 0)[0]:
            try:
                piece = self._socket.recv(_PIECE)
            except OSError:
                return True
            if not piece:
                return True
            self._data += piece
            # Nothing was asked for: whole lines are events.
            del self._data[: self._data.rfind(b"\n") + 1]
            if len(self._data) > _MOST:
                return True
        return False

    def fileno(self) -> int:
        """To wait for what comes by itself."""
        return self._socket.fileno()

    def _read(self, until: float) -> Json:
        """The next message, until then (monotonic). Raises GoneError, HostError."""
        start = 0
        while (end := self._data.find(b"\n", start)) < 0:
            start = len(self._data)
            if start > _MOST:
                raise self._no_qmp()
            try:
                left = min(until - time.monotonic(), threading.TIMEOUT_MAX)
                self._socket.settimeout(max(left, 0.001))
                piece = self._socket.recv(_PIECE)
            except TimeoutError as error:
                raise self._silent() from error
            except OSError as error:
                raise GoneError("the machine has ended") from error
            if not piece:
                raise GoneError("the machine has ended")
            self._data += piece
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        try:
            message: Json = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._no_qmp() from error
        return message

    def _silent(self) -> HostError:
        return HostError(f"{self._name} does not answer; is its machine stopped?")

    def close(self) -> None:
        """Say goodbye to nobody."""
        self._socket.close()

    def __enter__(self) -> "QmpClient":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _refused(told: Json) -> RefusedError:
    if not isinstance(told, dict):
        return RefusedError("it says not why")
    why, kind = told.get("desc"), told.get("class")
    return RefusedError(
        shown(why) if isinstance(why, str) else "it says not why",
        kind if isinstance(kind, str) else "",
    )
