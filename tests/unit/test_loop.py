import os
import threading
import time

import pytest

from vmexit.core.loop import EventLoop

pytestmark = pytest.mark.engine

MS = 1_000_000


@pytest.fixture
def loop():
    failures: list[BaseException] = []
    loop = EventLoop(failures.append)
    loop.failures = failures  # type: ignore[attr-defined]
    yield loop
    loop.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_held_before_the_first_use_and_after_close():
    before, threads = descriptors(), threading.active_count()
    loop = EventLoop(lambda error: None)
    loop.timer(lambda: None).set(None)
    assert (descriptors(), threading.active_count()) == (before, threads)
    loop.timer(lambda: None).set(loop.now())
    assert threading.active_count() == threads + 1
    loop.close()
    assert (descriptors(), threading.active_count()) == (before, threads)
    loop.close()


def test_timers_fire_in_the_order_of_their_deadlines_and_not_before(loop):
    fired: list[tuple[int, int]] = []
    done = threading.Event()
    start = loop.now()
    for delay in (30, 10, 20):
        deadline = start + delay * MS
        loop.timer(lambda d=deadline: fired.append((d, loop.now()))).set(deadline)
    loop.timer(done.set).set(start + 40 * MS)
    assert done.wait(60)
    assert [d for d, _ in fired] == [start + d * MS for d in (10, 20, 30)]
    assert all(at >= d for d, at in fired)


def test_a_timer_set_anew_fires_once_at_the_new_time(loop):
    fired: list[int] = []
    done = threading.Event()
    timer = loop.timer(lambda: fired.append(loop.now()))
    start = loop.now()
    timer.set(start + 5 * MS)
    timer.set(start + 60 * MS)
    timer.set(start + 20 * MS)
    loop.timer(done.set).set(start + 100 * MS)
    assert done.wait(60)
    assert len(fired) == 1
    assert fired[0] >= start + 20 * MS


def test_while_the_clock_stands_nothing_is_due(loop):
    due = threading.Event()
    timer = loop.timer(due.set)
    loop.stand()
    now = loop.now()
    timer.set(now + 1)
    assert not due.wait(0.05)
    assert loop.now() == now
    later = threading.Event()
    loop.timer(later.set).set(None)
    loop.go_on()
    assert due.wait(10)
    assert loop.now() > now + 50_000_000


def test_a_timer_set_before_is_due_once_the_clock_goes_on(loop):
    due = threading.Event()
    loop.timer(due.set).set(loop.now() + 20_000_000)
    loop.stand()
    assert not due.wait(0.1)
    loop.go_on()
    assert due.wait(10)


def test_a_timer_that_is_unset_does_not_fire(loop):
    fired: list[int] = []
    done = threading.Event()
    timer = loop.timer(lambda: fired.append(1))
    timer.set(loop.now() + 10 * MS)
    timer.set(None)
    loop.timer(done.set).set(loop.now() + 30 * MS)
    assert done.wait(60)
    assert fired == []


def test_a_timer_set_again_and_again_behind_another_takes_no_memory(loop):
    fired: list[int] = []
    done = threading.Event()
    first, other = loop.timer(lambda: fired.append(1)), loop.timer(done.set)
    start = loop.now()
    first.set(start + 400 * MS)
    for i in range(10_000):
        other.set(start + (1_000_000 - i % 7) * MS)
    assert len(loop._queue) < 100
    other.set(start + 500 * MS)
    assert done.wait(60)
    assert fired == [1]


def test_a_timer_may_set_itself_again(loop):
    done = threading.Event()
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == 5:
            done.set()
        else:
            timer.set(loop.now() + MS)

    timer = loop.timer(tick)
    timer.set(loop.now())
    assert done.wait(60)


def test_a_descriptor_is_watched_once(loop):
    reader, writer = os.pipe()
    seen: list[bytes] = []
    arrived = threading.Semaphore(0)

    def take() -> None:
        seen.append(os.read(reader, 100))
        arrived.release()

    loop.watch(reader, take)
    os.write(writer, b"one")
    assert arrived.acquire(timeout=60)
    os.write(writer, b"two")
    assert not arrived.acquire(timeout=0.05)
    loop.watch(reader, take)
    assert arrived.acquire(timeout=60)
    assert seen == [b"one", b"two"]
    loop.unwatch(reader)
    os.close(reader)
    os.close(writer)


def test_the_end_of_a_pipe_and_a_plain_file_count_as_readable(loop, tmp_path):
    reader, writer = os.pipe()
    closed, plain = threading.Event(), threading.Event()
    loop.watch(reader, closed.set)
    os.close(writer)
    assert closed.wait(60)
    with open(tmp_path / "file", "w+") as file:
        loop.watch(file.fileno(), plain.set)
        assert plain.wait(60)
        loop.unwatch(file.fileno())
    loop.unwatch(reader)
    os.close(reader)


def test_a_number_that_a_closed_descriptor_had_can_be_watched_again(loop):
    for _ in range(3):
        reader, writer = os.pipe()
        seen = threading.Event()
        loop.watch(reader, seen.set)
        os.write(writer, b"x")
        assert seen.wait(60)
        os.close(reader)  # without unwatch()
        os.close(writer)


def test_what_a_function_raises_is_reported_and_the_loop_goes_on(loop):
    done = threading.Event()

    def fail() -> None:
        raise ValueError("broken")

    loop.timer(fail).set(loop.now())
    loop.timer(done.set).set(loop.now() + MS)
    assert done.wait(60)
    assert [str(e) for e in loop.failures] == ["broken"]


def test_close_waits_for_a_function_under_way(loop):
    begun, over = threading.Event(), []

    def slow() -> None:
        begun.set()
        time.sleep(0.05)
        over.append(1)

    loop.timer(slow).set(loop.now())
    assert begun.wait(60)
    loop.close()
    assert over == [1]


def test_timers_set_by_many_threads_all_fire(loop):
    count = 0
    lock, done = threading.Lock(), threading.Event()

    def tick() -> None:
        nonlocal count
        with lock:
            count += 1
            if count == 8 * 100:
                done.set()

    def setter() -> None:
        for i in range(100):
            loop.timer(tick).set(loop.now() + (i % 7) * MS // 4)

    threads = [threading.Thread(target=setter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done.wait(60)


def test_a_descriptor_is_watched_for_room(loop):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        full = 0
        with pytest.raises(BlockingIOError):
            while True:
                full += os.write(writer, bytes(4096))
        room, seen = threading.Event(), []
        loop.watch_writable(writer, lambda: (seen.append(1), room.set()))
        passed = threading.Event()
        loop.timer(passed.set).set(loop.now() + 50 * MS)
        assert passed.wait(60) and not seen
        left = full
        while left:
            left -= len(os.read(reader, left))
        assert room.wait(60)
        passed.clear()
        loop.timer(passed.set).set(loop.now() + 50 * MS)
        assert passed.wait(60) and seen == [1]  # once
        loop.watch(writer, lambda: None)  # in place of the other
        loop.unwatch(writer)
    finally:
        os.close(reader)
        os.close(writer)
    assert not loop.failures
