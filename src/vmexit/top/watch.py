"""Watching a machine: one table, or a screen that changes until a key or the machine's end."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

from vmexit.control.qmp_client import GoneError, QmpClient
from vmexit.core.errors import ConfigError
from vmexit.top.rates import rates
from vmexit.top.sample import Sample, take

_LONGEST = 3600.0
_WIDE = 120  # columns where there is no terminal
_QUIT = b"qQ\x03\x04"  # Ctrl-C and Ctrl-D, where the terminal gives them as keys


def once(where: str, interval: float) -> str:
    """One table as text, of the `interval` seconds that it takes.

    Raises ConfigError, HostError; GoneError if the machine ends meanwhile.
    """
    _check(interval)
    with QmpClient(where) as client:
        before = take(client)
        if _wait(client, None, interval):
            raise GoneError("the machine has ended")
        now = take(client)
    from rich.console import Console

    from vmexit.top.view import view

    text = StringIO()
    columns = None if sys.stdout.isatty() else _WIDE
    # Of standard output only the width is looked at.
    width = columns or Console(file=sys.stdout).width
    Console(file=text, width=width, color_system=None).print(view(rates(before, now)))
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


def watch(where: str, interval: float) -> str:
    """Show it until q or Ctrl-C is typed, or the machine ends: then returns that it has.

    Raises ConfigError, HostError.
    """
    _check(interval)
    if not sys.stdout.isatty():
        raise ConfigError("standard output is no terminal; use vmexit top --once")
    try:
        with QmpClient(where) as client, _keys() as keys:
            return _watch(client, keys, interval)
    except GoneError as error:
        return str(error)
    except KeyboardInterrupt:
        return ""


def _check(interval: float) -> None:
    if not 0 < interval <= _LONGEST:
        raise ConfigError(f"an interval of {interval:g} s cannot be; use up to {_LONGEST:g}")


def _watch(client: QmpClient, keys: int | None, interval: float) -> str:
    from rich.console import Console
    from rich.live import Live

    from vmexit.top.view import view

    console = Console()
    before = take(client)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        # Something is there at once, and soon it is the rates.
        wait = min(interval, 0.2)
        now: Sample = before
        while True:
            live.update(view(rates(before, now), console.size.height), refresh=True)
            if _wait(client, keys, wait):
                return "the machine has ended" if client.ended() else ""
            wait = interval
            before, now = now, take(client)


def _wait(client: QmpClient, keys: int | None, seconds: float) -> bool:
    """Whether to end before so much time has passed: a key says so, or the machine has ended."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        watched = [client.fileno()] if keys is None else [client.fileno(), keys]
        ready, _, _ = select.select(watched, [], [], left)
        if client.fileno() in ready and client.ended():
            return True
        if keys is not None and keys in ready:
            typed = os.read(keys, 64)
            if not typed:
                keys = None  # nobody types any more
            if any(key in _QUIT for key in typed):
                return True
    return False


@contextmanager
def _keys() -> Iterator[int | None]:
    """The terminal that keys come from, each as it is typed; None without one."""
    try:
        keys = sys.stdin.fileno()
        before = termios.tcgetattr(keys)
    except (AttributeError, OSError, ValueError, termios.error):
        yield None
        return
    tty.setcbreak(keys)
    try:
        yield keys
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)
