"""Limits to how much of something there may be in a time."""

from vmexit.core.clock import Clock

_SECOND = 1_000_000_000


class TokenBucket:
    """`burst` at once, and `rate` a second in the long run. The caller guards it."""

    def __init__(self, clock: Clock, rate: int, burst: int) -> None:
        self._clock = clock
        self._rate = rate
        self._full = burst * _SECOND // rate  # nanoseconds to fill it
        # Kept as the moment at which the bucket would have been empty.
        self._empty_at = clock.now() - self._full

    @property
    def tokens(self) -> int:
        """How much there may be now."""
        passed = min(self._clock.now() - self._empty_at, self._full)
        return max(passed, 0) * self._rate // _SECOND

    def take(self, number: int) -> None:
        """So much there was; it may be more than there are tokens."""
        start = max(self._empty_at, self._clock.now() - self._full)
        self._empty_at = start + -(-number * _SECOND // self._rate)

    def ready_at(self, number: int) -> int:
        """When there will be so many tokens, on the clock."""
        return self._empty_at + -(-number * _SECOND // self._rate)


class Limit:
    """Operations and bytes a second, each as much as a second's at once. The caller guards it."""

    def __init__(self, clock: Clock, ops: int = 0, size: int = 0) -> None:
        """0 is no limit."""
        self._clock = clock
        self._waited_until = clock.now()
        self.waited_ns = 0
        """For so long the next operation had to wait, in all."""
        self._ops = TokenBucket(clock, ops, ops) if ops else None
        self._size = TokenBucket(clock, size, size) if size else None

    def ready_at(self) -> int | None:
        """When the next operation may be done, on the clock; None: now."""
        waits = [b.ready_at(1) for b in (self._ops, self._size) if b is not None and not b.tokens]
        return max(waits) if waits else None

    def waits_until(self, later: int) -> None:
        """An operation waits until then; each moment counts once, however many wait."""
        self.waited_ns += max(0, later - max(self._clock.now(), self._waited_until))
        self._waited_until = max(later, self._waited_until)

    def take(self, size: int) -> None:
        """One operation is done, with so many bytes."""
        if self._ops is not None:
            self._ops.take(1)
        if self._size is not None:
            self._size.take(size)
