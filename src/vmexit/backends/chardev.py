"""Character backends: where the bytes of a serial port or a debug console go to and come from.

Input is what is there now. Output to a socket or a pseudo-terminal that nobody takes is dropped;
standard output waits for its reader, as any program does. No wait outlasts the end of a run:
`ending` tells of that.
"""

import math
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from vmexit.core.errors import ConfigError, HostError

_PATIENCE = 1.0  # seconds for a slow reader
_SLICE = 0.02  # seconds between two looks at `ending`
# So much goes into a pipe that has room at all, without waiting (POSIX: PIPE_BUF is at least this).
_PIECE = 512

Ending = Callable[[], bool]


def _never() -> bool:
    return False


def _wait_writable(fd: int, patience: float, ending: Ending) -> bool:
    """Wait until `fd` takes data; False after `patience` seconds, or when the run ends."""
    until = time.monotonic() + patience
    while not select.select([], [fd], [], _SLICE)[1]:
        if ending() or time.monotonic() >= until:
            return False
    return True


def _no_output(error: OSError) -> HostError:
    return HostError(f"cannot write the guest's output: {error.strerror}; send it elsewhere")


class Chardev(Protocol):
    """A place for bytes. `where` tells a user how to reach it; empty if that is plain."""

    where: str

    def write(self, data: bytes) -> None: ...
    def read(self, size: int) -> bytes: ...
    def close(self) -> None: ...


def open_chardev(spec: str, ending: Ending = _never) -> Chardev:
    """`stdio`, `null`, `file:PATH`, `unix:PATH`, `tcp:HOST:PORT` or `pty`.

    Output is not waited for once `ending()` is true. Raises ConfigError for anything else,
    HostError if the host refuses.
    """
    kind, _, rest = spec.partition(":")
    if spec == "null":
        return Null()
    if spec == "stdio":
        return Stdio(ending)
    if spec == "pty":
        return Pty()
    if kind == "file" and rest:
        return File(rest)
    if kind == "unix" and rest:
        return Listener(socket.AF_UNIX, rest, ending)
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        if host and port.isdecimal() and int(port) < 1 << 16:
            return Listener(socket.AF_INET, (host, int(port)), ending)
    raise ConfigError(
        f"{spec!r} is no place for a serial port; use stdio, null, file:PATH, unix:PATH, "
        "tcp:HOST:PORT or pty"
    )


class Null:
    """Nowhere."""

    where = ""

    def write(self, data: bytes) -> None:
        """Drop it."""

    def read(self, size: int) -> bytes:
        return b""

    def close(self) -> None:
        """Nothing is held."""


class _Descriptor:
    """Writing to, and reading from, descriptors, without ever waiting for long."""

    where = ""

    def __init__(self, out: int, into: int) -> None:
        self._out = out
        self._in = into

    def write(self, data: bytes) -> None:
        while data and self._out >= 0:
            try:
                data = data[os.write(self._out, data) :]
            except OSError as error:
                raise _no_output(error) from error

    def read(self, size: int) -> bytes:
        if self._in < 0 or not select.select([self._in], [], [], 0)[0]:
            return b""
        try:
            return os.read(self._in, size)
        except OSError:  # EIO: the other end of a terminal is closed; it may open again
            return b""

    def close(self) -> None:
        """Close what was opened."""


class Stdio(_Descriptor):
    """The process's standard input and output."""

    def __init__(self, ending: Ending = _never) -> None:
        if sys.stdout is not None:
            sys.stdout.flush()
        self._ending = ending
        super().__init__(1, 0)

    def write(self, data: bytes) -> None:
        try:
            while data and _wait_writable(self._out, math.inf, self._ending):
                with suppress(BlockingIOError):  # somebody made it non-blocking, and it is full
                    data = data[os.write(self._out, data[:_PIECE]) :]
        except OSError as error:
            raise _no_output(error) from error

    def read(self, size: int) -> bytes:
        if self._in >= 0 and os.isatty(self._in) and os.tcgetpgrp(self._in) != os.getpgrp():
            return b""  # in the background a read from the terminal would stop the process
        try:
            ready = self._in >= 0 and select.select([self._in], [], [], 0)[0]
        except (OSError, ValueError):  # standard input was closed before we began
            self._in = -1
            return b""
        data = super().read(size) if ready else b""
        if ready and not data:
            self._in = -1  # end of file
        return data


class File(_Descriptor):
    """A file, emptied first; input there is none."""

    def __init__(self, path: str) -> None:
        try:
            out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; use another path") from error
        super().__init__(out, -1)

    def close(self) -> None:
        if self._out >= 0:
            os.close(self._out)
            self._out = -1


class Pty(_Descriptor):
    """A new pseudo-terminal; `where` is the path of its other end."""

    def __init__(self) -> None:
        import tty

        try:
            master, self._slave = os.openpty()
        except OSError as error:
            raise HostError(f"cannot make a pseudo-terminal: {error.strerror}") from error
        tty.setraw(self._slave)  # held open: with no other end at all, a read would fail
        os.set_blocking(master, False)
        self.where = os.ttyname(self._slave)
        super().__init__(master, master)

    def write(self, data: bytes) -> None:
        try:
            os.write(self._out, data)
        except BlockingIOError:
            return  # nobody reads at the other end

    def close(self) -> None:
        if self._out >= 0:
            os.close(self._out)
            os.close(self._slave)
            self._out = self._in = -1


class Listener:
    """A listening socket. It serves one client at a time; output with no client is dropped."""

    def __init__(
        self,
        family: socket.AddressFamily,
        address: str | tuple[str, int],
        ending: Ending = _never,
    ) -> None:
        self._ending = ending
        self._client: socket.socket | None = None
        self._path = address if isinstance(address, str) else ""
        self._server = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == socket.AF_INET:
                self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._server.bind(address)
        except (OSError, OverflowError) as error:
            self._server.close()
            shown = self._path or "{}:{}".format(*address)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ConfigError(f"cannot listen at {shown}: {reason}; use another address") from error
        self._server.listen(1)
        self._server.setblocking(False)
        name = self._server.getsockname()
        self.where = f"unix:{name}" if self._path else f"tcp:{name[0]}:{name[1]}"

    def _connected(self) -> socket.socket | None:
        if self._client is None:
            try:
                self._client, _ = self._server.accept()
                self._client.setblocking(False)
            except OSError:  # nobody there yet, or gone again already
                return None
        return self._client

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def write(self, data: bytes) -> None:
        client = self._connected()
        while data and client is not None:
            try:
                data = data[client.send(data, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                if not _wait_writable(client.fileno(), _PATIENCE, self._ending):
                    return
            except OSError:
                self._drop()
                return

    def read(self, size: int) -> bytes:
        client = self._connected()
        if client is None:
            return b""
        try:
            data = client.recv(size)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._drop()
        return data

    def close(self) -> None:
        """Stop listening; the path of a Unix socket is removed."""
        self._drop()
        if self._server.fileno() >= 0:
            self._server.close()
            if self._path:
                Path(self._path).unlink(missing_ok=True)
