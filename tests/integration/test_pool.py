"""`vmexit.pool`: jobs on clones, in processes and threads; what fails is a result, too."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pool_jobs as jobs
import pytest
from command import ROOT

import vmexit.pool
from vmexit import ConfigError, HostError, Machine
from vmexit.pool import JobError, JobTimeout, WorkerError, run

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def snapshot():
    with Machine("1M", "soft") as vm:
        vm.load_bytes(jobs.CODE, at=0x1000)
        with vm.snapshot() as snapshot:
            yield snapshot


@pytest.fixture(scope="module")
def saved(snapshot, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool") / "saved"
    snapshot.save(folder)
    return folder


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as executor:
        yield executor


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        threading.Event().wait(0.05)


def test_a_thousand_jobs_in_their_order_and_each_process_loads_once(saved):
    results = list(run(saved, jobs.where, range(1000), workers=2))
    assert [result.number for result in results] == list(range(1000))
    assert [result.get()[0] for result in results] == list(range(1, 1001))
    processes = {result.get()[1] for result in results}
    assert len(processes) == 2 and os.getpid() not in processes
    assert {result.get()[2] for result in results} == {1}
    assert {result.attempts for result in results} == {1}
    assert all(result.error is None and result.seconds > 0 for result in results)
    assert not any(is_alive(pid) for pid in processes)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("accel", [pytest.param("kvm", marks=pytest.mark.kvm), "soft"])
def test_threads_of_ones_own_need_no_module(accel):
    with Machine("1M", accel) as vm, ThreadPoolExecutor(2) as executor:
        vm.load_bytes(jobs.CODE, at=0x1000)
        with vm.snapshot() as snapshot:
            double = lambda vm, n: 2 * jobs.add_one(vm, n)  # noqa: E731
            values = [r.get() for r in run(snapshot, double, range(20), executor=executor)]
        assert values == [2 * n + 2 for n in range(20)]
        assert executor.submit(int, "5").result() == 5  # it is still open


def test_what_is_done_first_waits_for_its_turn(saved, threads):
    results = list(run(saved, jobs.add_one_slowly_at_first, range(30), executor=threads))
    assert [result.get() for result in results] == list(range(1, 31))


def test_a_worker_that_dies_is_replaced_and_its_job_done_again(saved, tmp_path):
    inputs = [None, tmp_path / "a", None, None, tmp_path / "b", None]
    results = list(run(saved, jobs.die_at_first, inputs, workers=2, retries=1))
    assert [result.get() for result in results] == [2] * 6
    assert [result.attempts for result in results] == [1, 2, 1, 1, 2, 1]


def test_without_retries_it_is_an_error_of_that_job_alone(saved, tmp_path):
    inputs = [None, tmp_path / "a", None]
    first, second, third = run(saved, jobs.die_at_first, inputs, workers=2)
    assert first.get() == third.get() == 2
    assert isinstance(second.error, WorkerError)
    assert str(second.error).startswith("job 1: its worker has failed:")
    assert second.error.kind == "concurrent.futures.process.BrokenProcessPool"
    with pytest.raises(WorkerError):
        second.get()


def test_a_guest_that_hangs_is_stopped(saved, threads):
    for executor in (None, threads):
        inputs = [1, jobs.HANG, 2]
        results = run(saved, jobs.add_one, inputs, executor=executor, timeout=5, retries=1)
        first, second, third = results
        assert (first.get(), third.get()) == (2, 3)
        assert isinstance(second.error, JobTimeout)
        assert str(second.error) == "job 1 took longer than 5 s; allow more, or see why"
        assert second.attempts == 1 and second.seconds >= 5


def test_a_job_that_runs_its_guest_again_is_stopped_again(saved, threads):
    (result,) = run(saved, jobs.run_again_and_again, [7], executor=threads, timeout=0.5)
    assert isinstance(result.error, JobTimeout)


def test_a_process_that_hangs_in_python_is_ended(saved, monkeypatch):
    monkeypatch.setattr("vmexit.pool.jobs._GRACE", 0.5)
    inputs = [jobs.HANG, 1, 2]
    first, *others = run(saved, jobs.hang_in_python, inputs, workers=1, timeout=3, retries=1)
    assert isinstance(first.error, JobTimeout) and first.attempts == 1
    assert [result.get() for result in others] == [2, 3]


def test_exceptions_are_data(saved):
    inputs = ["fine", "big", "unpicklable", "exit", "result"]
    fine, *failed = run(saved, jobs.fail, inputs, workers=1, retries=1)
    assert fine.get() == "fine"
    errors = [result.error for result in failed]
    assert all(isinstance(error, JobError) for error in errors)
    assert [error.kind for error in errors] == [
        "ValueError", "pool_jobs.Unpicklable", "SystemExit", "TypeError",
    ]  # fmt: skip
    big, unpicklable, _, result = map(str, errors)
    assert big.startswith("job 1 raised ValueError: xxx") and len(big) < 30_000
    assert "[9980000 characters left out]" in big
    assert unpicklable == "job 2 raised pool_jobs.Unpicklable: cannot be sent"
    assert 'raise Unpicklable("cannot", "be sent")' in errors[1].traceback
    assert "what the job returned cannot be sent between processes: cannot pickle" in result
    assert {result.attempts for result in failed} == {1}
    again = pickle.loads(pickle.dumps(errors[1]))
    assert (str(again), again.kind) == (unpicklable, errors[1].kind)
    assert again.traceback == errors[1].traceback


def test_other_executors_of_processes(saved):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        values = [r.get() for r in run(saved, jobs.where, range(20), executor=executor)]
        assert [value[0] for value in values] == list(range(1, 21))
        assert {value[2] for value in values} == {1}
        fine, failed = run(saved, jobs.fail, ["fine", "result"], executor=executor)
        assert fine.get() == "fine"
        assert "cannot be sent between processes: cannot pickle" in str(failed.error)
        sent, not_sent = run(saved, jobs.add_one, [1, threading.Lock()], executor=executor)
        assert sent.get() == 2 and isinstance(not_sent.error, WorkerError)


class Remembering(Executor):
    """As Dask's: calls with the same arguments are one call."""

    def __init__(self, executor):
        self._executor = executor
        self._known = {}

    def submit(self, function, /, *args, **options):
        key = pickle.dumps((function, args))
        if key not in self._known:
            self._known[key] = self._executor.submit(function, *args, **options)
        return self._known[key]


