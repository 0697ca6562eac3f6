"""One run of a machine from its beginning to its end, paused and resumed by anyone meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

from vmexit.core.errors import VmexitError
from vmexit.core.threads import SIGNAL_SECONDS
from vmexit.machine.debug import ALL, DebuggedRunner, Turn
from vmexit.machine.events import EventKind, RunState, Subscribers
from vmexit.machine.runner import StopRequest
from vmexit.machine.stop import Stop, StopReason

# How soon a pause that a run has missed, which was just beginning, is asked for again.
_AGAIN = 0.02


class After(Enum):
    """What is to happen after the guest has stopped."""

    END = "end"  # run() returns
    HOLD = "hold"  # it is paused
    RESET = "reset"  # and it begins again


# These end a run, whatever the guest does.
_ASKED_FOR = (StopReason.STOPPED, StopReason.TIMEOUT, StopReason.QUIT)

# Asked about each stop of the guest. The first that does not want the end has it.
Decision = Callable[[Stop], After]


class Lifecycle:
    """Runs a machine in the thread of whoever calls `run()`; everything else from any thread.

    Its vCPUs run while the state is RUNNING. While they are held in PAUSED, `run()` waits.
    """

    def __init__(
        self,
        runner: DebuggedRunner,
        request: StopRequest,
        reset: Callable[[], None],
        describe: Callable[[Stop], Stop],
        subscribers: Subscribers,
    ) -> None:
        """`reset` puts the guest back to its beginning, while no vCPU runs.

        `describe` adds what can be told of a stop only as long as the machine is there.
        """
        self._runner = runner
        self._reset = reset
        self._describe = describe
        self._request = request
        self.subscribers = subscribers
        self.control = threading.RLock()
        """Held by whoever changes what the machine does, or wants it to stay as it is."""
        self._changed = threading.Condition()
        self._state = RunState.CREATED
        self._held = False
        self._turn = self._interrupted = ALL
        self._bars = 0  # whose thread that is
        self._barred = 0  # how many are within paused(): no run may begin
        self._brief = False  # held by paused(), of which nobody is told
        self._told = False  # what subscribers know: whether it runs
        self._quit = False  # the next run is over before it begins
        self._told_quit = False  # subscribers know that this run, or the next one, ends so
        self._active = 0  # the thread in run()
        self._over = False  # no run may begin any more
        self._ending: Stop | None = None  # asked for while it was held
        self._last: Stop | None = None
        self._decisions: list[Decision] = []
        request.on_idle(self._wake)

    @property
    def state(self) -> RunState:
        """What the machine is doing."""
        return self._state

    @property
    def active(self) -> bool:
        """Whether a `run()` is under way, held or not."""
        return self._active != 0

    @property
    def last(self) -> Stop | None:
        """How the guest has stopped the last time, if it did."""
        return self._last

    def decide(self, decision: Decision) -> Callable[[], None]:
        """Ask `decision` about each stop of the guest; returns what ends that."""
        with self._changed:
            self._decisions.append(decision)

        def end() -> None:
            with self._changed:
                if decision in self._decisions:
                    self._decisions.remove(decision)

        return end

    # The thread of run().

    def run(self, timeout: float | None, turn: Turn = ALL) -> Stop:
        """See `Machine.run()`."""
        with self._changed:
            if self._over:
                raise VmexitError("this machine is closed; make a new one")
            if self._active:
                raise VmexitError("this machine runs already; stop() it first")
            if self._barred and self._bars == threading.get_ident():
                raise VmexitError("a machine cannot run within its own paused(); leave that first")
            self._active = threading.get_ident()
            self._ending = Stop(StopReason.QUIT) if self._quit else None
            self._quit, self._told_quit = False, self._quit
            self._request.forget()
            if turn != ALL:
                self._turn = turn
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                left = None if end is None else max(0.0, end - time.monotonic())
                stop = self._wait(left)
                if stop is None:
                    stop = self._run(end)
                elif self._told:  # it was asked for within paused()
                    quit = stop.reason is StopReason.QUIT
                    self._become(RunState.PAUSED, None if quit else EventKind.PAUSED)
                if stop is not None:
                    self._request.raise_failure()
                    return self._describe(stop)
        except Exception:
            if self._told:  # all believe that it runs
                self._become(RunState.PAUSED, EventKind.PAUSED)
            raise
        finally:
            with self._changed:
                self._active = 0
                self._held = self._brief = False
                self._turn = ALL
                if self._state is RunState.RUNNING:  # an exception
                    self._state = RunState.PAUSED
                    self._told = False
                self._changed.notify_all()

    def _wait(self, timeout: float | None) -> Stop | None:
        """Wait until it may run, and say that it does; how it ends, if it may not."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self._request.raise_failure()
            with self._changed:
                if self._ending is not None:
                    return self._ending
                if self._request.left:
                    return Stop(StopReason.STOPPED)
                if not self._held:
                    if self._barred:
                        self._changed.wait(SIGNAL_SECONDS)  # whoever looks at it has soon done
                        continue
                    self._state = RunState.RUNNING
                    return None
                if self._state is not RunState.RUNNING:
                    left = None if end is None else end - time.monotonic()
                    if left is not None and left <= 0:
                        return Stop(StopReason.TIMEOUT)
                    left = SIGNAL_SECONDS if left is None else min(left, SIGNAL_SECONDS)
                    self._changed.wait(left)
                    continue
                self._interrupted = self._turn
            # Resumed and paused again before it ran: whoever waits for a stop has to know.
            self._tell_resumed()
            self._become(RunState.PAUSED, None if self._brief else EventKind.PAUSED)

    def _tell_resumed(self) -> None:
        if not self._told:
            self._told = True
            self.subscribers.tell(EventKind.RESUMED)

    def _run(self, end: float | None) -> Stop | None:
        """Run until the vCPUs stop; None if that was not the end."""
        with self._changed:
            turn, self._turn = self._turn, ALL
        self._tell_resumed()
        left = None if end is None else max(0.0, end - time.monotonic())
        stop = self._runner.run(left, turn)
        if stop.reason is StopReason.PAUSED:
            self._interrupted = turn
            self._become(RunState.PAUSED, None if self._brief else EventKind.PAUSED)
            return None
        if stop.reason in _ASKED_FOR:
            quit = stop.reason is StopReason.QUIT  # which was told when it was asked for
            self._become(RunState.PAUSED, None if quit else EventKind.PAUSED)
            return stop
        self._last = stop
        after = next(
            (a for decide in tuple(self._decisions) if (a := decide(stop)) is not After.END),
            After.END,
        )
        if after is After.RESET:
            self._reset()
            self._last = None
            self.subscribers.tell(EventKind.RESET, stop)
            return None
        held = after is After.HOLD
        with self._changed:
            self._brief = False
            self._held |= held
        if stop.reason in (StopReason.DEBUG, StopReason.UNTIL):
            self._become(RunState.PAUSED, EventKind.DEBUG, stop, held)
        elif stop.crashed:
            self._become(RunState.CRASHED, EventKind.CRASHED, stop, held)
        else:
            self._become(RunState.SHUTDOWN, EventKind.SHUTDOWN, stop, held)
        return stop if after is After.END else None

    def _become(
        self,
        state: RunState,
        kind: EventKind | None,
        stop: Stop | None = None,
        held: bool = False,
    ) -> None:
        with self._changed:
            if self._state is not RunState.CLOSED:
                self._state = state
            if kind not in (None, EventKind.RESET):
                self._told = False
            self._changed.notify_all()
        if kind is not None:
            self.subscribers.tell(kind, stop, held=held)

    def _wake(self) -> None:
        """Something ends the next run before it begins: a held one has to see that."""
        with self._changed:
            self._changed.notify_all()

    # Any thread.

    def pause(self) -> None:
        """Returns once no vCPU runs; a run that is still to come begins paused."""
        self._require_other_thread()
        with self.control:
            self._hold()
            self._brief = False
            if self._told and self._state is RunState.PAUSED:  # it was held by paused() only
                self._told = False
                self.subscribers.tell(EventKind.PAUSED)

    def _hold(self) -> None:
        with self._changed:
            self._held = True
            while self._state is RunState.RUNNING:
                # Again and again: a run may just begin, and not listen yet.
                self._request(Stop(StopReason.PAUSED))
                self._changed.wait(_AGAIN)

    def resume(self, turn: Turn = ALL) -> None:
        """Let a held run go on, by a step if `turn` says so. Raises VmexitError without one."""
        if self._runs_here():
            return  # and who is about to pause it waits for this thread
        with self.control, self._changed:
            if self._state is RunState.RUNNING:
                return
            if not self._active and not self._held:
                raise VmexitError("no run of this machine is under way; run() or start() it")
            self._held = False
            self._turn = turn
            if not self._active:
                return  # a run that is still to come begins with that
            self._state = RunState.RUNNING
            self._changed.notify_all()

    def stop(self, reason: StopReason = StopReason.STOPPED) -> bool:
        """Make `run()` return; False if there is none: then QUIT is for the next one."""
        stop = Stop(reason)
        if reason is StopReason.QUIT:
            with self._changed:
                told, self._told_quit = self._told_quit, True
            if not told:
                self.subscribers.tell(EventKind.SHUTDOWN, stop)
        if self._request(stop):
            return True
        with self._changed:
            if not self._active:
                self._quit |= reason is StopReason.QUIT
                return False
            self._ending = stop
            self._request.soon(stop)
            self._changed.notify_all()
            return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No vCPU runs within, and nobody resumes it; it goes on behind if it ran before.

        Nobody is told of that. What stops by itself just then stays as it is.
        """
        self._require_other_thread()
        with self.control:
            if self._state is RunState.CLOSED:
                raise VmexitError("this machine is closed; make a new one")
            ran = self._state is RunState.RUNNING
            try:
                with self._changed:
                    self._barred += 1
                    self._bars = threading.get_ident()
                if ran:
                    self._brief = True
                    self._hold()
                self._runner.settle()
                yield
            finally:
                with self._changed:
                    self._barred -= 1
                    brief = ran and self._brief
                    if ran:  # else it belongs to another one around this
                        self._brief = False
                    self._changed.notify_all()
                if brief and self._active and self._ending is None:
                    self.resume(self._interrupted)

    def reset(self, back: Callable[[], None] | None = None) -> None:
        """Put the guest back to its beginning, or where `back()` puts it while no vCPU runs.

        It runs on from there if it ran before.
        """
        self._require_other_thread()
        with self.paused():
            try:
                (back or self._reset)()
            except BaseException:
                if self._brief:  # half of a guest must not run on
                    self._brief = False
                    self._become(RunState.PAUSED, EventKind.PAUSED)
                raise
            self._last = None
            self._become(RunState.PAUSED, EventKind.RESET)

    def has_gone_back(self) -> None:
        """The guest, which runs, is somewhere else now. It sets the pace: nobody is told."""
        self._last = None

    def end(self) -> None:
        """No run is under way any more, and none begins. Raises VmexitError from within one."""
        with self._changed:
            if self._active == threading.get_ident():
                raise VmexitError("a machine cannot be closed from within its own run(); stop() it")
            self._over = True
            while self._active:
                self.stop()
                self._changed.wait(_AGAIN)
            if self._state is RunState.RUNNING:  # a signal came as run() was left by another one
                self._state = RunState.PAUSED
                self._changed.notify_all()

    def close(self) -> None:
        """The machine is closed."""
        self._state = RunState.CLOSED

    def _runs_here(self) -> bool:
        """Whether it runs, and this is the thread in `run()`: a callback."""
        return self._active == threading.get_ident() and self._state is RunState.RUNNING

    def _require_other_thread(self) -> None:
        if self._runs_here():
            raise VmexitError("a machine cannot be paused from within its own run(); stop() it")
