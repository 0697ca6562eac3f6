"""What the kernel knows of the process that a machine is in."""

import os
import time
from pathlib import Path
from typing import NamedTuple


class ProcessCounters(NamedTuple):
    """CPU time in seconds, of all threads; bytes in memory; the start, in seconds since 1970.

    Guest memory counts as far as the guest has used it.
    """

    cpu_seconds: float
    resident: int
    started: float


def process_counters() -> ProcessCounters:
    """Those of this process, of now."""
    # Fields of proc(5), statm: size, resident, …, in pages.
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return ProcessCounters(time.process_time(), resident, _STARTED)


def _started() -> float:
    """The start by proc(5), stat, field 22: in ticks since the host's own."""
    # The second field is the program's name in brackets, which may have anything in it.
    fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


_STARTED = _started()  # once, or each adjustment of the clock would be another start
