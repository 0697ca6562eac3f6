"""The guest's console, as a program uses it: what is on it, and keys."""

import re
import threading
import time
from collections.abc import Callable
from typing import Protocol

from vmexit.core.errors import ConfigError, VmexitError
from vmexit.machine.console import GuestConsole
from vmexit.machine.stop import Stop, StopReason

_SECONDS = 60.0
_SHOWN = 1000  # characters at the end of a message
_STEP = 1.0  # seconds between looks at a run of another thread


class Tapped(Protocol):
    """What of `vmexit.backends.console_tap.ConsoleTap` is used here."""

    @property
    def end(self) -> int: ...
    def since(self, position: int) -> tuple[int, bytes]: ...
    def watch(self, watch: Callable[[], None]) -> Callable[[], None]: ...
    def type(self, data: bytes) -> None: ...


class Running(Protocol):
    """What of `Machine` is used here."""

    @property
    def active(self) -> bool: ...
    def run_until(self, *, text: str, timeout: float | None) -> Stop: ...


class ConsoleError(VmexitError):
    """What was expected on a console did not come."""


class Terminal:
    """The serial port; the first virtio console of a machine without one. From any thread."""

    def __init__(self, machine: Running, tap: Tapped, consoles: GuestConsole | None) -> None:
        self._machine = machine
        self._tap = tap
        self._consoles = consoles
        self._position = 0  # of what has not been expected yet
        self._lock = threading.Lock()  # of who expects something

    @property
    def output(self) -> str:
        """What the guest has written so far, the last MiB of it."""
        return _text(self._tap.since(0)[1])

    def send(self, text: str) -> None:
        """Type `text`; Enter is a line feed."""
        self._tap.type(text.encode())

    def expect(self, text: str, timeout: float = _SECONDS) -> str:
        """Wait until the guest has written `text`; what it wrote up to there, that included.

        Only what was not expected before counts. The machine runs meanwhile, and is paused then
        unless it ran before. Raises ConsoleError if `timeout` seconds pass first, or if it ends.
        """
        if not text:
            raise ConfigError("nothing is expected; give some text")
        end = time.monotonic() + timeout
        with self._lock:
            while (found := self._take(text)) is None:
                left = end - time.monotonic()
                if left <= 0:
                    raise self._missing(text, f"within {timeout:g} s")
                if self._machine.active:
                    self._wait(text, min(left, _STEP))
                    continue
                stop = self._machine.run_until(text=text, timeout=left)
                if stop.reason not in (StopReason.UNTIL, StopReason.TIMEOUT):
                    if (found := self._take(text)) is not None:
                        return found
                    raise self._missing(text, f"before the end ({stop.summary()})")
        return found

    def shell(self, command: str, timeout: float = _SECONDS) -> str:
        """What `command` prints in the guest's shell, whose prompt is on the console.

        Raises ConsoleError if its status is not 0, or as `expect()` does.
        """
        # What is typed comes back as an echo, in which the numbers are not yet these.
        self.send(f"echo =$((20+1))=; {command}\necho =$((40+2))=$?=\n")
        self.expect("=21=", timeout)
        said = self.expect("=42=", timeout).removesuffix("=42=")
        status = self.expect("=", timeout)[:-1]
        lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", said).replace("\r", "").split("\n")
        text = "\n".join(lines[1:-2])
        if status != "0":
            raise ConsoleError(f"{command!r} ended with status {status}: {text[-_SHOWN:]}")
        return text

    def resize(self, columns: int, rows: int, number: int = 0) -> None:
        """Tell the guest how large virtio console `number` is. Raises ConfigError without one."""
        if self._consoles is None:
            raise ConfigError('this machine has no virtio console; make it with consoles=["pty"]')
        self._consoles.resize(columns, rows, number)

    def when(self, text: str, tell: Callable[[], None]) -> Callable[[], None]:
        """Call `tell` once the guest has written `text`, from now on; returns what ends that."""
        wanted, start = text.encode(), self._tap.end

        def look() -> None:
            nonlocal start
            first, new = self._tap.since(start)
            if wanted in new:
                tell()
            start = first + max(0, len(new) - len(wanted) + 1)

        return self._tap.watch(look)

    def _take(self, text: str) -> str | None:
        wanted = text.encode()
        start, there = self._tap.since(self._position)
        at = there.find(wanted)
        if at < 0:
            return None
        self._position = start + at + len(wanted)
        return _text(there[: at + len(wanted)])

    def _wait(self, text: str, timeout: float) -> None:
        came = threading.Event()
        end = self._tap.watch(came.set)
        try:
            if text.encode() not in self._tap.since(self._position)[1]:
                came.wait(timeout)
        finally:
            end()

    def _missing(self, text: str, why: str) -> ConsoleError:
        last = _text(self._tap.since(self._position)[1])[-_SHOWN:]
        return ConsoleError(f"no {text!r} on the console {why}; the end of it is {last!r}")


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
