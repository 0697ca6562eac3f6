"""What an instruction that is executed again finds answered, and what reaches a device anew."""

import pytest

from vmexit.accel.soft.replay import Replay
from vmexit.accel.soft.stubs import StopWords

RIP = 0x1000


def replayed(made: str, again: str) -> str:
    """Make the accesses of `made`, leave at the last one, and make those of `again`.

    An access is a letter for its kind and a digit for its address. The result has for each of
    `again` the number of the access that answered it, or `-` for a new one.
    """
    kinds = {"r": "read", "w": "write", "i": "in", "o": "out"}
    words = memoryview(bytearray(256)).cast("I")
    replay = Replay(words)
    steps = made.split()
    for number, (kind, address) in enumerate(steps):
        words[StopWords.KICK] = number == len(steps) - 1
        replay.made(RIP, kinds[kind], int(address), 4, number)
    assert replay.unfinished
    replay.repeat()
    answers = []
    for kind, address in again.split():
        answer = replay.answer(kinds[kind], int(address), 4)
        answers.append("-" if answer is None else str(answer))
    return " ".join(answers)


@pytest.mark.parametrize(
    ("made", "again", "answers"),
    [
        # One access each time: a loop that polls, or writes.
        ("r1 r1 r1", "r1", "2"),
        ("w1 w1 w1", "w1", "2"),
        # Read, then write: left at either.
        ("r1 w1 r1 w1", "r1 w1", "2 3"),
        ("r1 w1 r1", "r1 w1", "2 -"),
        # From one device to another.
        ("r1 w5 r1 w5", "r1 w5", "2 3"),
        ("r1 w5 r1", "r1 w5", "2 -"),
        # Many words, as FXSAVE and FXRSTOR access them.
        ("w1 w2 w3 w1 w2 w3", "w1 w2 w3", "3 4 5"),
        ("w1 w2 w3 w1 w2", "w1 w2 w3", "3 4 -"),
        ("r1 r2 r3 r1 r2", "r1 r2 r3", "3 4 -"),
        # REP goes on where it was: only the last turn is made again.
        ("w1 w2 w3", "w3", "2"),
        ("r1 w5 r2 w6", "r2 w6 r3", "2 3 -"),
        ("r1 w5 r2", "r2 w6", "2 -"),
        # OUTS from MMIO, and INS to it, for which a zero is written first.
        ("r1 o9 r1 o9", "r1 o9", "2 3"),
        ("r1 o9 r1", "r1 o9", "2 -"),
        ("w1 i9 w1 w1 i9 w1", "w1 i9 w1", "3 4 5"),
        ("w1 i9 w1 w1 i9", "w1 i9 w1", "3 4 -"),
        ("w1 i9 w1 w1", "w1 i9 w1", "3 - -"),
        ("w1 i9 w1 w2 i9 w2", "w2 i9 w2 w3", "3 4 5 -"),
        # Executed again, it takes another way: nothing of before holds.
        ("r1 w1", "r2 w1", "- -"),
    ],
)
def test_what_was_made_is_answered_and_the_rest_is_new(made, again, answers):
    assert replayed(made, again) == answers


def test_another_instruction_makes_all_its_accesses_anew():
    words = memoryview(bytearray(256)).cast("I")
    replay = Replay(words)
    replay.made(RIP, "read", 1, 4, 7)
    replay.leave(RIP + 3)
    replay.repeat()
    assert replay.answer("read", 1, 4) is None


def test_after_the_instruction_nothing_is_answered():
    words = memoryview(bytearray(256)).cast("I")
    replay = Replay(words)
    replay.made(RIP, "read", 1, 4, 7)
    replay.leave(RIP)
    replay.repeat()
    replay.repeated()
    assert replay.answer("read", 1, 4) is None