def test_an_executor_that_remembers_calls(saved, tmp_path, threads):
    executor = Remembering(threads)
    for name in ("a", "b"):
        inputs = [tmp_path / name] * 2
        results = list(
            run(saved, jobs.crash_at_first, inputs, executor=executor, workers=1, retries=1)
        )
        assert [(result.get(), result.attempts) for result in results] == [(2, 2), (2, 1)]


def test_errors_of_vmexit_are_worth_another_attempt(saved, tmp_path, threads):
    for name, executor in (("a", None), ("b", threads)):
        options = {"executor": executor, "workers": 1}
        (result,) = run(saved, jobs.crash_at_first, [tmp_path / name], retries=1, **options)
        assert (result.get(), result.attempts) == (2, 2)
        (result,) = run(saved, jobs.crash_at_first, [tmp_path / f"{name}2"], **options)
        assert str(result.error) == ("job 0 raised vmexit.core.errors.GuestCrash: it was the guest")


def test_what_cannot_be_sent_is_named(saved):
    with pytest.raises(
        ConfigError, match=r"the job <function .*lambda.* cannot be sent .*; use a "
    ):
        run(saved, lambda vm, n: n, [1])
    first, second = run(saved, jobs.add_one, [threading.Lock(), 1], workers=1)
    assert isinstance(first.error, WorkerError)
    assert str(first.error).startswith(
        "job 0: its input cannot be sent to another process: cannot pickle '_thread.lock'"
    )
    assert second.get() == 2


def test_inputs_are_taken_as_they_are_needed_and_leaving_early_ends_it(saved):
    taken = itertools.count()
    results = run(saved, jobs.where, taken, workers=2)
    for result in results:
        if result.number == 50:
            break
    pid = result.get()[1]
    assert is_alive(pid)
    results.close()
    assert next(taken) <= 51 + 16 * 2 + 1
    assert not is_alive(pid)


def test_no_more_inputs_are_taken_while_the_first_result_is_waited_for(saved, threads):
    given = []

    def inputs():
        for number in range(100):
            assert number < 16 * 2 or given
            yield number

    def job(vm, number):
        if number == 0:
            threading.Event().wait(1)  # the others would be done long ago
        return number

    for result in run(saved, job, inputs(), executor=threads, workers=2):
        given.append(result.get())
    assert given == list(range(100))


def test_leaving_early_ends_jobs_that_hang(saved, tmp_path):
    results = run(saved, jobs.tell_pid_and_hang, itertools.repeat(tmp_path), workers=2)
    results.close()  # before it has begun there is nothing to end
    assert next(results, None) is None and list(tmp_path.iterdir()) == []

    def one_by_one():
        yield 1
        yield jobs.HANG

    results = run(saved, jobs.add_one, one_by_one(), workers=2)
    assert next(results).get() == 2
    results.close()  # without a timeout the second one would never end


