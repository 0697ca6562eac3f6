"""Threads that take one work after another."""

import os
import signal
import threading
import time

from vmexit.core import workers
from vmexit.core.workers import IDLE_NAME, Work


def idle():
    return [worker.thread for worker in workers._idle]


def test_the_next_work_has_the_same_thread():
    seen = []
    for number in range(50):
        work = Work(
            lambda: seen.append((threading.current_thread(), threading.current_thread().name)),
            f"work{number}",
        )
        work.join()
        while work.thread not in idle():
            time.sleep(0.001)
        assert work.thread.name == IDLE_NAME
    assert {thread for thread, _ in seen} == {work.thread}
    assert [name for _, name in seen] == [f"work{number}" for number in range(50)]
    assert threading.current_thread() is not work.thread


def test_at_once_each_has_its_own_and_few_stay():
    go = threading.Event()
    works = [Work(go.wait, "waits") for _ in range(30)]
    threads = {work.thread for work in works}
    assert len(threads) == 30
    go.set()
    for work in works:
        work.join()
    for thread in threads - set(idle()):
        thread.join(10)
    alive = [thread for thread in threads if thread.is_alive()]
    assert 0 < len(alive) <= workers._MOST_IDLE


def test_after_some_time_without_work_it_ends(monkeypatch):
    monkeypatch.setattr(workers, "_IDLE_SECONDS", 0.01)
    work = Work(lambda: None, "short")
    work.thread.join(10)
    assert not work.thread.is_alive()
    assert work.thread not in idle()


def test_work_that_comes_as_it_is_about_to_end_is_done(monkeypatch):
    monkeypatch.setattr(workers, "_IDLE_SECONDS", 0.0001)
    done = []
    for number in range(500):
        work = Work(lambda number=number: done.append(number), "work")
        work.join()
        time.sleep(0.0001)
    assert done == list(range(500))


def test_it_gets_no_signals_of_the_process():
    blocked = []
    Work(lambda: blocked.extend(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "asks").join()
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGALRM} <= set(blocked)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_fork_has_none_of_them():
    work = Work(lambda: None, "before")
    work.join()
    while work.thread not in idle():
        time.sleep(0.001)
    child = os.fork()
    if child == 0:
        done = threading.Event()
        Work(done.set, "in the fork").join()
        os._exit(0 if done.is_set() else 1)
    assert os.waitpid(child, 0)[1] == 0
