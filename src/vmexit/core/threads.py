"""Threads that vmexit starts leave the program's signals alone."""

import signal
import threading

# What a thread does to itself must not be blocked: its faults, and writing to a closed pipe.
_NEVER_BLOCKED = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGABRT,
    signal.SIGPIPE,
}
_BLOCKED = signal.valid_signals() - _NEVER_BLOCKED  # here, because it takes 80 µs


# How long the main thread waits at a time, in seconds. A signal that comes just before it begins to
# wait does not wake it up, and the handler is called only once it does something again.
SIGNAL_SECONDS = 0.5


def start_without_signals(thread: threading.Thread) -> None:
    """Start `thread` so that it never gets a signal of the process, not even as it begins.

    Such a signal would interrupt nobody: the handler is called in the main thread, which waits.
    Raises RuntimeError, and what the handler of a signal raises that came meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)  # which the thread inherits
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