def test_a_snapshot_is_in_a_temporary_folder_meanwhile(snapshot, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    results = run(snapshot, jobs.add_one, range(3), workers=1)
    assert list(tmp_path.iterdir()) == []
    assert next(results).get() == 1
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("vmexit-pool-")
    assert [result.get() for result in results] == [2, 3]
    assert list(tmp_path.iterdir()) == []


def test_an_executor_that_broke_takes_no_more(saved, tmp_path):
    inputs = [None, tmp_path / "a", None, None]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        results = run(saved, jobs.die_at_first, inputs, executor=executor, workers=1)
        assert next(results).get() == 2
        assert isinstance(next(results).error, WorkerError)
        with pytest.raises(HostError, match=r"the executor takes no jobs any more: .*; use a new"):
            next(results)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"retries": -1}, "-1 retries cannot be; use 0 or more"),
        ({"timeout": 0}, "a timeout of 0 s cannot be; use more than 0, or None"),
        ({"workers": 0}, "0 workers cannot do anything; use 1 or more"),
    ],
)
def test_arguments_that_cannot_be(saved, options, said):
    with pytest.raises(ConfigError, match=said):
        run(saved, jobs.add_one, [1], **options)


def test_a_folder_that_is_no_snapshot(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a snapshot: No such file"):
        next(run(tmp_path / "none", jobs.add_one, [1]))
    (tmp_path / "state.json").write_text("[]\n")
    with pytest.raises(ConfigError, match="is no snapshot; give a folder that was saved"):
        next(run(tmp_path, jobs.add_one, [1]))


def test_a_folder_that_has_changed_meanwhile(snapshot, tmp_path):
    """Whoever has loaded it goes on with that; nobody takes another one for it."""
    snapshot.save(tmp_path / "here")
    with Machine("2M", "soft") as vm:
        vm.load_bytes(jobs.CODE, at=0x1000)
        with vm.snapshot() as other:
            results = run(tmp_path / "here", jobs.add_one, [1, 2, 3], workers=1)
            first = next(results)
            os.rename(tmp_path / "here", tmp_path / "elsewhere")
            other.save(tmp_path / "here")
            assert [first.get(), *(result.get() for result in results)] == [2, 3, 4]

            def inputs():
                os.rename(tmp_path / "here", tmp_path / "there")
                snapshot.save(tmp_path / "here")
                yield 1

            (result,) = run(tmp_path / "here", jobs.add_one, inputs(), workers=1)
            assert "here is another snapshot than the jobs are for; do not" in str(result.error)


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import pool_jobs, vmexit.pool
run = vmexit.pool.run
def main():
    for result in run({saved!r}, pool_jobs.tell_pid_and_hang, [{pids!r}] * 9, workers=2):
        print(result)
if {guard}:
    main()
"""


def script(saved, tmp_path, guard: str) -> subprocess.Popen:
    (tmp_path / "pids").mkdir()
    path = tmp_path / "script.py"
    path.write_text(
        SCRIPT.format(here=str(HERE), saved=str(saved), pids=str(tmp_path / "pids"), guard=guard)
    )
    return subprocess.Popen(
        [sys.executable, path], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_program(saved, tmp_path, number):
    """By Ctrl-C, which all of a terminal's processes get, or because it is killed."""
    with script(saved, tmp_path, "__name__ == '__main__'") as program:
        try:
            wait_until(lambda: len(list((tmp_path / "pids").iterdir())) == 2, "no job has begun")
            pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
            if number == signal.SIGINT:
                os.killpg(program.pid, number)
            else:
                program.kill()
            text = program.communicate(timeout=60)[1]
        finally:
            program.kill()
    wait_until(lambda: not any(map(is_alive, pids)), "a worker is left over")
    if number == signal.SIGINT:
        assert text.count("Traceback") == 1 and text.rstrip().endswith("KeyboardInterrupt"), text
    assert program.returncode == -number


def test_a_script_without_a_guard_is_told_so(saved, tmp_path):
    with script(saved, tmp_path, "True") as program:
        text = program.communicate(timeout=100)[1]
    assert program.returncode == 1
    assert 'begin what it does with `if __name__ == "__main__":`' in text.splitlines()[-1]


def test_it_is_loaded_only_if_asked_for():
    command = "import sys, vmexit; vmexit.Machine; assert 'concurrent.futures' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)
    assert vmexit.pool.run is run


def test_the_program_in_the_documentation(tmp_path):
    text = (ROOT / "docs" / "pool.md").read_text()
    program = text.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "count.py").write_text(program)
    done = subprocess.run(
        [sys.executable, tmp_path / "count.py"], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines()[-1] == "98 1584", done.stderr
