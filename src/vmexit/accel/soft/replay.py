"""What an instruction has accessed already, for one that is executed again.

A run that is to end must not go on to the end of the translated block. So the access at which that
shows leaves the instruction where it began, and `SoftVcpu` executes it once more, alone. What it
had accessed is answered from here then, and reaches no device twice.
"""

from collections import deque
from typing import NamedTuple

from vmexit.accel.soft.stubs import LEAVE_BLOCK, StopWords

# More accesses than any one instruction makes (XSAVE: some hundred words of 8 bytes).
_KEPT = 1024


class Made(NamedTuple):
    """An access that was made, by which instruction in which execution of a block."""

    block: int
    rip: int
    kind: str  # in, out, read, write
    address: int
    size: int
    value: int


class Replay:
    """The last accesses of one vCPU."""

    def __init__(self, words: memoryview) -> None:
        """`words` are the stubs'."""
        self._words = words
        self._made: deque[Made] = deque(maxlen=_KEPT)
        self._again: deque[Made] = deque()
        self.repeating = False
        """Whether an instruction is executed again."""
        self.unfinished = False

    def answer(self, kind: str, address: int, size: int) -> int | None:
        """What this access gave before; None if it is a new one."""
        again = self._again
        if again and again[0][2:5] == (kind, address, size):
            return again.popleft().value
        again.clear()
        return None

    def made(self, rip: int, kind: str, address: int, size: int, value: int) -> None:
        """Note an access; if the run is to end, leave the instruction at `rip` that makes it."""
        self.note(rip, kind, address, size, value)
        if self._words[StopWords.KICK] and not self.repeating:
            self.leave(rip)

    def note(self, rip: int, kind: str, address: int, size: int, value: int) -> None:
        """Note an access; the run may go on."""
        self._made.append(Made(self._words[StopWords.BLOCKS], rip, kind, address, size, value))

    def leave(self, rip: int) -> None:
        """Leave the instruction at `rip`; `repeat()` and executing it finish it."""
        key = (self._words[StopWords.BLOCKS], rip)
        self._again = deque(made for made in self._made if made[:2] == key)
        self.unfinished = True
        self._words[StopWords.LEAVE] = LEAVE_BLOCK

    def repeat(self) -> None:
        """The instruction that was left is executed again from here on."""
        self.unfinished = False
        self.repeating = True

    def finished(self) -> None:
        """It is done."""
        self.repeating = False
        self._again.clear()
        self._made.clear()
