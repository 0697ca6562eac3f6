"""Running vCPUs: a host thread for each, and one caller who waits for the first to stop."""

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from queue import Empty, SimpleQueue
from typing import NamedTuple

from vmexit.accel.base import Executor, Exit, ExitReason
from vmexit.core.errors import HostError, VmexitError
from vmexit.core.threads import SIGNAL_SECONDS, Worker, Workers
from vmexit.machine.stop import Stop, StopReason, stop_from_exit

# How soon a vCPU that a kick has missed is kicked again.
_SETTLE_SECONDS = 0.05


# What a guest asks of a device outlives what it does after that.
_ASKED_BY_GUEST = (
    StopReason.DEBUG_EXIT, StopReason.POWEROFF, StopReason.RESET, StopReason.GUEST_CRASH
)  # fmt: skip

_runners: "weakref.WeakSet[Runner]" = weakref.WeakSet()


def _close_at_exit(runner: "Runner") -> None:
    """Stop the vCPUs before the interpreter goes away under them."""
    _register()
    _runners.add(runner)


@cache
def _register() -> None:
    atexit.register(_close_all)


def _close_all() -> None:
    for runner in list(_runners):
        with suppress(VmexitError):
            runner.close()


def _nothing() -> None:
    """Nobody waits."""


class StopRequest:
    """Asks a run to end. Devices and other threads hold this; the runner listens."""

    def __init__(self) -> None:
        # A signal's handler may ask for a stop while its thread is in here already.
        self._lock = threading.RLock()
        self._executors: Sequence[Executor] = ()
        self._running = False
        self.stop: Stop | None = None
        self._error: BaseException | None = None
        self._left = False
        self._soon: Stop | None = None
        self._idle: Callable[[], None] = _nothing

    def on_idle(self, function: Callable[[], None]) -> None:
        """Call `function` when the next run is to fail or to end, and none is under way."""
        self._idle = function

    def soon(self, stop: Stop) -> None:
        """End the run that is about to begin, or under way."""
        with self._lock:
            self._soon = stop
            self(stop)

    def forget(self) -> None:
        """Undo `soon()`."""
        with self._lock:
            self._soon = None

    def listen(self, executors: Sequence[Executor]) -> None:
        """Kick these from now on."""
        self._executors = executors

    def begin(self) -> None:
        """A run begins: what was asked before is forgotten."""
        with self._lock:
            self.stop = None
            self._running = True
            if self._left:
                self(Stop(StopReason.STOPPED))
            elif self._soon is not None:
                self(self._soon)

    def pending(self) -> bool:
        """Whether the run under way is to end: nothing should wait for long."""
        return self.stop is not None

    def end(self) -> None:
        """The run is over."""
        with self._lock:
            self._running = False

    def fail(self, error: BaseException) -> None:
        """A device has failed outside the vCPUs' threads: the run under way, or the next, raises.

        The first failure counts.
        """
        with self._lock:
            if self._error is None:
                self._error = error
            runs = self(Stop(StopReason.STOPPED))
        if not runs:
            self._idle()

    def leave(self) -> None:
        """The user wants to leave: the run under way ends, and so does every later one."""
        with self._lock:
            self._left = True
            runs = self(Stop(StopReason.STOPPED))
        if not runs:
            self._idle()

    @property
    def left(self) -> bool:
        """Whether `leave()` was called: no run goes on."""
        return self._left

    def raise_failure(self) -> None:
        """Raises what `fail()` was given, if anything."""
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def __call__(self, stop: Stop) -> bool:
        """End the run under way with `stop`, unless it ends already. False if there is none."""
        with self._lock:
            if not self._running:
                return False
            if self.stop is None:
                self.stop = stop
            # In the lock: once the run is over its vCPUs may be closed.
            for executor in self._executors:
                executor.kick()
            return True


class _Report(NamedTuple):
    run: int
    exit: Exit | None
    error: BaseException | None


