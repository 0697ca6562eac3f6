"""Processes on this host that do jobs, each one at a time.

Each is a `ProcessPoolExecutor` of one process. So it is known which job a process was at that has
died, and no other one suffers.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, TypeVar, cast

from vmexit.core.errors import ConfigError, HostError
from vmexit.pool.worker import Outcome, Terms, not_sent, packed, work_packed

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine

T = TypeVar("T")
R = TypeVar("R")


class NoWorker(HostError):
    """A worker process cannot be had."""


class Processes:
    """So many of them, started when there is something to do. Jobs are given as pickles."""

    def __init__(self, count: int) -> None:
        # Spawned: a fork would have locks of threads that it does not have.
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[_Process | None] = [None] * count
        self._busy: dict[Future[bytes], _Process] = {}

    @staticmethod
    def pack(job: Callable[["Machine", T], R]) -> bytes:
        """`job` for `submit()`. Raises ConfigError for what other processes cannot import."""
        try:
            return pickle.dumps(job)
        except Exception as error:
            raise ConfigError(
                f"the job {job!r} cannot be sent to another process ({error}); use a function of a "
                "module, or executor=ThreadPoolExecutor()"
            ) from error

    def submit(self, terms: Terms, job: bytes, value: bytes) -> "Future[bytes]":
        """Have one that is idle do it; there has to be one. `unpack()` is for the result.

        Raises NoWorker if no process can be started.
        """
        process = self._idle.pop() or _Process(self._context)
        try:
            future = process.submit(terms, job, value)
        except BaseException:
            process.close()
            self._idle.append(None)
            raise
        self._busy[future] = process
        return future

    def release(self, future: "Future[bytes]") -> None:
        """It is done; its process is idle, or has died and is replaced.

        Raises NoWorker if that had not even begun to work.
        """
        process = self._busy.pop(future)
        if not isinstance(future.exception(), BrokenExecutor):
            self._idle.insert(0, process)
            return
        self._idle.append(None)
        up = process.is_up()
        process.close()
        if not up:
            raise NoWorker(
                "a worker process has ended before its first job; where this program is a script, "
                'begin what it does with `if __name__ == "__main__":`'
            )

    def close(self) -> None:
        """End them, whatever they are doing."""
        processes = [*self._busy.values(), *(p for p in self._idle if p is not None)]
        self._busy.clear()
        self._idle.clear()
        for process in processes:
            process.cut()
        for process in processes:
            process.close()


class _Process:
    """One process, with a line to it that tells it when nobody wants it any more."""

    def __init__(self, context: multiprocessing.context.SpawnContext) -> None:
        self._line, self._other_end = context.Pipe()
        self._executor = ProcessPoolExecutor(
            1, mp_context=context, initializer=_begin, initargs=(self._other_end,)
        )

    def submit(self, terms: Terms, job: bytes, value: bytes) -> "Future[bytes]":
        try:
            return self._executor.submit(_work, terms, job, value)
        except OSError as error:
            raise NoWorker(
                f"cannot start a worker process: {error.strerror}; use fewer workers"
            ) from error

    def is_up(self) -> bool:
        """Whether it has come as far as to work."""
        return self._line.poll()

    def cut(self) -> None:
        """It ends at once, in the middle of a job, too."""
        self._line.close()

    def close(self) -> None:
        self.cut()
        self._other_end.close()
        self._executor.shutdown(cancel_futures=True)


# In the process.


def _begin(line: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it
    try:
        line.send_bytes(b"up")
    except OSError:
        os._exit(0)
    threading.Thread(target=_end_with, args=(line,), name="vmexit-line", daemon=True).start()


def _end_with(line: Connection) -> None:
    """Nothing is ever sent: this returns once the other end is closed, or its process dead."""
    try:
        line.recv_bytes()
    finally:
        os._exit(0)


def _work(terms: Terms, job: bytes, value: bytes) -> bytes:
    try:
        function = cast("Callable[[Machine, object], object]", pickle.loads(job))  # noqa: S301
        given = cast("object", pickle.loads(value))  # noqa: S301
    except Exception as error:
        return packed(Outcome[object](0.0, failure=not_sent(error, "the job or its input")))
    return work_packed(terms, function, given)
