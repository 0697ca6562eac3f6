"""`vmexit report`: from a trace to a page."""

import os

from vmexit.core.errors import ConfigError, shown
from vmexit.report.json_stream import TraceError
from vmexit.report.page import render
from vmexit.report.reader import REMEDY, TraceFile
from vmexit.report.totals import Totals


def write_report(trace_path: str, output: str) -> Totals:
    """Read the trace, of either format, and write the page; what was added up.

    Raises TraceError for what is no trace, ConfigError where the page cannot be written.
    """
    if _same(trace_path, output):
        raise ConfigError(f"--output {shown(output)} is the trace itself; use another file")
    trace, totals = TraceFile(trace_path), Totals()
    totals.add_all(trace.events())
    if not totals.exits and not totals.about.accelerator:
        raise TraceError(f"{shown(trace_path)} has no exits; {REMEDY}")
    page = render(trace_path, trace, totals)
    try:
        with open(output, "w", encoding="utf-8") as file:
            file.write(page)
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConfigError(f"cannot write {shown(output)}: {why}; use another path") from error
    return totals


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)  # noqa: PTH121
    except (OSError, ValueError):
        return False
