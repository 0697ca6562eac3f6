"""What a program has put into the memory of a machine."""

from typing import NamedTuple


class Start(NamedTuple):
    """Where vCPU 0 begins, in which CPU mode, and the GPAs of what it runs."""

    entry: int
    mode: str
    image: range


class Loaded(NamedTuple):
    """What `Machine.load_bytes()` did, for a later reset: GPAs and bytes, and the start if any."""

    pieces: list[tuple[int, bytes]]
    start: Start | None
