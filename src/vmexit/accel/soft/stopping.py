"""Stops at the beginning of a block, asked for from any thread.

The engine tests for a stop at the beginning of each block by itself, for a word of its own that
`cpu_exit` sets. Its loop begins anew then, and a stub at the loop's entry looks at vmexit's words
and calls `uc_emu_stop` (see stubs.py). That ends the run, but may not come from elsewhere: until it
ends, the engine would call no hooks any more, and a port that the guest reads would give 0.

The stub also sees a stop that was asked for while the engine started, which the engine forgets. And
none is lost while the loop clears the engine's word: it has no memory barrier between that and its
look at the request, so whoever asks makes one on all processors, and asks again.
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

    def __init__(self, library: Library, cpu: int, words: memoryview) -> None:
        """`cpu` is the engine's CPUState, `words` are the stubs'.

        Raises HostError where the kernel has no such barrier.
        """
        self._cpu_exit = library.cpu_exit
        self._cpu = cpu
        self._words = words
        self._runner = 0
        self._lock = threading.RLock()  # the handler of a signal may ask while we are in here
        # Quick, and without letting go of the interpreter: see `Library.cpu_exit`.
        self._syscall = ctypes.PyDLL(None).syscall
        if self._syscall(_SYS_MEMBARRIER, _REGISTER_PRIVATE_EXPEDITED, 0, 0):
            raise HostError(
                "this kernel refuses membarrier(2), which the software accelerator needs: "
                "run on Linux 4.14 or newer, without a seccomp filter for it"
            )

    def ask(self, word: int) -> None:
        """Set KICK or ATTENTION, and have the engine stop for it."""
        self._words[word] = 1
        if self.in_callback:
            if not self._words[StopWords.HOLD]:
                self._cpu_exit(self._cpu)
            return
        with self._lock:
            if self._cpu and not self._words[StopWords.HOLD]:
                self._cpu_exit(self._cpu)
                self._syscall(_SYS_MEMBARRIER, _PRIVATE_EXPEDITED, 0, 0)
                self._cpu_exit(self._cpu)

    @property
    def in_callback(self) -> bool:
        """Whether this thread runs the engine: we are called from within it."""
        return self._runner == threading.get_ident()

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
            self._cpu = 0