class _VcpuThread:
    """What one executor does with a host thread, from the first run to close()."""

    def __init__(
        self,
        number: int,
        executor: Executor,
        request: StopRequest,
        reports: "SimpleQueue[_Report]",
    ) -> None:
        self._executor = executor
        self._request = request
        self._reports = reports
        self._orders: SimpleQueue[int] = SimpleQueue()  # numbers of runs; 0: end
        self._ordered = self._done = 0
        self._detour: Callable[[], None] | None = None
        self._name = f"vmexit-vcpu{number}"
        self._worker: Worker | None = None
        self.ident = 0
        """The interpreter's number of it, 0 before it has started."""

    @property
    def running(self) -> bool:
        """Whether a run that was ordered is not over."""
        return self._done != self._ordered

    @property
    def native_id(self) -> int:
        """The system's number of the thread, 0 before it has started."""
        return 0 if self._worker is None else self._worker.thread.native_id or 0

    def begin(self, worker: Worker) -> None:
        """From now on it is this one. Raises what `Worker.do()` does."""
        self._worker = worker
        worker.do(self._main, self._name)

    def go(self, run: int) -> None:
        """Run until it stops; it reports, with the number `run`."""
        self._ordered = run
        self._orders.put(run)

    def detour(self, function: Callable[[], None]) -> None:
        """Call `function` in this thread, which is in an access now, once that is over."""
        self._detour = function
        self._executor.kick()

    def stand(self) -> None:
        """It begins no run any more; it is in none, or is just stopping that."""
        with suppress(Empty):
            self._orders.get_nowait()
            self._done = self._ordered
        self._orders.put(0)

    def end(self, workers: Workers) -> None:
        """It gives its thread back, behind `stand()`."""
        if self._worker is not None and workers.keep:
            self._worker.wait()  # if a signal's handler ends that, it is still ours
        worker, self._worker = self._worker, None
        if worker is not None:
            workers.give(worker)

    def _main(self) -> None:
        self.ident = threading.get_ident()
        executor = self._executor
        attached = False
        try:
            while run := self._orders.get():
                exit, error = None, None
                try:
                    if not attached:
                        executor.attach_thread()
                        attached = True
                    exit = self._run()
                except BaseException as caught:  # whatever it is, it is for the caller of run()
                    error = caught
                    self._detour = None
                self._done = run
                self._reports.put(_Report(run, exit, error))
                exit = error = None  # an error holds frames, and these what the caller may drop
        finally:
            if attached:
                executor.detach_thread()

    def _run(self) -> Exit:
        while True:
            exit = self._executor.run()
            detour, self._detour = self._detour, None
            if detour is not None:
                detour()
                if self._request.stop is None:
                    continue
                exit = Exit(ExitReason.INTERRUPTED, vcpu=exit.vcpu)
            # Else it is a kick that came too late for an earlier run.
            if exit.reason is not ExitReason.INTERRUPTED or self._request.stop is not None:
                return exit


