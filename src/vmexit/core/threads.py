"""Threads that vmexit starts leave the program's signals alone."""

import signal

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


def block_signals() -> None:
    """Have signals of the process go to its other threads: Python waits for them in those."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
