"""Threads that vmexit starts leave the program's signals alone."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from queue import SimpleQueue

_IDLE, _LATER = "vmexit-idle", "vmexit-later"
_MOST_IDLE, _MOST_BUSY = 32, 16

# What a thread does to itself must not be blocked: its faults, and writing to a closed pipe.
_NEVER_BLOCKED = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGABRT,
    signal.SIGPIPE,
}

# signal.pthread_sigmask() makes an enum member of each signal that was blocked: 80 µs, against 1.
_libc = ctypes.CDLL(None)
SignalSet = ctypes.c_uint64 * 16
"""What sigset_t is: a bit for each signal, the first for signal 1."""
_BLOCKED = SignalSet(sum(1 << s - 1 for s in signal.valid_signals() - _NEVER_BLOCKED))


def set_mask(how: int, signals: "ctypes.Array[ctypes.c_uint64]") -> "ctypes.Array[ctypes.c_uint64]":
    """As signal.pthread_sigmask(): which signals this thread blocks, and what it did before."""
    before = SignalSet()
    _libc.pthread_sigmask(how, signals, before)
    return before


# How long the main thread waits at a time, in seconds. A signal that comes just before it begins to
# wait does not wake it up, and the handler is called only once it does something again.
SIGNAL_SECONDS = 0.5


def start_without_signals(thread: threading.Thread) -> None:
    """Start `thread` so that it never gets a signal of the process, not even as it begins.

    Such a signal would interrupt nobody: the handler is called in the main thread, which waits.
    Raises RuntimeError, and what the handler of a signal raises that came meanwhile.
    """
    before = set_mask(signal.SIG_BLOCK, SignalSet())  # first: a handler may raise as it is blocked
    try:
        set_mask(signal.SIG_BLOCK, _BLOCKED)  # which the thread inherits
        thread.start()
    finally:
        set_mask(signal.SIG_SETMASK, before)


_Jobs = SimpleQueue[Callable[[], None] | None]


def _work(jobs: _Jobs) -> None:
    """What can be asked for is done as in a thread that begins only now."""
    while (job := jobs.get()) is not None:
        sys.settrace(threading.gettrace())
        sys.setprofile(threading.getprofile())
        Context().run(job)
        del job  # it holds what its caller may drop
        set_mask(signal.SIG_BLOCK, _BLOCKED)


class Worker:
    """A thread that does one thing after another, without signals. It ends if nobody holds this."""

    def __init__(self) -> None:
        """It begins with the first thing that it is to do."""
        self._jobs: _Jobs = SimpleQueue()
        # A daemon: a program that forgets to end it must still be able to end itself.
        self.thread = threading.Thread(target=_work, args=(self._jobs,), name=_IDLE, daemon=True)

    def do(self, job: Callable[[], None], name: str) -> None:
        """Call `job`, which raises nothing, behind what it does now; `name` is the thread's then.

        Raises RuntimeError if it cannot begin, and what the handler of a signal raises.
        """
        self.thread.name = name
        self._jobs.put(job)
        if self.thread.ident is None:
            start_without_signals(self.thread)

    def wait(self) -> None:
        """Wait until it has nothing to do, or has ended."""
        done = threading.Lock()
        done.acquire()
        self._jobs.put(done.release)
        while self.thread.is_alive() and not done.acquire(timeout=SIGNAL_SECONDS):
            continue

    def end(self) -> None:
        """End it, once it has done what it is to do. It may be told more than once."""
        self._jobs.put(None)
        if self.thread.ident is not None:
            self.thread.join()

    def __del__(self) -> None:
        # The handler of a signal may raise just as somebody gets it, or gives it back.
        self._jobs.put(None)


class Workers:
    """Threads to be had again: to wake one up takes less than half as long as to start one.

    Any thread may use it.
    """

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep
        """Whether there is a use for one that is given back; if not, it ends."""
        self._idle: list[Worker] = []
        self._busy: list[Worker] = []  # with what is done later

    def take(self) -> Worker:
        """One that runs where, and as, it would if the caller had started it."""
        while (worker := self._pop()) is not None:
            if _as_if_started_here(worker.thread):
                return worker
            worker.end()
        return Worker()

    def give(self, worker: Worker) -> None:
        """It has nothing to do any more, or is to end once it has not."""
        if self.keep and len(self._idle) < _MOST_IDLE:
            worker.thread.name = _IDLE
            self._idle.append(worker)
        else:
            worker.end()
        if not self.keep:  # any more
            self.close()

    def later(self, job: Callable[[], None]) -> None:
        """Have one that waits call `job`, which raises nothing.

        It is done at once if none waits, or so much is done already.
        """
        worker = self._pop() if len(self._busy) < _MOST_BUSY else None
        if worker is None:
            job()
            return

        def work() -> None:
            job()
            # In this order: close() ends what is busy, and nobody may have that by then.
            self._busy.remove(worker)
            if self.keep and len(self._idle) < _MOST_IDLE:
                worker.thread.name = _IDLE
                self._idle.append(worker)
                if not self.keep:  # any more, and nobody's ends
                    with suppress(ValueError):
                        self._idle.remove(worker)

        self._busy.append(worker)
        worker.do(work, _LATER)

    def close(self) -> None:
        """End those that nobody has, once all is done; others end when they are given back."""
        self.keep = False
        for worker in self._busy.copy():
            worker.end()
        while (idle := self._pop()) is not None:
            idle.end()

    def _pop(self) -> Worker | None:
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return None
            if worker.thread.is_alive():  # after a fork none of them is
                return worker


def _as_if_started_here(thread: threading.Thread) -> bool:
    try:
        return _scheduling(thread.native_id or 0) == _scheduling(0)
    except OSError:  # where one may not ask
        return False


def _scheduling(thread: int) -> tuple[set[int], int, int, int]:
    """What a new thread has from the one that starts it, and may be changed: where it runs, how."""
    return (
        os.sched_getaffinity(thread),
        os.sched_getscheduler(thread),
        os.sched_getparam(thread).sched_priority,
        os.getpriority(os.PRIO_PROCESS, thread),
    )