class Runner:
    """Runs all vCPUs of a machine."""

    def __init__(
        self,
        executors: Sequence[Executor],
        request: StopRequest,
        running: Callable[[bool], None],
        workers: Workers,
    ) -> None:
        """`running` is called when a run begins, and when it has ended.

        The threads are some of `workers`.
        """
        self._workers = workers
        self._executors = executors
        self._running = running
        self._request = request
        self._reports: SimpleQueue[_Report] = SimpleQueue()
        self._threads: list[_VcpuThread] = []
        self._begun = False  # whether they were all started
        self._busy = threading.Lock()
        self._number = 0  # of the run
        self._live = 0  # the same, until run() is left
        self._between = threading.Lock()  # held in a detour
        self._closed = False
        self._process = os.getpid()
        self._caller = 0  # the thread in run()
        request.listen(executors)

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return self._busy.locked()

    def in_vcpu_thread(self) -> bool:
        """Whether the caller is a device or a callback, on a vCPU's thread."""
        return self._executor() is not None

    def native_id(self, vcpu: int) -> int:
        """The system's number of the thread that runs `vcpu`; 0 before the first run."""
        threads = self._threads
        return threads[vcpu if len(threads) > 1 else 0].native_id if threads else 0

    def vcpu_here(self) -> int:
        """The number of the vCPU whose thread this is; 0 where they share one, or elsewhere."""
        return self._executor() or 0

    def holds(self, vcpu: int) -> bool:
        """Whether the caller is within an access of `vcpu`, or of one that shares its thread."""
        number = self._executor()
        return number == vcpu or (number == 0 and len(self._threads) == 1)

    def _executor(self) -> int | None:
        """The number of the executor that the caller's thread runs."""
        current = threading.get_ident()
        for number, thread in enumerate(self._threads):
            if thread.ident == current:
                return number
        return None

    def detour(self, function: Callable[[], None]) -> None:
        """Call `function` while no vCPU runs, once the caller's access is over, and run on.

        Raises VmexitError where other vCPUs run.
        """
        if len(self._threads) > 1:
            raise VmexitError(
                "within an access of one vCPU the others run; stop() the machine, and go back then"
            )

        number = self._number

        def between() -> None:
            with self._between:
                if self._live == number:  # else whoever ran it has left, and may change it now
                    function()

        self._threads[0].detour(between)

    def run(self, timeout: float | None, only: int | None = None) -> Stop:
        """Run until the first vCPU stops, a stop is requested, or `timeout` seconds have passed.

        All vCPUs run, or `only` one; vCPUs that share a thread know that from their accelerator.

        Whatever a device raises is raised here, once all vCPUs have stopped. So is what a signal's
        handler raises meanwhile (KeyboardInterrupt, …); the machine can go on after it.
        """
        if self.forked:
            raise VmexitError("a fork has no threads to run this machine; make a new one in it")
        if not self._busy.acquire(blocking=False):
            raise VmexitError("this machine runs already; stop() it first")
        try:
            self._caller = threading.get_ident()
            if self._closed:
                raise VmexitError("this machine is closed; make a new one")
            try:
                self._running(True)
                return self._run(timeout, only)
            finally:
                with self._between:
                    self._live = 0
                self._running(False)
        finally:
            self._caller = 0
            self._request.end()
            self._busy.release()

    def _run(self, timeout: float | None, only: int | None) -> Stop:
        if not self._threads:
            _close_at_exit(self)
            self._begun = False
            self._threads = [
                _VcpuThread(number, executor, self._request, self._reports)
                for number, executor in enumerate(self._executors)
            ]
        threads = self._threads
        if only is not None and len(threads) > 1:
            threads = [threads[only]]
        self._settle()  # in case a run was left twice by exceptions
        self._request.begin()
        self._number += 1
        self._live = self._number
        self._request.raise_failure()
        try:
            if self._begun:
                for thread in threads:
                    thread.go(self._number)
            else:
                self._begin(threads)
            return self._wait(timeout, len(threads))
        finally:
            self._settle()

    def _begin(self, threads: Sequence[_VcpuThread]) -> None:
        """Start all threads, these with an order: to wake them up for it would take longer."""
        try:
            for thread in threads:
                thread.go(self._number)
            for thread in self._threads:
                thread.begin(self._workers.take())
            self._begun = True
        except BaseException as error:  # a signal's handler may raise anything
            self._request(Stop(StopReason.STOPPED))  # for those that run already
            self._end()
            if isinstance(error, RuntimeError):
                raise HostError(
                    f"cannot start a thread for a vCPU: {error}; free memory"
                ) from error
            raise

    def _end(self) -> None:
        for thread in self._threads:  # first: one more exception may end the waiting
            thread.stand()
        for thread in self._threads:
            thread.end(self._workers)
        self._threads.clear()

    def _wait(self, timeout: float | None, count: int) -> Stop:
        reports: list[_Report] = []
        end = None if timeout is None else time.monotonic() + timeout
        while len(reports) < count:
            left = math.inf if reports or end is None else end - time.monotonic()
            try:
                report = self._reports.get(timeout=min(max(left, 0), SIGNAL_SECONDS))
            except Empty:
                if left <= SIGNAL_SECONDS:
                    self._request(Stop(StopReason.TIMEOUT))
                    end = None
                continue
            if report.run != self._number:
                continue  # of an earlier run, which an exception has ended
            reports.append(report)
            if len(reports) < count:
                self._request(Stop(StopReason.STOPPED))  # the first to stop ends it for all
        for report in reports:
            if report.error is not None:
                raise report.error
        self._request.raise_failure()
        return self._verdict(reports)

    def settle(self) -> None:
        """Wait until no vCPU runs: the last run may have been left by two exceptions."""
        if any(thread.running for thread in self._threads) and self._busy.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._request.end()
                self._busy.release()

    def _settle(self) -> None:
        """Stop all vCPUs, whatever state an exception has left them in.

        A second exception from a signal ends this, too: nobody has to wait for a device that hangs.
        """
        while any(thread.running for thread in self._threads):
            self._request.begin()
            self._request(Stop(StopReason.STOPPED))
            with suppress(Empty):
                self._reports.get(timeout=_SETTLE_SECONDS)

    def _verdict(self, reports: list[_Report]) -> Stop:
        request = self._request.stop
        if request is not None and request.reason in _ASKED_BY_GUEST:
            return request
        for report in reports:
            if report.exit is not None and report.exit.reason is not ExitReason.INTERRUPTED:
                return stop_from_exit(report.exit)
        assert request is not None  # nothing else lets a vCPU report INTERRUPTED
        return request

    @property
    def forked(self) -> bool:
        """Whether this is a fork of the process that made it, which has none of the threads."""
        return os.getpid() != self._process

    def require_closable(self) -> None:
        """Raises VmexitError from within a device, a callback, or run()."""
        if self.in_vcpu_thread():
            raise VmexitError("a machine cannot be closed from within its own access; stop() it")
        if self._caller == threading.get_ident():  # in the handler of a signal
            raise VmexitError("a machine cannot be closed from within its own run(); stop() it")

    def close(self) -> None:
        """End the threads. Raises VmexitError from within a device, a callback, or run()."""
        if self.forked:
            return
        self.require_closable()
        # Again and again: a run may just begin, and not listen yet.
        while not self._busy.acquire(timeout=_SETTLE_SECONDS):
            self._request(Stop(StopReason.STOPPED))
        try:
            self._settle()
            self._request.end()
            self._end()
            self._closed = True
        finally:
            self._busy.release()
