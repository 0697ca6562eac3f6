"""Character backends: where the bytes of a serial port or a debug console go to and come from.

Input is what is there now. Output to a socket or a pseudo-terminal that nobody takes is dropped;
standard output waits for its reader, as any program does. No wait outlasts the end of a run:
`ending` tells of that.
"""

import errno
import math
import os
import select
import socket
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from vmexit.core.errors import ConfigError, HostError, shown

_PATIENCE = 1.0  # seconds for a slow reader
_SLICE = 0.02  # seconds between two looks at `ending`
# So much goes into a pipe that has room at all, without waiting (POSIX: PIPE_BUF is at least this).
_PIECE = 512

Ending = Callable[[], bool]


def _never() -> bool:
    return False


def _ready(fd: int, event: int, seconds: float = 0) -> bool:
    """Whether `fd` has the event (or an error to report) now, or within `seconds`."""
    poll = select.poll()  # unlike select(), for any number of open descriptors
    poll.register(fd, event)
    return bool(poll.poll(seconds * 1000))


def _wait_writable(fd: int, patience: float, ending: Ending) -> bool:
    """Wait until `fd` takes data; False after `patience` seconds, or when the run ends."""
    until = time.monotonic() + patience
    while not _ready(fd, select.POLLOUT, _SLICE):
        if ending() or time.monotonic() >= until:
            return False
    return True


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
        return File(rest, ending)
    if kind == "unix" and rest:
        return Listener(socket.AF_UNIX, rest, ending)
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        if host and port.isdecimal() and len(port) <= 5 and int(port) < 1 << 16:
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
    """Writing to, and reading from, descriptors."""

    where = ""

    def __init__(self, out: int, into: int, ending: Ending) -> None:
        self._out = out
        self._in = into
        self._ending = ending

    def write(self, data: bytes) -> None:
        try:
            while data and self._out >= 0:
                if not _wait_writable(self._out, math.inf, self._ending):
                    return
                with suppress(BlockingIOError):  # somebody made it non-blocking, and it is full
                    data = data[os.write(self._out, data[:_PIECE]) :]
        except OSError as error:
            raise HostError(
                f"cannot write the guest's output: {error.strerror}; send it elsewhere"
            ) from error

    def read(self, size: int) -> bytes:
        if self._in < 0 or not _ready(self._in, select.POLLIN):
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
        super().__init__(1, 0, ending)

    def read(self, size: int) -> bytes:
        if self._in < 0 or self._in_background() or not _ready(self._in, select.POLLIN):
            return b""
        data = super().read(size)
        if not data:
            self._in = -1  # end of file
        return data

    def _in_background(self) -> bool:
        """Whether to read would stop the process: its terminal is some other job's now."""
        try:
            return os.isatty(self._in) and os.tcgetpgrp(self._in) != os.getpgrp()
        except OSError:  # not the terminal of this session, which stops nobody
            return False


class File(_Descriptor):
    """A file, emptied first; input there is none."""

    def __init__(self, path: str, ending: Ending = _never) -> None:
        try:
            # Not blocking: a FIFO without a reader would hold us up for ever.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
            out = os.open(path, flags, 0o666)
        except (OSError, ValueError) as error:
            reason = {errno.ENXIO: "nobody reads it"}.get(_number(error), _reason(error))
            raise ConfigError(f"cannot write {shown(path)}: {reason}; use another path") from error
        super().__init__(out, -1, ending)

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
            raise HostError(
                f"cannot make a pseudo-terminal: {error.strerror}; use --serial stdio"
            ) from error
        tty.setraw(self._slave)  # held open: with no other end at all, a read would fail
        os.set_blocking(master, False)
        self.where = os.ttyname(self._slave)
        super().__init__(master, master, _never)

    def write(self, data: bytes) -> None:
        if self._out >= 0:
            with suppress(BlockingIOError):  # nobody reads at the other end
                os.write(self._out, data)

    def close(self) -> None:
        if self._out >= 0:
            os.close(self._out)
            os.close(self._slave)
            self._out = self._in = -1


class Listener:
    """A listening socket. It serves one client at a time; output with no client is dropped.

    A client that has closed its sending side still gets output, until another one comes.
    """

    def __init__(
        self,
        family: socket.AddressFamily,
        address: str | tuple[str, int],
        ending: Ending = _never,
    ) -> None:
        self._ending = ending
        self._client: socket.socket | None = None
        self._silent = False  # the client has said that it sends no more
        self._stuck = False  # it did not read what was there to read
        self._path = address if isinstance(address, str) else ""
        self._server = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == socket.AF_INET:
                self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                os.fchmod(self._server.fileno(), 0o600)  # whoever connects is at the console
                _remove_stale(self._path)
            self._server.bind(address)
            self._server.listen(1)
        except (OSError, OverflowError, ValueError) as error:
            self._server.close()
            where = shown(self._path or "{}:{}".format(*address))
            raise ConfigError(
                f"cannot listen at {where}: {_reason(error)}; use another address"
            ) from error
        self._server.setblocking(False)
        name = self._server.getsockname()
        self.where = f"unix:{name}" if self._path else f"tcp:{name[0]}:{name[1]}"

    def _connected(self) -> socket.socket | None:
        if self._client is None or self._silent:
            try:
                client, _ = self._server.accept()
            except OSError:  # nobody there yet, or gone again already
                return self._client
            self._drop()
            client.setblocking(False)
            self._client = client
        return self._client

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self._silent = self._stuck = False

    def write(self, data: bytes) -> None:
        client = self._connected()
        while data and client is not None:
            try:
                data = data[client.send(data, socket.MSG_NOSIGNAL) :]
                self._stuck = False
            except BlockingIOError:
                # Waited for once; from then on what does not go is dropped, until some does.
                patience = 0 if self._stuck else _PATIENCE
                if not _wait_writable(client.fileno(), patience, self._ending):
                    self._stuck = True
                    return
            except OSError:
                self._drop()
                return

    def read(self, size: int) -> bytes:
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

    def close(self) -> None:
        """Stop listening; the path of a Unix socket is removed."""
        self._drop()
        if self._server.fileno() >= 0:
            self._server.close()
            if self._path:
                Path(self._path).unlink(missing_ok=True)


def _number(error: OSError | ValueError) -> int:
    return (error.errno or 0) if isinstance(error, OSError) else 0


def _reason(error: OSError | OverflowError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or shown(str(error))


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at any more: its owner was killed."""
    if "\0" in path:
        raise ValueError("a path has no zero byte")  # the rest of it would be passed over
    try:
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except ConnectionRefusedError:
        Path(path).unlink(missing_ok=True)
    except OSError:
        return  # not there, or in use: bind() tells
