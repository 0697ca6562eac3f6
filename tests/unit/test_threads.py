"""Threads that do one thing after another, and go from one user to the next."""

import os
import signal
import sys
import threading
from contextvars import ContextVar

import pytest

from vmexit.core import threads
from vmexit.core.threads import Worker, Workers


def where(worker: Worker) -> threading.Thread:
    """The thread that does what `worker` is told to."""
    found = []
    worker.do(lambda: found.append(threading.current_thread()), "name of mine")
    worker.wait()
    return found[0]


@pytest.fixture
def workers():
    kept = Workers(keep=True)
    yield kept
    kept.close()
    assert not idle()


def idle() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vmexit-idle"]


def test_things_are_done_in_order_in_one_thread_without_signals():
    worker, seen = Worker(), []

    def look() -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        seen.append((threading.current_thread(), threading.current_thread().name, blocked))

    worker.do(look, "first")
    worker.wait()
    worker.do(look, "second")
    worker.end()
    assert [name for _, name, _ in seen] == ["first", "second"]
    assert {thread for thread, _, _ in seen} == {worker.thread}
    assert all({signal.SIGINT, signal.SIGTERM, signal.SIGRTMIN} <= mask for _, _, mask in seen)
    assert not worker.thread.is_alive()
    worker.end()


def test_a_handler_that_raises_just_as_signals_are_blocked_leaves_none_blocked(monkeypatch):
    set_mask = threads.set_mask

    def and_raise(how, signals):
        before = set_mask(how, signals)
        if signals is threads._BLOCKED:
            raise KeyboardInterrupt
        return before

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(threads, "set_mask", and_raise)
    with pytest.raises(KeyboardInterrupt):
        Worker().do(lambda: None, "never")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_one_that_never_began_can_be_waited_for_and_ended():
    worker = Worker()
    worker.wait()
    worker.end()
    assert worker.thread.ident is None


def test_what_it_has_done_it_does_not_hold():
    worker = Worker()
    gone = threading.Event()

    class Job:
        def __call__(self) -> None:
            return

        def __del__(self) -> None:
            gone.set()

    worker.do(Job(), "short")
    assert gone.wait(20)
    worker.end()


def test_one_that_was_lost_ends():
    worker = Worker()
    thread = where(worker)
    del worker
    thread.join(20)
    assert not thread.is_alive()


def test_one_that_was_given_back_is_had_again(workers):
    first = workers.take()
    thread = where(first)
    workers.give(first)
    assert idle() == [thread]
    again, other = workers.take(), workers.take()
    assert where(again) is thread
    assert where(other) is not thread
    for worker in (again, other):
        workers.give(worker)
    assert len(idle()) == 2


def test_one_that_nobody_keeps_ends():
    workers = Workers(keep=False)
    worker = workers.take()
    thread = where(worker)
    workers.give(worker)
    assert not thread.is_alive()


def test_one_that_comes_back_too_late_ends():
    workers = Workers(keep=True)
    worker = workers.take()
    thread = where(worker)
    workers.close()
    assert thread.is_alive()
    workers.give(worker)
    assert not thread.is_alive()


def test_one_that_never_began_is_not_kept(workers):
    workers.give(Worker())
    assert workers.take().thread.ident is None


