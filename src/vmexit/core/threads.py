"""Threads that vmexit starts leave the program's signals alone."""

import ctypes
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

# signal.pthread_sigmask() makes an enum member of each signal that was blocked: 80 µs, against 1.
_libc = ctypes.CDLL(None)
SignalSet = ctypes.c_uint64 * 16
"""What sigset_t is: a bit for each signal, the first for signal 1."""
_BLOCKED = SignalSet(sum(1 << s - 1 for s in signal.valid_signals() - _NEVER_BLOCKED))


def set_mask(how: int, signals: "ctypes.Array[ctypes.c_uint64]") -> "ctypes.Array[ctypes.c_uint64]":
    """As signal.pthread_sigmask(): which signals this thread blocks, and what it did before."""
    before = SignalSet()
    _libc.pthread_sigmask(how, signals, before)
    return before


# How long the main thread waits at a time, in seconds. A signal that comes just before it begins to
# wait does not wake it up, and the handler is called only once it does something again.
SIGNAL_SECONDS = 0.5


def start_without_signals(thread: threading.Thread) -> None:
    """Start `thread` so that it never gets a signal of the process, not even as it begins.

    Such a signal would interrupt nobody: the handler is called in the main thread, which waits.
    Raises RuntimeError, and what the handler of a signal raises that came meanwhile.
    """
    before = set_mask(signal.SIG_BLOCK, _BLOCKED)  # which the thread inherits
    try:
        thread.start()
    finally:
        set_mask(signal.SIG_SETMASK, before)
