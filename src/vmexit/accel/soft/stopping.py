"""Stops at the beginning of a block, asked for from any thread.

The engine tests for a stop at the beginning of each block by itself, for a word of its own that
`uc_emu_stop` sets. What it lacks is what this adds: a stop that is asked for while the engine
starts is not lost, since a stub at its entry looks at vmexit's words (see stubs.py), and neither is
one that comes while the engine's loop clears its word: the loop has no memory barrier between that
and its look at the request, so whoever asks makes one on all processors, and asks again.
"""

import ctypes
import threading

from vmexit.accel.soft.native import Library
from vmexit.accel.soft.stubs import StopWords
from vmexit.core.errors import HostError

# membarrier(2): commands, and the system call on x86-64.
_SYS_MEMBARRIER = 324
_PRIVATE_EXPEDITED, _REGISTER_PRIVATE_EXPEDITED = 1 << 3, 1 << 4


class Stopper:
    """Stops one engine. `ask` may be called from any thread; the rest by the one that runs it."""

    def __init__(self, library: Library, engine: int, words: memoryview) -> None:
        """`words` are the stubs'. Raises HostError where the kernel has no such barrier."""
        self._emu_stop = library.emu_stop
        self._engine = engine
        self._words = words
        self._runner = 0
        self._lock = threading.Lock()
        # Quick, and without letting go of the interpreter: see `Library.emu_stop`.
        self._syscall = ctypes.PyDLL(None).syscall
        if self._syscall(_SYS_MEMBARRIER, _REGISTER_PRIVATE_EXPEDITED, 0, 0):
            raise HostError(
                "this kernel refuses membarrier(2), which the software accelerator needs: "
                "run on Linux 4.14 or newer, without a seccomp filter for it"
            )

    def ask(self, word: int) -> None:
        """Set KICK or ATTENTION, and have the engine stop for it."""
        self._words[word] = 1
        if self._runner == threading.get_ident():  # in a callback
            if not self._words[StopWords.HOLD]:
                self._emu_stop(self._engine)
            return
        with self._lock:
            if self._engine and not self._words[StopWords.HOLD]:
                self._emu_stop(self._engine)
                self._syscall(_SYS_MEMBARRIER, _PRIVATE_EXPEDITED, 0, 0)
                self._emu_stop(self._engine)

    def running(self, runs: bool) -> None:
        """This thread is about to start the engine, or has."""
        self._runner = threading.get_ident() if runs else 0

    def hold(self, held: bool) -> None:
        """While `held`, what is asked for waits."""
        with self._lock:
            self._words[StopWords.HOLD] = held

    def close(self) -> None:
        """The engine is about to go."""
        with self._lock:
            self._engine = 0
