"""Jobs on clones of a snapshot, by any `concurrent.futures.Executor`; by default in processes.

>>> def job(vm, number):  # in a module: other processes import it
...     vm.memory.write_u32(0x5000, number)
...     return vm.run(timeout=5).reason
>>> for result in vmexit.pool.run("booted", job, range(1000)):
...     print(result.number, result.get())
"""

from vmexit.pool.jobs import JobError, JobTimeout, Result, WorkerError, run

__all__ = ["JobError", "JobTimeout", "Result", "WorkerError", "run"]
