"""What an instruction has accessed already, for one that is executed again.

A run that is to end must not go on to the end of the translated block. So the access at which that
shows leaves the instruction where it began, and `Processor` executes it once more, alone. What it
had accessed is answered from here then, and reaches no device twice.
"""

from collections import deque
from typing import NamedTuple

from vmexit.accel.soft.stubs import LEAVE_BLOCK, StopWords

# More accesses than any one instruction makes (XSAVE: some hundred words of 8 bytes).
_KEPT = 1024


class Made(NamedTuple):
    """An access that was made."""

    kind: str  # in, out, read, write
    address: int
    size: int
    value: int


class Replay:
    """The last accesses of one vCPU."""

    def __init__(self, words: memoryview) -> None:
        """`words` are the stubs'."""
        self._words = words
        # By the instruction at `_rip`, in this execution of it and in those right before.
        self._made: deque[Made] = deque(maxlen=_KEPT)
        self._rip = -1
        self._again: list[Made] = []
        self._begun = False
        self._repeats = 0  # accesses since the instruction is executed again
        self.repeating = False
        """Whether an instruction is executed again."""
        self.unfinished = False

    def answer(self, kind: str, address: int, size: int) -> int | None:
        """What this access gave before; None if it is a new one."""
        again, wanted = self._again, (kind, address, size)
        if not self._begun:
            self._begun = True
            del again[: next((i for i, made in enumerate(again) if made[:3] == wanted), None)]
        if again and again[0][:3] == wanted:
            return again.pop(0).value
        again.clear()
        return None

    def made(self, rip: int, kind: str, address: int, size: int, value: int) -> None:
        """Note an access; if the run is to end, leave the instruction at `rip` that makes it.

        One that goes on and on while it is repeated is left unfinished: LOCK on a register that
        changes is a loop until two reads agree.
        """
        if self._words[StopWords.DELIVERING]:
            return  # an exception's or interrupt's: to leave it would begin it anew
        self.note(rip, kind, address, size, value)
        if self.repeating:
            self._repeats += 1
            if self._repeats > _KEPT:
                self._words[StopWords.LEAVE] = LEAVE_BLOCK
        elif self._words[StopWords.KICK]:
            self.leave(rip)

    def note(self, rip: int, kind: str, address: int, size: int, value: int) -> None:
        """Note an access; the run may go on."""
        if rip != self._rip:
            self._rip = rip
            self._made.clear()
        self._made.append(Made(kind, address, size, value))

    def leave(self, rip: int) -> None:
        """Leave the instruction at `rip`; `repeat()` and executing it finish it."""
        self._again = _last_execution(list(self._made)) if rip == self._rip else []
        self.unfinished = True
        self._words[StopWords.LEAVE] = LEAVE_BLOCK

    def repeat(self) -> None:
        """The instruction that was left is executed again from here on."""
        self.unfinished = False
        self.repeating = True
        self._begun = False
        self._repeats = 0

    def repeated(self) -> None:
        """It is done; no access to come was made before."""
        self._again.clear()

    def finished(self) -> None:
        """Instructions run on as ever."""
        self.repeating = False
        self._again.clear()
        self._made.clear()


def _last_execution(made: list[Made]) -> list[Made]:
    """The end of `made` that one execution of the instruction can have made, or a little more.

    An instruction makes no access twice (but for CMPS of a place with itself), and reads none
    behind a write. INS to MMIO is an exception: the engine writes a zero there before it reads the
    port. Where REP goes on in memory, accesses of the turns before are among these; that the
    execution begins with the first one made again tells them apart.
    """
    begin, seen = len(made), set[tuple[str, int, int]]()
    following = ""
    while begin:
        before = made[begin - 1]
        of_ins = following == "in" and before.kind == "write"
        behind_write = following == "read" and before.kind in ("write", "out")
        if not of_ins and (behind_write or before[:3] in seen):
            break
        seen.add(before[:3])
        following = before.kind
        begin -= 1
    return made[begin:]
