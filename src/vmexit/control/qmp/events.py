"""Events: what happens to the machine, as QEMU tells of it (qapi/run-state.json and others)."""

import time
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from vmexit.control.qmp.commands import event, event_name
from vmexit.control.qmp.typed import to_wire
from vmexit.control.qmp.wire import Json, encode
from vmexit.machine.events import Event, EventKind
from vmexit.machine.machine import Machine
from vmexit.machine.stop import Stop, StopReason

if TYPE_CHECKING:
    from vmexit.control.qmp.session import Session


class ShutdownCause(Enum):
    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_QMP_SYSTEM_RESET = "host-qmp-system-reset"
    HOST_SIGNAL = "host-signal"
    GUEST_SHUTDOWN = "guest-shutdown"
    GUEST_RESET = "guest-reset"
    GUEST_PANIC = "guest-panic"


class GuestPanicAction(Enum):
    PAUSE = "pause"
    POWEROFF = "poweroff"
    RUN = "run"


class DumpStatus(Enum):
    COMPLETED = "completed"
    FAILED = "failed"


class DumpQueryResult(NamedTuple):
    status: DumpStatus
    completed: int
    total: int


@event("STOP")
class Stopped(NamedTuple):
    pass


@event("RESUME")
class Resumed(NamedTuple):
    pass


@event("POWERDOWN")
class Powerdown(NamedTuple):
    pass


@event("RESET")
class Reset(NamedTuple):
    guest: bool
    reason: ShutdownCause


@event("SHUTDOWN")
class Shutdown(NamedTuple):
    guest: bool
    reason: ShutdownCause


@event("GUEST_PANICKED")
class GuestPanicked(NamedTuple):
    action: GuestPanicAction


@event("GUEST_CRASHLOADED")
class GuestCrashLoaded(NamedTuple):
    action: GuestPanicAction


@event("BALLOON_CHANGE")
class BalloonChange(NamedTuple):
    actual: int


@event("DUMP_COMPLETED")
class DumpCompleted(NamedTuple):
    result: DumpQueryResult
    error: str | None = None


@event("X_SNAPSHOT_PROGRESS")
class SnapshotProgress(NamedTuple):
    """How many bytes an `x-snapshot-save` to `path` has done, of how many."""

    path: str
    completed: int
    total: int


# There may be any number of these: of each, one waits for a client who does not read.
_ONLY_LAST = (BalloonChange, GuestCrashLoaded, SnapshotProgress)

# These change nothing about whether the machine runs, or why not.
_ELSE = (EventKind.POWERDOWN, EventKind.CRASH_KERNEL, EventKind.BALLOON)

Data = (
    Stopped
    | Resumed
    | Powerdown
    | Reset
    | Shutdown
    | GuestPanicked
    | GuestCrashLoaded
    | BalloonChange
    | DumpCompleted
    | SnapshotProgress
)


class Relay:
    """Tells the clients of one server what happens to the machine."""

    def __init__(self, vm: Machine, sessions: "Iterable[Session]") -> None:
        self._vm = vm
        self._sessions = sessions
        self._ended = False
        self.debugging = False
        """Whether it stands at a breakpoint, or after a step."""

    def tell(self, event: Event) -> None:
        """A subscriber of the machine: never waits."""
        if event.kind not in _ELSE:
            self.debugging = event.kind is EventKind.DEBUG
        if event.kind in (EventKind.RESUMED, EventKind.RESET):
            self._ended = False
        for data in self._translated(event):
            self.send(data, event.time)

    def _translated(self, event: Event) -> "list[Data]":
        held: list[Data] = [Stopped()] if event.held else []
        match event.kind:
            case EventKind.RESUMED:
                return [Resumed()]
            case EventKind.PAUSED | EventKind.DEBUG:
                return [Stopped()]
            case EventKind.POWERDOWN:
                return [Powerdown()]
            case EventKind.RESET:
                return [_reset(event.stop)]
            case EventKind.SHUTDOWN:
                return [_shutdown(event.stop), *held]
            case EventKind.CRASHED:
                if event.held:
                    return [GuestPanicked(GuestPanicAction.PAUSE), *held]
                ends = Shutdown(True, ShutdownCause.GUEST_PANIC)
                return [GuestPanicked(GuestPanicAction.POWEROFF), ends]
            case EventKind.CRASH_KERNEL:
                return [GuestCrashLoaded(GuestPanicAction.RUN)]
            case EventKind.BALLOON:
                return [BalloonChange(self._vm.config.memory - event.value)]

    def send(self, data: "Data", when: float) -> None:
        """Tell all clients; `when` is in seconds since 1970."""
        self._ended |= isinstance(data, Shutdown)
        name = event_name(type(data))
        message: dict[str, Json] = {"event": name}
        if fields := to_wire(data):
            message["data"] = fields
        seconds, microseconds = divmod(round(when * 1_000_000), 1_000_000)
        message["timestamp"] = {"seconds": seconds, "microseconds": microseconds}
        line = encode(message)
        for session in self._sessions:
            session.event(line, name if isinstance(data, _ONLY_LAST) else "")

    def tell_end(self) -> None:
        """The program ends: SHUTDOWN, unless the clients know already."""
        if not self._ended:
            self.send(Shutdown(False, ShutdownCause.HOST_SIGNAL), time.time())


def _reset(stop: Stop | None) -> Reset:
    if stop is None:
        return Reset(False, ShutdownCause.HOST_QMP_SYSTEM_RESET)
    cause = ShutdownCause.GUEST_PANIC if stop.crashed else _cause(stop)
    return Reset(True, cause)


def _shutdown(stop: Stop | None) -> Shutdown:
    if stop is not None and stop.reason is StopReason.QUIT:
        return Shutdown(False, ShutdownCause.HOST_QMP_QUIT)
    return Shutdown(True, ShutdownCause.GUEST_SHUTDOWN if stop is None else _cause(stop))


def _cause(stop: Stop) -> ShutdownCause:
    reset = stop.reason is StopReason.RESET
    return ShutdownCause.GUEST_RESET if reset else ShutdownCause.GUEST_SHUTDOWN
