"""Character backends: where the bytes of a serial port or a debug console go to and come from.

Input is what is there now. Output to a socket or a pseudo-terminal that nobody takes is dropped;
standard output waits for its reader, as any program does. No wait outlasts the end of a run:
`ending` tells of that.
"""

import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from vmexit.backends.console import Console, is_our_terminal, terminal_size
from vmexit.backends.files import open_output
from vmexit.backends.gather import Gathered
from vmexit.backends.wait import Ending, Output, Slow, never, ready
from vmexit.core.errors import ConfigError, HostError
from vmexit.core.loop import EventLoop


def _nothing() -> None:
    """There is nobody to tell."""


class Chardev(Protocol):
    """A place for bytes. `where` tells a user how to reach it; empty if that is plain."""

    where: str

    def write(self, data: bytes) -> None: ...
    def read(self, size: int) -> bytes: ...
    def when_readable(self, function: Callable[[], None]) -> None: ...

    def running(self, runs: bool) -> None:
        """A run begins, or has ended."""
        ...

    def size(self) -> tuple[int, int] | None:
        """Columns and rows of the terminal that it is, 0 if nobody has set them; None if none."""
        ...

    def close(self) -> None: ...


def open_chardev(
    spec: str, loop: EventLoop, ending: Ending = never, leave: Callable[[], None] = _nothing
) -> Chardev:
    """`stdio`, `null`, `file:PATH`, `unix:PATH`, `tcp:HOST:PORT` or `pty`.

    Input is waited for in `loop`. Output is not waited for once `ending()` is true. `leave()` is
    called when the user at a terminal asks to. Raises ConfigError for anything else, HostError if
    the host refuses.
    """
    kind, _, rest = spec.partition(":")
    if spec == "null":
        return Null()
    if spec == "stdio":
        if is_our_terminal(0):
            return Console(loop, ending, leave)
        return Stdio(loop, ending)
    if spec == "pty":
        return Pty(loop, ending)
    if kind == "file" and rest:
        return File(rest, ending, loop)
    if kind == "unix" and rest:
        return _listen(rest, loop, ending)
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        if host and port.isdecimal() and len(port) <= 5 and int(port) < 1 << 16:
            return _listen((host.removeprefix("[").removesuffix("]"), int(port)), loop, ending)
    raise ConfigError(
        f"{spec!r} is no place for a serial port or a console; use stdio, null, file:PATH, "
        "unix:PATH, tcp:HOST:PORT or pty"
    )


def _listen(address: str | tuple[str, int], loop: EventLoop, ending: Ending) -> Chardev:
    from vmexit.backends.listener import Listener  # most runs have no socket

    return Listener(address, loop, ending)


class Null:
    """Nowhere."""

    where = ""

    def write(self, data: bytes) -> None:
        """Drop it."""

    def read(self, size: int) -> bytes:
        return b""

    def when_readable(self, function: Callable[[], None]) -> None:
        """Never."""

    def running(self, runs: bool) -> None:
        """It makes no difference."""

    def size(self) -> None:
        """It has none."""

    def close(self) -> None:
        """Nothing is held."""


class _Descriptor:
    """Writing to, and reading from, descriptors; there is no input without a `loop`."""

    where = ""

    def __init__(self, out: int, into: int, loop: EventLoop | None, ending: Ending) -> None:
        self._out = out
        self._in = into
        self._loop = loop
        output = Output(out, ending)
        self._output = output if loop is None else Gathered(output, loop)

    def write(self, data: bytes) -> None:
        if self._out >= 0:
            self._output.write(data)

    def read(self, size: int) -> bytes:
        if self._in < 0 or not ready(self._in, select.POLLIN):
            return b""
        try:
            return os.read(self._in, size)
        except OSError:  # EIO: the other end of a terminal is closed; it may open again
            return b""

    def when_readable(self, function: Callable[[], None]) -> None:
        """Call `function` once, from the loop, when there is input or an end of it."""
        if self._in >= 0 and self._loop is not None:
            self._loop.watch(self._in, function)

    def running(self, runs: bool) -> None:
        """At the end of a run all is written."""
        if not runs and self._out >= 0:
            self._output.flush()

    def size(self) -> tuple[int, int] | None:
        return None

    def close(self) -> None:
        """Forget the descriptors, which stay open."""
        if self._in >= 0 and self._loop is not None:
            self._loop.unwatch(self._in)
        self._in = self._out = -1


class Stdout(_Descriptor):
    """Standard output, and no input."""

    def __init__(self, ending: Ending = never) -> None:
        if sys.stdout is not None:
            sys.stdout.flush()
        super().__init__(1, -1, None, ending)


class Stdio(_Descriptor):
    """The process's standard input and output, where they are no terminal."""

    def __init__(self, loop: EventLoop, ending: Ending = never) -> None:
        if sys.stdout is not None:
            sys.stdout.flush()
        # From a terminal of some other job to read would stop the process.
        super().__init__(1, -1 if os.isatty(0) else 0, loop, ending)

    def read(self, size: int) -> bytes:
        if self._in < 0 or not ready(self._in, select.POLLIN):
            return b""
        data = super().read(size)
        if not data:
            self._in = -1  # end of file
        return data


class File(_Descriptor):
    """A file, emptied first; input there is none."""

    def __init__(self, path: str, ending: Ending = never, loop: EventLoop | None = None) -> None:
        out, replaces = open_output(path)
        if replaces:
            with suppress(OSError):  # EINVAL: a pipe has no length
                os.ftruncate(out, 0)
        super().__init__(out, -1, loop, ending)

    def close(self) -> None:
        if self._out >= 0:
            os.close(self._out)
            self._out = -1


class Pty(_Descriptor):
    """A new pseudo-terminal; `where` is the path of its other end."""

    def __init__(self, loop: EventLoop, ending: Ending = never) -> None:
        import tty

        try:
            master, self._slave = os.openpty()
        except OSError as error:
            raise HostError(
                f"cannot make a pseudo-terminal: {error.strerror}; use stdio"
            ) from error
        tty.setraw(self._slave)  # held open: with no other end at all, a read would fail
        os.set_blocking(master, False)
        self.where = os.ttyname(self._slave)
        self._slow = Slow(ending)
        super().__init__(master, master, loop, ending)

    def write(self, data: bytes) -> None:
        while data and self._out >= 0:
            try:
                data = data[os.write(self._out, data) :]
                self._slow.took()
            except BlockingIOError:
                if not self._slow.wait(self._out):
                    return

    def size(self) -> tuple[int, int] | None:
        return terminal_size(self._out)

    def close(self) -> None:
        if (master := self._out) >= 0:
            super().close()
            os.close(master)
            os.close(self._slave)
