"""The command that saves a snapshot of the machine, in a folder of this host."""

import time

from vmexit.control.qmp import errors
from vmexit.control.qmp.commands import command
from vmexit.control.qmp.events import SnapshotProgress
from vmexit.control.qmp.session import Session
from vmexit.control.steering import resume
from vmexit.machine.events import RunState
from vmexit.machine.snapshot_file import require_new

_INTERVAL = 0.1  # seconds between two events, at least


@command("x-snapshot-save")
def snapshot_save(session: Session, *, path: str, pause: bool | None = None) -> None:
    vm = session.vm
    require_new(path)  # before it stands still for nothing
    ran = vm.state is RunState.RUNNING
    if pause:
        vm.pause()
    try:
        with vm.snapshot() as snapshot:
            snapshot.save(path, _Telling(session, path))
    except BaseException:
        if pause and ran:
            resume(vm)
        raise


class _Telling:
    """Sends events now and then, and ends what nobody waits for any more."""

    def __init__(self, session: Session, path: str) -> None:
        self._session = session
        self._path = path
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        if self._session.served.ending():
            raise errors.QmpError("the machine is about to end; ask another one")
        if self._session.gone():
            raise errors.QmpError("the client has gone; ask again")
        now = time.monotonic()
        if now - self._last >= _INTERVAL or done == total:
            self._last = now
            event = SnapshotProgress(self._path, done, total)
            self._session.served.relay.send(event, time.time())
