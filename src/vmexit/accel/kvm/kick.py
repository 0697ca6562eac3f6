"""Ending KVM_RUN from another thread without a process-wide signal handler.

The thread that runs a vCPU keeps the kick signal blocked, and KVM_SET_SIGNAL_MASK (KVM API 4.21)
opens it only inside KVM_RUN. So the signal ends KVM_RUN with EINTR, no handler runs, and no other
thread of the program sees anything. `kvm_run.immediate_exit` covers the moment before KVM_RUN.
"""

import signal
import threading
from collections.abc import Callable

from vmexit.core.threads import SignalSet, set_mask

KICK_SIGNAL = signal.SIGRTMIN

_KICK_BIT = 1 << KICK_SIGNAL - 1
_KICK_SET = SignalSet(_KICK_BIT)


class KickTarget:
    """The thread that runs one vCPU, as seen by those who want to interrupt it."""

    def __init__(self, set_signal_mask: Callable[[int], None]) -> None:
        """`set_signal_mask` gives KVM the signals that KVM_RUN keeps blocked, a bit for each."""
        self._set_signal_mask = set_signal_mask
        self._lock = threading.RLock()  # a signal's handler may kick while we are in here
        self._before = 0
        self._mask: int | None = None
        self.sent = False
        """Whether a signal may be pending that somebody has sent here."""
        self.thread: int | None = None

    def attach(self) -> None:
        """The calling thread becomes the one to interrupt."""
        self._before = set_mask(signal.SIG_BLOCK, _KICK_SET)[0]
        mask = self._before & ~_KICK_BIT
        if mask != self._mask:
            self._set_signal_mask(mask)
            self._mask = mask
        with self._lock:
            self.thread = threading.get_ident()

    def detach(self) -> None:
        """No thread is to be interrupted any more; to be called by the one that attached."""
        with self._lock:
            self.thread = None
        self.take()
        if not self._before & _KICK_BIT:
            set_mask(signal.SIG_UNBLOCK, _KICK_SET)

    def take(self) -> None:
        """Take the kick signals that are pending in this thread, or KVM_RUN ends at once again."""
        with self._lock:  # or one is taken that was sent after `sent` was cleared, and no more come
            while signal.sigtimedwait({KICK_SIGNAL}, 0) is not None:
                continue
            self.sent = False

    def kick(self) -> None:
        """Send the signal, unless it is the attached thread itself that kicks."""
        with self._lock:
            # One that is pending is enough; of real-time signals each one would be queued.
            if self.thread not in (None, threading.get_ident()) and not self.sent:
                self.sent = True
                # Blocked in that thread from attach() to detach(), so that its default action,
                # to end the process, cannot happen.
                signal.pthread_kill(self.thread, KICK_SIGNAL)
