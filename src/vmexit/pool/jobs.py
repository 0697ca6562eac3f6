"""Giving out jobs, a bounded number at once, and taking results in the order of the inputs."""

import os
import pickle
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import ExitStack
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar, cast

from vmexit.core.errors import ConfigError, HostError, VmexitError
from vmexit.pool.processes import NoWorker, Processes
from vmexit.pool.worker import (
    Outcome,
    Saved,
    Terms,
    failure_of,
    forget,
    unpack,
    work,
    work_packed,
)

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine
    from vmexit.machine.snapshot import Snapshot

T = TypeVar("T")
R = TypeVar("R")
Given = TypeVar("Given", contravariant=True)

_GRACE = 10.0  # seconds that a job has for noticing that its machine was stopped
# So many results per job under way may wait for a slow one before them.
_AHEAD = 16


class JobError(VmexitError):
    """A job has failed: it raised something. `kind` is the class of that, `traceback` a text."""

    def __init__(self, message: str, kind: str = "", traceback: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.traceback = traceback

    def __reduce__(self) -> "tuple[type[JobError], tuple[str, str, str]]":
        return type(self), (str(self), self.kind, self.traceback)


class JobTimeout(JobError):
    """It took longer than it may."""


class WorkerError(JobError):
    """Its worker died, or what it needs or returns could not be sent."""


class Result(NamedTuple, Generic[R]):
    """How the job for input `number`, from 0 on, ended: `value`, or else `error`."""

    number: int
    value: R | None
    error: JobError | None
    attempts: int
    seconds: float
    """How long the last attempt took."""

    def get(self) -> R:
        """The value; raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return cast("R", self.value)


def run(
    snapshot: "Snapshot | str | os.PathLike[str]",
    job: "Callable[[Machine, T], R]",
    inputs: Iterable[T],
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    retries: int = 0,
    timeout: float | None = None,
) -> "Generator[Result[R], None, None]":
    """Call `job(vm, input)` for each of `inputs`, with a clone of `snapshot` each; their results.

    They come in the order of the inputs, of which only some are taken ahead. A job that fails is a
    result, too. `snapshot` is a folder that all workers can read, or a `Snapshot`, for which there
    is a temporary folder on this host meanwhile.

    Without `executor` there are `workers` processes (default: one a processor), which import `job`.
    An executor of the caller stays open; `workers` is how many jobs it has at once then (default:
    twice the processors).

    A job is done again, up to `retries` times, if it raised a VmexitError or its worker died. After
    `timeout` seconds its machine is stopped, and the job has failed, whatever it returns; a process
    of ours in which it does not return then is ended.

    To leave early, `close()` what this returns, as the end of a `for` loop does: jobs that have not
    begun are cancelled, and processes of ours end.

    Raises ConfigError for arguments that cannot be, HostError if no worker can be had any more.
    """
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ConfigError(f"{retries!r} retries cannot be; use 0 or more")
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"a timeout of {timeout} s cannot be; use more than 0, or None")
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} workers cannot do anything; use 1 or more")
    processors = len(os.sched_getaffinity(0))
    packed = Processes.pack(job) if executor is None else b""
    count = workers or (processors if executor is None else 2 * processors)
    return _results(snapshot, job, packed, iter(inputs), executor, count, retries, timeout)


def _results(
    snapshot: "Snapshot | str | os.PathLike[str]",
    job: "Callable[[Machine, T], R]",
    packed: bytes,
    inputs: Iterator[T],
    executor: Executor | None,
    count: int,
    retries: int,
    timeout: float | None,
) -> "Generator[Result[R], None, None]":
    """All that has to be undone begins here, with the first result that is asked for."""
    with ExitStack() as stack:
        saved = Saved.of(_folder(snapshot, stack))
        if executor is None:
            terms = Terms(saved, timeout, _GRACE)
            processes = Processes(count)
            stack.callback(processes.close)
            crew: _Crew[T, R] = _Own(processes, terms, packed)
        else:
            stack.callback(forget, saved)
            crew = _Foreign(executor, Terms(saved, timeout), job)
        yield from _Work(crew, inputs, count, retries, timeout).results()


def _folder(snapshot: "Snapshot | str | os.PathLike[str]", stack: ExitStack) -> str:
    """Where it is saved; until `stack` is closed, if that is for us to say."""
    if isinstance(snapshot, str | os.PathLike):
        return os.path.abspath(snapshot)  # noqa: PTH100 - a worker may be in another folder
    made = tempfile.mkdtemp(prefix="vmexit-pool-")
    stack.callback(shutil.rmtree, made, ignore_errors=True)
    folder = os.path.join(made, "snapshot")  # noqa: PTH118
    snapshot.save(folder)
    return folder


class _NotSent(Exception):
    """The input cannot be pickled; its cause says why."""


class _Crew(Protocol[Given, R]):
    """Who does the jobs."""

    def submit(self, value: Given) -> "Future[object]": ...

    def outcome(self, future: "Future[object]") -> Outcome[R]:
        """Of a future that is done; raises what went wrong around the job."""
        ...


class _Own(Generic[T, R]):
    def __init__(self, processes: Processes, terms: Terms, job: bytes) -> None:
        self._processes = processes
        self._terms = terms
        self._job = job

    def submit(self, value: T) -> "Future[object]":
        try:
            packed = pickle.dumps(value)
        except Exception as error:
            raise _NotSent from error
        return cast("Future[object]", self._processes.submit(self._terms, self._job, packed))

    def outcome(self, future: "Future[object]") -> Outcome[R]:
        mine = cast("Future[bytes]", future)
        self._processes.release(mine)
        return cast("Outcome[R]", unpack(mine.result()))


class _Foreign(Generic[T, R]):
    def __init__(self, executor: Executor, terms: Terms, job: "Callable[[Machine, T], R]") -> None:
        self._executor = executor
        self._terms = terms
        self._job = job
        # Threads give objects as they are; others may be other processes.
        self._threads = isinstance(executor, ThreadPoolExecutor)
        # Dask's executor takes a call with the same arguments for the same one, and remembers what
        # it has returned: so no two of ours have.
        self._run = os.urandom(8).hex()
        self._calls = 0

    def submit(self, value: T) -> "Future[object]":
        try:
            if self._threads:
                return self._executor.submit(work, self._terms, self._job, value)
            self._calls += 1
            call = f"{self._run}-{self._calls}"
            return self._executor.submit(work_packed, self._terms, self._job, value, call)
        except RuntimeError as error:  # BrokenExecutor is one
            raise HostError(
                f"the executor takes no jobs any more: {error}; use a new one"
            ) from error

    def outcome(self, future: "Future[object]") -> Outcome[R]:
        result = future.result()
        return cast("Outcome[R]", unpack(result) if isinstance(result, bytes) else result)


class _Job(NamedTuple, Generic[T]):
    number: int
    value: T
    attempts: int
    """With the one under way."""
    began: float


class _Work(Generic[T, R]):
    """Jobs under way, and results that wait for their turn."""

    def __init__(
        self,
        crew: _Crew[T, R],
        inputs: Iterator[T],
        count: int,
        retries: int,
        timeout: float | None,
    ) -> None:
        self._crew = crew
        self._inputs = enumerate(inputs)
        self._count = count
        self._retries = retries
        self._timeout = timeout
        self._again: deque[_Job[T]] = deque()
        self._flying: dict[Future[object], _Job[T]] = {}
        self._results: dict[int, Result[R]] = {}
        self._taken = 0  # inputs
        self._given = 0  # results
        self._refused: HostError | None = None  # why no worker can be had any more

    def results(self) -> "Generator[Result[R], None, None]":
        try:
            while self._fill() or self._given in self._results:
                while (result := self._results.pop(self._given, None)) is not None:
                    self._given += 1
                    yield result
                    self._fill()
                if self._flying:
                    done, _ = wait(self._flying, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._take(future)
            if self._refused is not None:  # what was done by then has been given
                raise self._refused
        finally:
            for future in self._flying:
                future.cancel()

    def _fill(self) -> bool:
        """Give out what there is to do, as far as it may be; whether any job is under way."""
        while len(self._flying) < self._count and self._refused is None:
            if self._again:
                job = self._again.popleft()
            elif self._taken - self._given < _AHEAD * self._count:
                try:
                    number, value = next(self._inputs)
                except StopIteration:
                    break
                self._taken += 1
                job = _Job(number, value, 0, 0.0)
            else:
                break
            self._submit(job._replace(attempts=job.attempts + 1, began=time.monotonic()))
        return bool(self._flying)

    def _submit(self, job: _Job[T]) -> None:
        try:
            future = self._crew.submit(job.value)
        except _NotSent as error:
            why = f"its input cannot be sent to another process: {error.__cause__}; use plain data"
            self._end(job, 0.0, error=_worker_error(job, why, error.__cause__ or error))
            return
        except HostError as error:
            self._refused = error
            return
        self._flying[future] = job

    def _take(self, future: "Future[object]") -> None:
        job = self._flying.pop(future)
        try:
            outcome = self._crew.outcome(future)
        except NoWorker as error:
            self._refused = error
            return
        except (Exception, CancelledError) as error:  # whatever an executor has for that
            self._lost(job, error)
            return
        failure = outcome.failure
        if outcome.expired:
            self._end(job, outcome.seconds, error=self._late(job))
        elif failure is None:
            self._end(job, outcome.seconds, value=outcome.value)
        elif failure.again and self._may_again(job):
            self._again.append(job)
        else:
            text = f"job {job.number} raised {failure.kind}: {failure.message}"
            raised = JobError(text, failure.kind, failure.traceback)
            self._end(job, outcome.seconds, error=raised)

    def _lost(self, job: _Job[T], error: BaseException) -> None:
        """There is no outcome: the worker died, or was ended by its watchdog."""
        seconds = time.monotonic() - job.began
        if self._timeout is not None and seconds >= self._timeout + _GRACE:
            self._end(job, seconds, error=self._late(job))
        elif self._may_again(job):
            self._again.append(job)
        else:
            why = f"its worker has failed: {error or type(error).__name__}; see what it printed"
            self._end(job, seconds, error=_worker_error(job, why, error))

    def _may_again(self, job: _Job[T]) -> bool:
        return job.attempts <= self._retries

    def _late(self, job: _Job[T]) -> JobTimeout:
        return JobTimeout(
            f"job {job.number} took longer than {self._timeout:g} s; allow more, or see why",
            "TimeoutError",
        )

    def _end(
        self, job: _Job[T], seconds: float, *, value: R | None = None, error: JobError | None = None
    ) -> None:
        self._results[job.number] = Result(job.number, value, error, job.attempts, seconds)


def _worker_error(job: _Job[T], why: str, error: BaseException) -> WorkerError:
    failure = failure_of(error)
    return WorkerError(f"job {job.number}: {why}", failure.kind, failure.traceback)
