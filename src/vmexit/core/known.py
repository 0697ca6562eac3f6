"""What was found out about the last few states: who makes clones of a snapshot makes many."""

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from vmexit.core.bus import State

_Found = TypeVar("_Found")


class Known(Generic[_Found]):
    """By the state itself, which nobody changes; any thread may use it."""

    def __init__(self, most: int) -> None:
        """So many are kept at most."""
        self._last: deque[tuple[State, Hashable, _Found]] = deque(maxlen=most)

    def find(self, state: State, kind: Hashable = None) -> _Found | None:
        """What was found out about `state` for such a `kind` of machine, if that is still known."""
        for known, what, found in self._last.copy():
            if known is state and what == kind:
                return found
        return None

    def add(self, state: State, found: _Found, kind: Hashable = None) -> None:
        """Keep `found`, and `state` with it, until a few others have come."""
        self._last.appendleft((state, kind, found))
