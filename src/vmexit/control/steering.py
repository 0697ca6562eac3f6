"""What the protocols have in common: the state of a machine in QEMU's words, and going on."""

from enum import Enum

from vmexit.core.errors import VmexitError
from vmexit.machine.events import RunState
from vmexit.machine.machine import Machine
from vmexit.machine.stop import StopReason


class RunStatus(Enum):
    """Those of QEMU's run states that there are here (qapi/run-state.json)."""

    PRELAUNCH = "prelaunch"  # nothing has run yet
    RUNNING = "running"
    PAUSED = "paused"
    DEBUG = "debug"
    SHUTDOWN = "shutdown"
    GUEST_PANICKED = "guest-panicked"
    INTERNAL_ERROR = "internal-error"


_STATUS = {
    RunState.CREATED: RunStatus.PRELAUNCH,
    RunState.RUNNING: RunStatus.RUNNING,
    RunState.SHUTDOWN: RunStatus.SHUTDOWN,
    RunState.CLOSED: RunStatus.SHUTDOWN,
}
# The guest crashed by its own doing.
_PANICS = (StopReason.GUEST_CRASH, StopReason.SHUTDOWN)


def run_status(vm: Machine, *, debugging: bool = False) -> RunStatus:
    """What the machine is doing; `debugging` is whether a debugger has paused it."""
    state = vm.state
    if state is RunState.PAUSED:
        return RunStatus.DEBUG if debugging else RunStatus.PAUSED
    if state is RunState.CRASHED:
        last = vm.last_stop
        panics = last is None or last.reason in _PANICS
        return RunStatus.GUEST_PANICKED if panics else RunStatus.INTERNAL_ERROR
    return _STATUS[state]


def resume(vm: Machine, *, step: int | None = None, only: int | None = None) -> None:
    """As `Machine.resume()`. Raises VmexitError for a guest that is at its end, too."""
    if vm.state in (RunState.SHUTDOWN, RunState.CRASHED):
        raise VmexitError("the guest is at its end and cannot go on; use system_reset first")
    vm.resume(step=step, only=only)