def test_many_take_and_give_at_once(workers):
    taken: list[threading.Thread] = []
    twice = threading.Event()

    def user() -> None:
        for _ in range(200):
            worker = workers.take()
            if worker.thread in taken:
                twice.set()
            taken.append(worker.thread)
            where(worker)
            taken.remove(worker.thread)
            workers.give(worker)

    users = [threading.Thread(target=user) for _ in range(4)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join(60)
        assert not thread.is_alive()
    assert not twice.is_set()
    assert 1 <= len(idle()) <= 4


def test_only_so_many_wait(workers):
    many = [workers.take() for _ in range(threads._MOST_IDLE + 2)]
    for worker in many:
        where(worker)
    for worker in many:
        workers.give(worker)
    assert len(idle()) == threads._MOST_IDLE


def test_later_is_in_a_thread_that_waits(workers):
    worker = workers.take()
    thread = where(worker)
    workers.give(worker)
    found, go_on = [], threading.Event()

    def job() -> None:
        assert go_on.wait(20)
        found.append(threading.current_thread())

    workers.later(job)
    other = workers.take()  # the one that is busy is not to be had
    assert where(other) is not thread
    go_on.set()
    workers.give(other)
    workers.close()
    assert found == [thread]
    assert not thread.is_alive()


def test_later_without_a_thread_that_waits_is_now(workers):
    found = []
    workers.later(lambda: found.append(threading.current_thread()))
    assert found == [threading.current_thread()]


def test_who_did_something_later_is_had_again(workers):
    worker = workers.take()
    thread = where(worker)
    workers.give(worker)
    for _ in range(100):
        done = threading.Event()
        workers.later(done.set)
        worker.wait()
        assert done.is_set()
    assert workers._busy == []
    again = workers.take()
    assert where(again) is thread
    workers.give(again)


def test_closing_waits_for_what_is_done_later(workers):
    for worker in [workers.take() for _ in range(3)]:
        where(worker)
        workers.give(worker)
    go_on, done = threading.Event(), []
    for number in range(3):
        workers.later(lambda number=number: go_on.wait(20) and done.append(number))
    closing = threading.Thread(target=workers.close)
    closing.start()
    assert (closing.is_alive(), done) == (True, [])
    go_on.set()
    closing.join(20)
    assert sorted(done) == [0, 1, 2]
    assert not [t for t in threading.enumerate() if t.name.startswith("vmexit-")]


def test_no_more_than_so_much_is_done_later(workers):
    for worker in [workers.take() for _ in range(threads._MOST_BUSY + 1)]:
        where(worker)
        workers.give(worker)
    go_on, here = threading.Event(), []
    for _ in range(threads._MOST_BUSY):
        workers.later(lambda: go_on.wait(20))
    workers.later(lambda: here.append(threading.current_thread()))
    assert here == [threading.current_thread()]
    go_on.set()


def test_a_fork_does_later_now(workers):
    worker = workers.take()
    where(worker)
    workers.give(worker)
    child = os.fork()
    if not child:
        try:
            done = []
            workers.later(lambda: done.append(1))
            os._exit(0 if done else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def change_priority(thread: int) -> None:
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + 1)


def change_processors(thread: int) -> None:
    processors = os.sched_getaffinity(thread)
    if len(processors) < 2:
        pytest.skip("there is only one processor")
    os.sched_setaffinity(thread, {min(processors)})


def change_policy(thread: int) -> None:
    os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def change_real_time_priority(thread: int) -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # ours, which it has then
    except PermissionError:
        pytest.skip("this user may not run in real time")
    os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(2))


@pytest.fixture
def scheduling():
    """Has this thread as it was, whatever a test does to it."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    os.sched_setscheduler(0, policy, parameters)


@pytest.mark.usefixtures("scheduling")
@pytest.mark.parametrize(
    "change", [change_priority, change_processors, change_policy, change_real_time_priority]
)
def test_one_that_somebody_has_changed_is_not_had_again(workers, change):
    worker = workers.take()
    thread = where(worker)
    change(thread.native_id)
    workers.give(worker)
    again = workers.take()
    assert where(again) is not thread
    assert not thread.is_alive()
    workers.give(again)


def test_the_next_one_sees_no_context_of_the_last(workers):
    variable = ContextVar("variable", default="as it was")
    seen = []
    worker = workers.take()
    worker.do(lambda: variable.set("changed"), "first")
    worker.do(lambda: seen.append(variable.get()), "second")
    worker.wait()
    workers.give(worker)
    assert seen == ["as it was"]


def test_the_next_one_has_the_signals_blocked_that_the_last_one_opened(workers):
    seen = []
    worker = workers.take()
    worker.do(lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1}), "first")
    worker.do(lambda: seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "second")
    worker.wait()
    workers.give(worker)
    assert signal.SIGUSR1 in seen[0]


@pytest.mark.parametrize("what", ["trace", "profile"])
def test_the_next_one_is_traced_as_a_new_one_would_be(workers, what):
    """As coverage and debuggers ask for it; and not as the last one has set it."""
    get, set_here = getattr(sys, f"get{what}"), getattr(sys, f"set{what}")
    for_all, asked = getattr(threading, f"set{what}"), getattr(threading, f"get{what}")()

    def nothing(frame, event, argument):
        return None

    seen = []
    worker = workers.take()
    worker.do(lambda: set_here(nothing), "first")
    worker.do(lambda: seen.append(get()), "second")
    worker.wait()
    for_all(nothing)
    try:
        worker.do(lambda: seen.append(get()), "third")
        worker.wait()
    finally:
        for_all(asked)
    workers.give(worker)
    assert seen == [asked, nothing]


def test_a_fork_has_none_of_them_and_gets_its_own(workers):
    worker = workers.take()
    thread = where(worker)
    workers.give(worker)
    child = os.fork()
    if not child:
        try:
            own = workers.take()
            os._exit(0 if where(own) is not thread and not own.wait() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert thread.is_alive()
