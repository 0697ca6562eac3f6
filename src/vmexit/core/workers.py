"""Threads that wait for a while after their work, and take the next one.

To start a thread takes longer than to make a virtual machine, and clones come by the thousand.
"""

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from vmexit.core.threads import start_without_signals

IDLE_NAME = "vmexit-idle"
_IDLE_SECONDS = 1.0
_MOST_IDLE = 8

_idle: "list[_Worker]" = []  # whoever takes one out has it for itself
os.register_at_fork(after_in_child=_idle.clear)


class Work:
    """A function that runs in a thread of its own, which gets no signals of the process."""

    def __init__(self, function: Callable[[], None], name: str) -> None:
        """`name` is the thread's meanwhile. Raises RuntimeError if there can be no more threads."""
        self._over = threading.Event()
        self.function = function
        self.name = name
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _Worker(self)
            start_without_signals(worker.thread)
        else:
            worker.works.put(self)
        self.thread = worker.thread
        """It does other work later."""

    def run(self) -> None:
        """In the thread."""
        try:
            self.function()
        finally:
            threading.current_thread().name = IDLE_NAME
            self._over.set()

    def join(self) -> None:
        """Wait until the function has returned."""
        self._over.wait()


class _Worker:
    def __init__(self, work: Work) -> None:
        self.works: SimpleQueue[Work] = SimpleQueue()
        self.works.put(work)
        # A daemon: a program that forgets something must still be able to end.
        self.thread = threading.Thread(target=self._main, name=work.name, daemon=True)

    def _main(self) -> None:
        while True:
            try:
                work = self.works.get(timeout=_IDLE_SECONDS)
            except Empty:
                try:
                    _idle.remove(self)
                except ValueError:  # somebody has just taken it, and has work for it
                    continue
                return
            self.thread.name = work.name
            work.run()
            del work
            if len(_idle) >= _MOST_IDLE:
                return
            _idle.append(self)
