"""Character backends: where the bytes of a serial port or a debug console go to and come from.

Input is what is there now. Output to a socket or a pseudo-terminal that nobody takes is dropped;
standard output waits for its reader, as any program does. No wait outlasts the end of a run:
`ending` tells of that.
"""

import errno
import math
import os
import select
import sys
from contextlib import suppress
from typing import Protocol

from vmexit.backends.wait import Ending, never, ready, reason, write_all
from vmexit.core.errors import ConfigError, HostError, shown


class Chardev(Protocol):
    """A place for bytes. `where` tells a user how to reach it; empty if that is plain."""

    where: str

    def write(self, data: bytes) -> None: ...
    def read(self, size: int) -> bytes: ...
    def close(self) -> None: ...


def open_chardev(spec: str, ending: Ending = never) -> Chardev:
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
        return _listen(rest, ending)
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        if host and port.isdecimal() and len(port) <= 5 and int(port) < 1 << 16:
            return _listen((host.removeprefix("[").removesuffix("]"), int(port)), ending)
    raise ConfigError(
        f"{spec!r} is no place for a serial port; use stdio, null, file:PATH, unix:PATH, "
        "tcp:HOST:PORT or pty"
    )


def _listen(address: str | tuple[str, int], ending: Ending) -> Chardev:
    from vmexit.backends.listener import Listener  # most runs have no socket

    return Listener(address, ending)


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
        if self._out < 0:
            return
        try:
            write_all(self._out, data, math.inf, self._ending)
        except OSError as error:
            raise HostError(
                f"cannot write the guest's output: {error.strerror}; send it elsewhere"
            ) from error

    def read(self, size: int) -> bytes:
        if self._in < 0 or not ready(self._in, select.POLLIN):
            return b""
        try:
            return os.read(self._in, size)
        except OSError:  # EIO: the other end of a terminal is closed; it may open again
            return b""

    def close(self) -> None:
        """Close what was opened."""


class Stdio(_Descriptor):
    """The process's standard input and output."""

    def __init__(self, ending: Ending = never) -> None:
        if sys.stdout is not None:
            sys.stdout.flush()
        super().__init__(1, 0, ending)

    def read(self, size: int) -> bytes:
        if self._in < 0 or self._in_background() or not ready(self._in, select.POLLIN):
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

    def __init__(self, path: str, ending: Ending = never) -> None:
        try:
            # Not blocking: a FIFO without a reader would hold us up for ever.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
            out = os.open(path, flags, 0o666)
        except (OSError, ValueError) as error:
            why = "nobody reads it" if getattr(error, "errno", 0) == errno.ENXIO else reason(error)
            raise ConfigError(f"cannot write {shown(path)}: {why}; use another path") from error
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
        super().__init__(master, master, never)

    def write(self, data: bytes) -> None:
        if self._out >= 0:
            with suppress(BlockingIOError):  # nobody reads at the other end
                os.write(self._out, data)

    def close(self) -> None:
        if self._out >= 0:
            os.close(self._out)
            os.close(self._slave)
            self._out = self._in = -1
