"""The terminal that the program was started from, as a guest's console.

While the guest runs it is in raw mode: each key goes to the guest at once, Ctrl-C among them.
Ctrl-A begins a command to vmexit instead. Output keeps its processing, so that a guest's bare line
feed begins a line at the left. Between two runs the terminal is the program's, as it was before.
"""

import atexit
import os
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress

from vmexit.backends.wait import Ending, Output, write_all
from vmexit.core.errors import HostError
from vmexit.core.loop import EventLoop

_ESCAPE = 0x01  # Ctrl-A
_QUIT, _HELP = b"xX", b"hH?"

_HELP_TEXT = b"""\r
Ctrl-A x       quit vmexit\r
Ctrl-A h       this help\r
Ctrl-A Ctrl-A  send Ctrl-A to the guest\r
"""

# What waits for a guest that does not read: more than anyone pastes.
_LIMIT = 1 << 20


def is_our_terminal(fd: int) -> bool:
    """Whether `fd` is a terminal that this process may use: it is not some other job's."""
    if not os.isatty(fd):
        return False
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # not the terminal of this session, which stops nobody
        return True


def terminal_size(fd: int) -> tuple[int, int] | None:
    """Columns and rows of a terminal, 0 where it has not been told; None if it is gone."""
    try:
        return os.get_terminal_size(fd)
    except OSError:
        return None


class Console:
    """Standard input, a terminal, and standard output. `leave()` is called at Ctrl-A x.

    Input is read as it comes, also while the guest does not, so that a command is seen.
    """

    where = "this terminal (Ctrl-A x quits, Ctrl-A h helps)"

    def __init__(self, loop: EventLoop, ending: Ending, leave: Callable[[], None]) -> None:
        self._loop = loop
        self._ending = ending
        self._output = Output(1, ending)
        self._leave = leave
        self._lock = threading.Lock()
        self._input = bytearray()
        self._escaped = False  # Ctrl-A was the last key
        self._paused = False  # too much waits
        self._waiting: Callable[[], None] | None = None
        self._soon = loop.timer(self._call_waiting)
        if sys.stdout is not None:
            sys.stdout.flush()
        try:
            self._before = termios.tcgetattr(0)
        except termios.error as error:
            raise _refusal(error) from error
        self._raw = False
        atexit.register(self._restore)

    def running(self, runs: bool) -> None:
        if runs:
            try:
                self._set_raw()
            except termios.error as error:
                raise _refusal(error) from error
            self._loop.watch(0, self._take)
        else:
            self._loop.unwatch(0)
            self._restore()

    def _set_raw(self) -> None:
        self._before = termios.tcgetattr(0)
        self._raw = True
        mode = list(self._before)
        iflag, oflag, cflag, lflag = 0, 1, 2, 3
        mode[iflag] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        mode[oflag] |= termios.OPOST
        mode[cflag] = mode[cflag] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[lflag] &= ~(
            termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN
        )
        termios.tcsetattr(0, termios.TCSADRAIN, mode)

    def _restore(self) -> None:
        if self._raw:
            self._raw = False
            with suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(0, termios.TCSADRAIN, self._before)

    def write(self, data: bytes) -> None:
        self._output.write(data)

    def read(self, size: int) -> bytes:
        with self._lock:
            data = bytes(self._input[:size])
            del self._input[:size]
            if self._paused and len(self._input) < _LIMIT:
                self._paused = False
                self._loop.watch(0, self._take)
            return data

    def when_readable(self, function: Callable[[], None]) -> None:
        """Call `function` once, from the loop, when there is input."""
        with self._lock:
            self._waiting = function
            if self._input:
                self._soon.set(self._loop.now())

    def _take(self) -> None:
        """There is input, or the terminal is gone."""
        try:
            data = os.read(0, 4096)
        except OSError:
            data = b""
        if not data:
            return
        with self._lock:
            commands = [self._key(key) for key in data]
            self._paused = len(self._input) >= _LIMIT
            if not self._paused:
                self._loop.watch(0, self._take)
            some = bool(self._input)
        for command in commands:
            if command is not None:
                command()
        if some:
            self._call_waiting()

    def size(self) -> tuple[int, int] | None:
        return terminal_size(0)

    def _key(self, key: int) -> Callable[[], None] | None:
        """Take a key; the command that it ends, to be done without the lock."""
        if not self._escaped:
            if key == _ESCAPE:
                self._escaped = True
            else:
                self._input.append(key)
            return None
        self._escaped = False
        if key in _QUIT:
            return self._leave
        if key in _HELP:
            return self._help
        if key == _ESCAPE:
            self._input.append(key)
        return None

    def _help(self) -> None:
        with suppress(OSError):  # whoever read the output has gone
            write_all(1, _HELP_TEXT, 1, self._ending)

    def _call_waiting(self) -> None:
        with self._lock:
            function, self._waiting = self._waiting, None
        if function is not None:
            function()

    def close(self) -> None:
        """Give the terminal back as it was."""
        self._loop.unwatch(0)
        self._soon.set(None)
        self._restore()
        atexit.unregister(self._restore)


def _refusal(error: termios.error) -> HostError:
    return HostError(f"cannot set the terminal up: {error.args[-1]}; use --serial pty")
