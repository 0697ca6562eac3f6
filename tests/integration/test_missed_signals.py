"""Signals whose handler is due while the main thread waits already, and was not woken up."""

import signal
import threading

import pytest

from vmexit import Machine, StopReason
from vmexit.core.threads import start_without_signals

SPIN = b"\xeb\xfe"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("paused", [False, True])
def test_a_handler_is_called_while_a_machine_runs_or_is_held(accel, paused):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(SPIN, at=0x1000)
        over = threading.Event()

        def elsewhere() -> None:
            # Signals to this thread interrupt nothing in the main one, which calls the handler.
            while not over.wait(0.05):
                signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

        before = signal.signal(signal.SIGUSR1, lambda number, frame: vm.stop())
        thread = threading.Thread(target=elsewhere, daemon=True)
        if paused:
            vm.pause()
        thread.start()
        try:
            assert vm.run().reason is StopReason.STOPPED
        finally:
            over.set()
            thread.join()
            signal.signal(signal.SIGUSR1, before)


def test_a_thread_never_has_signals():
    masks = []

    def main() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    thread = threading.Thread(target=main)
    start_without_signals(thread)
    thread.join()
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} <= masks[0]
    assert signal.SIGSEGV not in masks[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    with pytest.raises(RuntimeError):
        start_without_signals(thread)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
