"""Token buckets."""

from fakes import ManualClock

from vmexit.core.rate import Limit, TokenBucket

SECOND = 1_000_000_000


def test_the_burst_is_there_at_once_and_then_what_the_rate_gives():
    clock = ManualClock()
    bucket = TokenBucket(clock, 100, 50)
    assert bucket.tokens == 50
    bucket.take(50)
    assert bucket.tokens == 0
    clock.sleep(SECOND // 10)
    assert bucket.tokens == 10
    clock.sleep(SECOND * 1000)
    assert bucket.tokens == 50  # never more


def test_it_tells_when_there_will_be_enough():
    clock = ManualClock()
    bucket = TokenBucket(clock, 1000, 16)
    bucket.take(16)
    when = bucket.ready_at(16)
    assert when - clock.now() == 16 * SECOND // 1000
    clock.sleep(when - clock.now() - 1)
    assert bucket.tokens == 15
    clock.sleep(1)
    assert bucket.tokens == 16


def test_more_than_there_is_may_be_taken_and_is_waited_for():
    clock = ManualClock()
    bucket = TokenBucket(clock, 10, 10)
    bucket.take(30)
    assert bucket.tokens == 0
    clock.sleep(2 * SECOND)
    assert bucket.tokens == 0
    clock.sleep(SECOND)
    assert bucket.tokens == 10


def test_any_rate_in_the_long_run():
    clock = ManualClock()
    bucket = TokenBucket(clock, 11_520, 16 << 10)
    taken = 0
    for _ in range(100_000):
        clock.sleep(1_000_003)
        tokens = min(bucket.tokens, 16)
        bucket.take(tokens)
        taken += tokens
    assert 0 <= taken - 11_520 * 100 <= 16 << 10


def test_a_limit_of_operations_and_of_bytes():
    clock = ManualClock()
    limit = Limit(clock, ops=10, size=1000)
    for _ in range(10):
        assert limit.ready_at() is None
        limit.take(1)
    assert limit.ready_at() == clock.now() + SECOND // 10
    clock.sleep(SECOND)
    limit.take(3000)  # the last operation may take more bytes than there are
    assert limit.ready_at() == clock.now() + 2 * SECOND + SECOND // 1000
    clock.sleep(2 * SECOND + SECOND // 1000)
    assert limit.ready_at() is None


def test_what_is_not_limited_is_always_ready():
    clock = ManualClock()
    assert Limit(clock).ready_at() is None
    limit = Limit(clock, size=100)
    for _ in range(1000):
        limit.take(0)
    assert limit.ready_at() is None
    limit.take(101)
    assert limit.ready_at() is not None
