import signal
import sys
import threading

import pytest

from vmexit.accel.kvm.kick import KICK_SIGNAL, KickTarget

pytestmark = pytest.mark.engine


@pytest.fixture
def hasty():
    """Threads take turns as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_kick_is_never_lost_to_one_that_is_being_taken(hasty):
    target = KickTarget(lambda mask: None)
    rounds = 3000
    lost: list[int] = []
    together = threading.Barrier(2, timeout=60)

    def vcpu() -> None:
        target.attach()
        try:
            for number in range(rounds):
                together.wait()
                target.take()
                together.wait()
                together.wait()  # kicked again, with nobody taking
                if signal.sigtimedwait({KICK_SIGNAL}, 0) is None:
                    lost.append(number)
                target.take()
        finally:
            target.detach()

    thread = threading.Thread(target=vcpu)
    thread.start()
    for _ in range(rounds):
        target.kick()
        together.wait()
        target.kick()
        together.wait()
        target.kick()
        together.wait()
    thread.join()
    assert lost == []
