"""The event loop: one thread that waits for timers and descriptors on behalf of all devices."""

import ctypes
import heapq
import os
import select
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count

from vmexit.core.errors import HostError
from vmexit.core.threads import start_without_signals

_TFD_TIMER_ABSTIME = 1
_CLOCK_MONOTONIC = 1
_TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC

_SPEC = struct.Struct("=qqqq")  # struct itimerspec: interval and value, each seconds and ns

# Entries of timers that there always may be.
_FEW = 64


class LoopTimer:
    """See `vmexit.core.clock.Timer`."""

    __slots__ = ("_loop", "deadline", "function")

    def __init__(self, loop: "EventLoop", function: Callable[[], None]) -> None:
        self._loop = loop
        self.function = function
        self.deadline: int | None = None

    def set(self, deadline: int | None) -> None:
        self._loop._set(self, deadline)


class EventLoop:
    """Timers on the host's monotonic clock, and one-shot watches of descriptors.

    The thread starts with the first use and ends with `close()`. Functions are called on it, one
    after the other. What one of them raises goes to `fail`.
    """

    def __init__(self, fail: Callable[[BaseException], None]) -> None:
        self._fail = fail
        self._lock = threading.Lock()
        self._queue: list[tuple[int, int, LoopTimer]] = []
        self._order = count()
        self._most = _FEW  # entries in the queue, before it is looked through
        self._armed: int | None = None  # what the timer descriptor waits for
        self._watched: dict[int, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._closing = False
        self._stands_at: int | None = None
        self._timer_fd = self._wake_fd = -1
        self._poll: select.epoll | None = None

    def another(self) -> "EventLoop":
        """One with a thread of its own, for what may take long; it fails to the same."""
        return EventLoop(self._fail)

    def now(self) -> int:
        stands_at = self._stands_at
        return time.monotonic_ns() if stands_at is None else stands_at

    def stand(self, ago: int = 0) -> None:
        """The clock stands still and no timer is due, until `go_on()`.

        So all that is read from it, and all that is set by it, is of one moment: that so many
        nanoseconds `ago`.
        """
        if self._thread is None:
            self._stands_at = time.monotonic_ns() - ago
            return
        with self._lock:
            self._stands_at = time.monotonic_ns() - ago

    def go_on(self) -> None:
        """The clock, if it stands, jumps to the time that it is now."""
        self._stands_at = None
        if self._thread is not None:
            with self._lock:
                self._armed = None  # some may have been due
                self._arm()

    def timer(self, function: Callable[[], None]) -> LoopTimer:
        return LoopTimer(self, function)

    def _set(self, timer: LoopTimer, deadline: int | None) -> None:
        with self._lock:
            timer.deadline = deadline
            if deadline is None or self._closing:
                return
            self._start()
            heapq.heappush(self._queue, (deadline, next(self._order), timer))
            if len(self._queue) > self._most:
                self._tidy()
            self._arm()

    def _tidy(self) -> None:
        """Forget what was replaced: a guest may set its timers any number of times."""
        current = {entry[2]: entry for entry in self._queue if entry[2].deadline == entry[0]}
        self._queue[:] = sorted(current.values())
        self._most = 2 * len(self._queue) + _FEW

    def watch(self, fd: int, function: Callable[[], None]) -> None:
        """Call `function` once, when `fd` can be read or has been closed at the other end."""
        self._watch(fd, function, select.EPOLLIN)

    def watch_writable(self, fd: int, function: Callable[[], None]) -> None:
        """Call `function` once, when `fd` can be written or has failed.

        It replaces a `watch()` of the same descriptor: for both at once, `os.dup()` it.
        """
        self._watch(fd, function, select.EPOLLOUT)

    def _watch(self, fd: int, function: Callable[[], None], event: int) -> None:
        with self._lock:
            if self._closing:
                return
            self._start()
            assert self._poll is not None
            self._watched[fd] = function
            event |= select.EPOLLONESHOT
            try:
                try:
                    self._poll.modify(fd, event)
                except FileNotFoundError:  # not watched yet
                    self._poll.register(fd, event)
            except PermissionError:  # a regular file, which is always ready
                self._ready.append(fd)
                os.eventfd_write(self._wake_fd, 1)

    def unwatch(self, fd: int) -> None:
        """Forget `fd`, before it is closed. Its function may be under way on the loop's thread."""
        with self._lock:
            if self._watched.pop(fd, None) is not None and self._poll is not None:
                try:
                    self._poll.unregister(fd)
                except OSError:  # a regular file, or closed already
                    return

    def _start(self) -> None:
        if self._thread is not None:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        self._settime = libc.timerfd_settime
        self._settime.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]
        self._ready: list[int] = []
        self._timer_fd = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
        if self._timer_fd < 0:
            number = ctypes.get_errno()
            raise HostError(f"cannot make a timer: {os.strerror(number)}; close some files")
        try:
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._poll = select.epoll()
            self._poll.register(self._timer_fd, select.EPOLLIN)
            self._poll.register(self._wake_fd, select.EPOLLIN)
            thread = threading.Thread(target=self._main, name="vmexit-events", daemon=True)
            start_without_signals(thread)
        except (OSError, RuntimeError) as error:
            self._release()
            raise HostError(f"cannot start the event loop: {error}; free memory") from error
        self._thread = thread

    def _arm(self) -> None:
        """Have the descriptor wake us for the earliest timer."""
        queue = self._queue
        while queue and queue[0][2].deadline != queue[0][0]:
            heapq.heappop(queue)  # set anew since, or not at all
        first = queue[0][0] if queue else None
        if first is not None and first != self._armed:
            # A value of 0 would disarm it.
            seconds, nanoseconds = divmod(max(first, 1), 1_000_000_000)
            self._settime(
                self._timer_fd, _TFD_TIMER_ABSTIME, _SPEC.pack(0, 0, seconds, nanoseconds), None
            )
            self._armed = first

    def _main(self) -> None:
        assert self._poll is not None
        poll, timer_fd, wake_fd = self._poll, self._timer_fd, self._wake_fd
        while not self._closing:
            for fd, _ in poll.poll():
                if fd == timer_fd:
                    self._run_timers()
                elif fd == wake_fd:
                    os.eventfd_read(wake_fd)
                    with self._lock:
                        ready, self._ready = self._ready, []
                    for one in ready:
                        self._call_watcher(one)
                else:
                    self._call_watcher(fd)

    def _call_watcher(self, fd: int) -> None:
        with self._lock:
            function = self._watched.get(fd)
        if function is not None:
            self._call(function)

    def _run_timers(self) -> None:
        with suppress(BlockingIOError):  # set anew in between
            os.read(self._timer_fd, 8)
        due: list[LoopTimer] = []
        with self._lock:
            self._armed = None
            if self._stands_at is not None:
                return
            now = self.now()
            queue = self._queue
            while queue and queue[0][0] <= now:
                deadline, _, timer = heapq.heappop(queue)
                if timer.deadline == deadline:
                    timer.deadline = None
                    due.append(timer)
            self._arm()
        for timer in due:
            self._call(timer.function)

    def _call(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # a device's failure is for the caller of run()
            self._fail(error)

    def close(self) -> None:
        """End the thread. Nothing is called afterwards."""
        with self._lock:
            self._closing = True
            thread = self._thread
            if thread is None:
                return
            os.eventfd_write(self._wake_fd, 1)
        if thread is not threading.current_thread():
            thread.join()
            self._release()

    def _release(self) -> None:
        if self._poll is not None:
            self._poll.close()
            self._poll = None
        for fd in (self._timer_fd, self._wake_fd):
            if fd >= 0:
                os.close(fd)
        self._timer_fd = self._wake_fd = -1
        self._thread = None
