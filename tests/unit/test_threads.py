"""Threads that do one thing after another, and go from one user to the next."""

import os
import signal
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


def change_priority(thread: int) -> None:
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + 1)


def change_processors(thread: int) -> None:
    processors = os.sched_getaffinity(thread)
    if len(processors) < 2:
        pytest.skip("there is only one processor")
    os.sched_setaffinity(thread, {min(processors)})


def change_policy(thread: int) -> None:
    os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


@pytest.mark.parametrize("change", [change_priority, change_processors, change_policy])
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
