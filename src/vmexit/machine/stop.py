"""Why a run ended."""

from enum import Enum
from typing import NamedTuple

from vmexit.accel.base import Exit, ExitReason, Point, SystemEvent
from vmexit.core.errors import GuestCrash


class StopReason(Enum):
    """Why `Machine.run()` returned."""

    HALT = "halt"  # HLT, with nothing that could wake the vCPU
    DEBUG_EXIT = "debug-exit"  # the guest wrote to the debug-exit port
    POWEROFF = "poweroff"
    RESET = "reset"
    SHUTDOWN = "shutdown"  # triple fault
    INTERNAL_ERROR = "internal-error"  # the accelerator could not go on
    FAIL_ENTRY = "fail-entry"  # the processor refused the guest's state
    UNKNOWN = "unknown"  # an exit for a hardware reason that has no name
    GUEST_CRASH = "guest-crash"  # the guest itself reports that it crashed
    DEBUG = "debug"  # a breakpoint or watchpoint, or the end of a step
    UNTIL = "until"  # what run_until() was waiting for has happened
    IRQ_WINDOW = "irq-window"  # the guest can take an interrupt now
    TIMEOUT = "timeout"
    STOPPED = "stopped"  # Machine.stop()
    QUIT = "quit"  # the same, with status 0: somebody wants no more of it
    PAUSED = "paused"  # Machine.pause(): run() does not return for that


_CRASHES = frozenset(
    (
        StopReason.SHUTDOWN,
        StopReason.INTERNAL_ERROR,
        StopReason.FAIL_ENTRY,
        StopReason.UNKNOWN,
        StopReason.GUEST_CRASH,
    )
)


class Stop(NamedTuple):
    """How a run ended. `vcpu` is the number of the vCPU that ended it."""

    reason: StopReason
    vcpu: int = 0
    detail: str = ""
    value: int = 0
    """What the guest wrote to the debug-exit port."""
    dump: str = ""
    """Registers and instruction at a crash."""
    point: Point | None = None
    """The breakpoint or watchpoint, for DEBUG; None there means that a step is done."""

    @property
    def crashed(self) -> bool:
        """Whether the guest crashed: triple fault, emulation failure, failed entry, …"""
        return self.reason in _CRASHES

    @property
    def status(self) -> int:
        """The exit status of the command: 0, `(value << 1) | 1`, 3 for a crash, 124, 130."""
        if self.crashed:
            return GuestCrash.exit_status
        if self.reason is StopReason.DEBUG_EXIT:
            return self.value << 1 | 1
        return {StopReason.TIMEOUT: 124, StopReason.STOPPED: 130}.get(self.reason, 0)

    def check(self) -> "Stop":
        """Itself; raises GuestCrash, with registers, if the guest crashed."""
        if self.crashed:
            raise GuestCrash("\n".join(filter(None, (self.summary(), self.dump))))
        return self

    def summary(self) -> str:
        """One line about it."""
        detail = f": {self.detail}" if self.detail else ""
        return f"vcpu {self.vcpu}: {self.reason.value}{detail}"


_REASONS = {
    ExitReason.HALT: StopReason.HALT,
    ExitReason.SHUTDOWN: StopReason.SHUTDOWN,
    ExitReason.INTERNAL_ERROR: StopReason.INTERNAL_ERROR,
    ExitReason.FAIL_ENTRY: StopReason.FAIL_ENTRY,
    ExitReason.UNKNOWN: StopReason.UNKNOWN,
    ExitReason.DEBUG: StopReason.DEBUG,
    ExitReason.IRQ_WINDOW: StopReason.IRQ_WINDOW,
}
_EVENTS = {
    SystemEvent.POWEROFF: StopReason.POWEROFF,
    SystemEvent.RESET: StopReason.RESET,
    SystemEvent.CRASH: StopReason.GUEST_CRASH,
}


def stop_from_exit(exit: Exit) -> Stop:
    """The `Stop` that an exit which ended the run amounts to."""
    reason = _EVENTS[exit.event] if exit.event is not None else _REASONS[exit.reason]
    return Stop(reason, exit.vcpu, exit.detail, point=exit.point)
