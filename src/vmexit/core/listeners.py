"""Functions that want to be called, in the order in which they came."""

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Listeners(Generic[_T]):
    """Any thread may add one, take one away, or go through those that there are then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: tuple[_T, ...] = ()

    def add(self, listener: _T) -> Callable[[], None]:
        """From now on it is one of them; returns what ends that."""
        with self._lock:
            self._all += (listener,)

        def end() -> None:
            with self._lock:
                self._all = tuple(one for one in self._all if one is not listener)

        return end

    def __iter__(self) -> Iterator[_T]:
        return iter(self._all)

    def __bool__(self) -> bool:
        return bool(self._all)
