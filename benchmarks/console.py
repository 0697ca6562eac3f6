"""What a guest's console shows, and when: boots of vmexit and QEMU are timed by the same lines."""

import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from measure import Row, Unavailable, differences, ratios, spread
from start import as_installed

from vmexit.core.errors import VmexitError
from vmexit.fetch.debian import Fetched, fetch

MEMORY_SIZE = "256M"

_SHOWN = 300  # bytes of what came last


def debian() -> Fetched:
    """Debian's cloud kernel with its RAM disk. Raises Unavailable."""
    try:
        return fetch("cloud-amd64", (), lambda what, done: None)
    except VmexitError as error:
        raise Unavailable(str(error)) from error


@contextmanager
def _console(command: list[str], timeout: float) -> Iterator[int]:
    """The descriptor of what `command` prints; it is ended afterwards.

    Raises Unavailable where reading came to TimeoutError, or to EOFError; they say what came last.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=as_installed(),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            yield process.stdout.fileno()
        except TimeoutError as error:
            raise Unavailable(f"{command[0]} took more than {timeout} s: {error}") from error
        except EOFError as error:
            said = " / ".join(process.stderr.read().decode(errors="replace").splitlines())
            status = process.wait()
            raise Unavailable(f"{command[0]} ended with {status}: {said} / {error}") from error
        finally:
            process.kill()


def _more(fd: int, text: bytes, end: float) -> bytes:
    """`text` and what comes next. Raises TimeoutError at `end`, and EOFError."""
    ready, _, _ = select.select([fd], [], [], max(end - time.perf_counter(), 0))
    if not ready:
        raise TimeoutError(repr(text[-_SHOWN:]))
    data = os.read(fd, 1 << 16)
    if not data:
        raise EOFError(repr(text[-_SHOWN:]))
    return text + data


def boot(command: list[str], lines: tuple[bytes, ...], timeout: float) -> list[float]:
    """Seconds from the start of `command` until its output shows each of `lines`, in their order.

    It is ended then. Raises Unavailable if that takes longer than `timeout`, or it ends before.
    """
    begin = time.perf_counter()
    text, times = b"", []
    with _console(command, timeout) as fd:
        for line in lines:
            while line not in text:
                text = _more(fd, text, begin + timeout)
            times.append(time.perf_counter() - begin)
    return times


def ended_output(command: list[str], last: bytes, timeout: float) -> str:
    """What `command` prints up to `last`; it is ended then. Raises Unavailable as `boot()` does,
    also if nothing at all comes in a quarter of the time.
    """
    begin = time.perf_counter()
    with _console(command, timeout) as fd:
        text = _more(fd, b"", begin + timeout / 4)
        while last not in text:
            text = _more(fd, text, begin + timeout)
    return text.decode(errors="replace")


def row(name: str, compared: str, ours: list[float], theirs: list[float], target: float) -> Row:
    """Seconds of ours against those of theirs, in turns; their ratio is to be `target` at most."""
    ratio = ratios(ours, theirs)
    return Row(
        name,
        compared,
        len(ours),
        f"{spread(ours).median:.2f} s",
        f"{spread(theirs).median:.2f} s",
        ratio.text("x"),
        f"{target}x",
        ratio.median <= target,
        ratio.around(target),
        figures={
            "vmexit_s": spread(ours),
            "qemu_s": spread(theirs),
            "ratio": ratio,
            "difference_s": differences(ours, theirs),
        },
    )
