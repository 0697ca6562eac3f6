"""Running vCPUs: a host thread for each, and one caller who waits for the first to stop."""

import signal
import threading
from queue import Empty, SimpleQueue
from typing import NamedTuple

from vmexit.accel.base import Exit, ExitReason, Vcpu
from vmexit.core.errors import VmexitError
from vmexit.machine.stop import Stop, StopReason, stop_from_exit

# What a thread does to itself must not be blocked: its faults, and writing to a closed pipe.
_NEVER_BLOCKED = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGABRT,
    signal.SIGPIPE,
}


class StopRequest:
    """Asks a run to end. Devices and other threads hold this; the runner listens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._vcpus: list[Vcpu] = []
        self._running = False
        self.stop: Stop | None = None

    def listen(self, vcpus: list[Vcpu]) -> None:
        """Kick these from now on."""
        self._vcpus = vcpus

    def begin(self) -> None:
        """A run begins: what was asked before is forgotten."""
        with self._lock:
            self.stop = None
            self._running = True

    def end(self) -> None:
        """The run is over."""
        with self._lock:
            self._running = False

    def __call__(self, stop: Stop) -> bool:
        """End the run under way with `stop`, unless it ends already. False if there is none."""
        with self._lock:
            if not self._running:
                return False
            if self.stop is None:
                self.stop = stop
            # In the lock: once the run is over its vCPUs may be closed.
            for vcpu in self._vcpus:
                vcpu.kick()
            return True


class _Report(NamedTuple):
    vcpu: int
    exit: Exit | None
    error: BaseException | None


class _VcpuThread:
    """The host thread of one vCPU, from the first run to close()."""

    def __init__(self, vcpu: Vcpu, request: StopRequest, reports: "SimpleQueue[_Report]") -> None:
        self._vcpu = vcpu
        self._request = request
        self._reports = reports
        self._orders: SimpleQueue[bool] = SimpleQueue()
        # A daemon: a program that forgets close() must still be able to end.
        self.thread = threading.Thread(
            target=self._main, name=f"vmexit-vcpu{vcpu.index}", daemon=True
        )
        self.thread.start()

    def go(self) -> None:
        """Run the vCPU until it stops; it reports."""
        self._orders.put(True)

    def end(self) -> None:
        """End the thread, which does not run its vCPU now."""
        self._orders.put(False)
        self.thread.join()

    def _main(self) -> None:
        # The program's signals are for its own threads.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _NEVER_BLOCKED)
        vcpu = self._vcpu
        vcpu.attach_thread()
        try:
            while self._orders.get():
                exit, error = None, None
                try:
                    exit = vcpu.run()
                    while exit.reason is ExitReason.INTERRUPTED and self._request.stop is None:
                        exit = vcpu.run()  # a kick that came too late for an earlier run
                except BaseException as caught:  # whatever it is, it is for the caller of run()
                    error = caught
                self._reports.put(_Report(vcpu.index, exit, error))
                exit = error = None  # an error holds frames, and these what the caller may drop
        finally:
            vcpu.detach_thread()


class Runner:
    """Runs all vCPUs of a machine."""

    def __init__(self, vcpus: list[Vcpu], request: StopRequest) -> None:
        self._vcpus = vcpus
        self._request = request
        self._reports: SimpleQueue[_Report] = SimpleQueue()
        self._threads: list[_VcpuThread] = []
        self._busy = threading.Lock()
        request.listen(vcpus)

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return self._busy.locked()

    def in_vcpu_thread(self) -> bool:
        """Whether the caller is a device or a callback, on a vCPU's thread."""
        current = threading.current_thread()
        return any(t.thread is current for t in self._threads)

    def run(self, timeout: float | None) -> Stop:
        """Run until the first vCPU stops, a stop is requested, or `timeout` seconds have passed.

        Whatever a device raises is raised here, once all vCPUs have stopped. So is
        KeyboardInterrupt; the machine can go on after it.
        """
        if not self._busy.acquire(blocking=False):
            raise VmexitError("this machine runs already; stop() it first")
        try:
            if not self._threads:
                self._threads = [
                    _VcpuThread(vcpu, self._request, self._reports) for vcpu in self._vcpus
                ]
            self._request.begin()
            for thread in self._threads:
                thread.go()
            return self._wait(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        finally:
            self._request.end()
            self._busy.release()

    def _wait(self, timeout: float | None) -> Stop:
        reports: list[_Report] = []
        interrupt: KeyboardInterrupt | None = None
        while len(reports) < len(self._threads):
            try:
                reports.append(self._reports.get(timeout=None if reports else timeout))
                if len(reports) < len(self._threads):
                    self._request(Stop(StopReason.STOPPED))  # the first to stop ends it for all
            except Empty:
                self._request(Stop(StopReason.TIMEOUT))
                timeout = None
            except KeyboardInterrupt as caught:
                if interrupt is not None:
                    raise  # asked twice: do not wait for a device that hangs
                interrupt = caught
                self._request(Stop(StopReason.STOPPED))
                timeout = None
        for report in reports:
            if report.error is not None:
                raise report.error
        if interrupt is not None:
            raise interrupt
        return self._verdict(reports)

    def _verdict(self, reports: list[_Report]) -> Stop:
        request = self._request.stop
        if request is not None and request.reason is StopReason.DEBUG_EXIT:
            return request
        for report in reports:
            if report.exit is not None and report.exit.reason is not ExitReason.INTERRUPTED:
                return stop_from_exit(report.vcpu, report.exit)
        assert request is not None  # nothing else lets a vCPU report INTERRUPTED
        return request

    def close(self) -> None:
        """End the threads. Raises VmexitError from within a device or a callback."""
        if self.in_vcpu_thread():
            raise VmexitError("a machine cannot be closed from within its own access; stop() it")
        self._request(Stop(StopReason.STOPPED))
        with self._busy:
            for thread in self._threads:
                thread.end()
            self._threads.clear()
