"""Asking a run to end: from anywhere, also from within itself."""

import threading

from vmexit import Stop, StopReason
from vmexit.machine.runner import StopRequest


class Kicked:
    """Asks once more while it is kicked, as the handler of a signal may that comes just then."""

    index = 0

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.kicks = 0

    def kick(self) -> None:
        self.kicks += 1
        if self.kicks == 1:
            self.request(Stop(StopReason.TIMEOUT))


def test_the_first_request_counts_and_one_within_another_does_not_lock_up() -> None:
    request = StopRequest()
    vcpu = Kicked(request)
    request.listen([vcpu])  # type: ignore[list-item]
    assert request(Stop(StopReason.STOPPED)) is False  # nothing runs
    assert vcpu.kicks == 0
    request.begin()
    asker = threading.Thread(target=request, args=(Stop(StopReason.STOPPED),), daemon=True)
    asker.start()
    asker.join(60)
    assert not asker.is_alive()
    assert vcpu.kicks == 2
    assert request.stop == Stop(StopReason.STOPPED)
    assert request.pending()
    request.end()
    assert request(Stop(StopReason.STOPPED)) is False
