"""What a worker does for a job: the snapshot, loaded once; a clone; the job; how it ended, as data.

It may be a thread, a process, or another host: nothing here knows who has asked.
"""

import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, cast

from vmexit.core.errors import ConfigError, VmexitError, shown

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine
    from vmexit.machine.snapshot import Snapshot

T = TypeVar("T")
R = TypeVar("R")

_KEPT = 2  # snapshots that a process keeps loaded: each takes its memory
_AGAIN = 0.05  # seconds until a machine is stopped once more, as its job may have run it again
_LONGEST = 20_000  # characters of a message or a traceback


class Saved(NamedTuple):
    """A snapshot in a folder, and which one that was when the jobs were given out."""

    folder: str
    digest: str

    @classmethod
    def of(cls, folder: str) -> "Saved":
        """Raises ConfigError if that is none."""
        return cls(folder, _digest(folder))


class Terms(NamedTuple):
    """How a job is done. Times in seconds; `grace` None: the process is not ours to end."""

    saved: Saved
    timeout: float | None
    grace: float | None = None


class Failure(NamedTuple):
    """An exception as texts: it may not be possible to pickle one, nor to import its class."""

    kind: str
    message: str
    traceback: str
    again: bool
    """Whether another attempt may help: it was a VmexitError."""


class Outcome(NamedTuple, Generic[R]):
    """How an attempt ended; one of `value`, `failure` and `expired` counts."""

    seconds: float
    value: R | None = None
    failure: Failure | None = None
    expired: bool = False


def work(terms: Terms, job: Callable[["Machine", T], R], value: T) -> Outcome[R]:
    """Do `job` on a clone. What it raises comes back as data."""
    began = time.monotonic()
    try:
        vm = _clone(terms.saved)
    except Exception as error:
        return Outcome(time.monotonic() - began, failure=failure_of(error))
    began = time.monotonic()
    try:
        with vm, _Watchdog(vm, terms) as watchdog:
            try:
                outcome = Outcome[R](0.0, job(vm, value))
            except (Exception, SystemExit) as error:
                outcome = Outcome[R](0.0, failure=failure_of(error))
    except VmexitError as error:  # closing it
        outcome = Outcome[R](0.0, failure=failure_of(error))
    seconds = time.monotonic() - began
    if watchdog.expired:
        return Outcome(seconds, expired=True)
    return outcome._replace(seconds=seconds)


def work_packed(terms: Terms, job: Callable[["Machine", T], R], value: T, call: str = "") -> bytes:
    """As `work()`, for another process: `unpack()` what this returns.

    Not each executor tells of a result that cannot be pickled. `call` is for those that tell calls
    from each other by their arguments.
    """
    return packed(work(terms, job, value))


def packed(outcome: Outcome[R]) -> bytes:
    """`outcome` as a pickle; that of a failure if it cannot be one."""
    try:
        return pickle.dumps(outcome)
    except Exception as error:
        failure = not_sent(error, "what the job returned")
        return pickle.dumps(Outcome[R](outcome.seconds, failure=failure))


def unpack(result: bytes) -> Outcome[object]:
    """The outcome in what a worker has sent."""
    return cast("Outcome[object]", pickle.loads(result))  # noqa: S301


def not_sent(error: Exception, what: str) -> Failure:
    """That `what` cannot be pickled or unpickled."""
    failure = failure_of(error)
    why = f"{what} cannot be sent between processes: {failure.message}"
    return failure._replace(message=f"{why}; use plain data, and functions of modules", again=False)


def failure_of(error: BaseException) -> Failure:
    """`error` as data."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    text = "".join(traceback.format_exception(error))
    return Failure(name, _short(str(error)), _short(text), isinstance(error, VmexitError))


def _short(text: str) -> str:
    """Both ends of it, if it is long."""
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


class _Watchdog:
    """Stops a machine once its job has taken too long, until the job ends.

    A process of ours ends if the job does not, then: it may hang in Python.
    """

    def __init__(self, vm: "Machine", terms: Terms) -> None:
        self._vm = vm
        self._terms = terms
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vmexit-pool", daemon=True)
        self.expired = False

    def _watch(self) -> None:
        if self._done.wait(self._terms.timeout):
            return
        self.expired = True
        grace = self._terms.grace
        end = None if grace is None else time.monotonic() + grace
        while True:
            self._vm.stop()
            if self._done.wait(_AGAIN):
                return
            if end is not None and time.monotonic() >= end:
                os._exit(1)

    def __enter__(self) -> "_Watchdog":
        if self._terms.timeout is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        if self._terms.timeout is not None:
            self._thread.join()


# By which snapshots this process has loaded, the one that was used last at the end.
_loaded: "dict[Saved, Snapshot]" = {}
_lock = threading.Lock()  # of that, and of cloning: a snapshot is not closed meanwhile


def _clone(saved: Saved) -> "Machine":
    from vmexit.machine.snapshot import Snapshot

    with _lock:
        snapshot = _loaded.pop(saved, None)
        if snapshot is None:
            if _digest(saved.folder) != saved.digest:
                raise ConfigError(
                    f"{shown(saved.folder)} is another snapshot than the jobs are for; "
                    "do not change it while they run"
                )
            while len(_loaded) >= _KEPT:
                _loaded.pop(next(iter(_loaded))).close()
            snapshot = Snapshot.load(saved.folder)
        _loaded[saved] = snapshot
        return snapshot.clone()


def forget(saved: Saved) -> None:
    """Free what this process has loaded of it; clones live on."""
    with _lock:
        snapshot = _loaded.pop(saved, None)
        if snapshot is not None:
            snapshot.close()


def _digest(folder: str) -> str:
    """The digest in the first line of a snapshot's state; it is over what tells of memory, too."""
    from vmexit.machine.snapshot_file import named_digest

    try:
        return named_digest(folder)
    except OSError as error:
        raise ConfigError(
            f"{shown(folder)} cannot be read as a snapshot: {error.strerror}; "
            "give a folder that was saved, which all workers can read"
        ) from error
    except (ValueError, LookupError) as error:
        raise ConfigError(
            f"{shown(folder)} is no snapshot; give a folder that was saved"
        ) from error
