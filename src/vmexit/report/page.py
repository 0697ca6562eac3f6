"""The page: what was added up, as data within HTML that a script of its own shows.

Nothing of a trace becomes HTML: it is JSON in an element that is no script, and the page's script
makes text of it. The page's policy lets nothing else run, and nothing be loaded.
"""

import base64
import hashlib
import json
from importlib.resources import files

from vmexit.core.chrome_trace import MemorySlot
from vmexit.report.names import usual_name
from vmexit.report.reader import TraceFile, size_of
from vmexit.report.totals import Place, Totals

_MOST_ROWS = 20
_MOST_CELLS = 256  # of memory, in a slot

Data = dict[str, object]


def render(path: str, trace: TraceFile, totals: Totals) -> str:
    """The HTML for what was read of `trace`, which is at `path`."""
    about = totals.about
    data: Data = {
        "file": path.rpartition("/")[2],
        "bytes": size_of(path),
        "format": trace.format,
        "cutOff": trace.cut_off,
        "skipped": trace.skipped,
        "version": about.version,
        "accelerator": about.accelerator,
        "exits": totals.exits,
        "timed": totals.timed,
        "seconds": _seconds(totals),
        "timeline": _timeline(totals),
        "reasons": _rows(totals.reasons),
        "devices": _rows(totals.devices),
        "ports": _addresses("port", totals.ports),
        "mmio": _addresses("mmio", totals.mmio),
        "elsewhere": totals.elsewhere.exits,
        "vcpus": _vcpus(totals),
        "memory": _memory(totals),
    }
    # No `<` is left that could end the element.
    text = json.dumps(data).replace("<", "\\u003c")
    style, script = _asset("page.css"), _asset("page.js")
    page = _asset("page.html")
    for mark, content in (
        ("@STYLE-HASH@", _hash(style)),
        ("@SCRIPT-HASH@", _hash(script)),
        ("@STYLE@", style),
        ("@SCRIPT@", script),
        ("@DATA@", text),  # the last: in it nothing is looked for any more
    ):
        page = page.replace(mark, content)
    return page


def _asset(name: str) -> str:
    return files("vmexit.report").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _seconds(totals: Totals) -> float:
    return (totals.last - totals.first) / 1e9 if totals.first is not None else 0.0


def _row(name: str, place: Place) -> Data:
    return {
        "name": name,
        "exits": place.exits,
        "reads": place.reads,
        "writes": place.writes,
        "hostMs": place.host_ns / 1e6,
    }


def _rows(places: dict[str, Place]) -> list[Data]:
    ordered = sorted(places.items(), key=lambda item: -item[1].exits)
    return [_row(name, place) for name, place in ordered[:_MOST_ROWS]]


def _addresses(kind: str, places: dict[int, Place]) -> list[Data]:
    """The hottest: by their time on the host, or their number where that is not known."""
    ordered = sorted(places.items(), key=lambda item: (-item[1].host_ns, -item[1].exits))
    return [
        {
            "address": f"{address:#x}",
            **_row(place.device or usual_name(kind, address), place),
        }
        for address, place in ordered[:_MOST_ROWS]
    ]


def _timeline(totals: Totals) -> Data:
    timeline = totals.timeline
    ordered = sorted(timeline.series.items(), key=lambda item: -sum(item[1]))
    used = min(totals.last // timeline.width + 1, timeline.BINS)
    return {
        "width": timeline.width / 1e9,
        "series": [{"name": name, "bins": bins[:used]} for name, bins in ordered],
    }


def _vcpus(totals: Totals) -> list[Data]:
    spent = totals.last - (totals.first or 0)
    return [
        {
            "vcpu": number,
            "exits": vcpu.exits,
            "guest": vcpu.guest_ns / 1e9,
            "host": vcpu.host_ns / 1e9,
            "elsewhere": max(spent - vcpu.guest_ns - vcpu.host_ns, 0) / 1e9,
        }
        for number, vcpu in sorted(totals.vcpus.items())
    ]


def _memory(totals: Totals) -> Data:
    return {
        "chunk": totals.chunk,
        "looks": totals.looks,
        "slots": [_slot(slot, totals) for slot in totals.slots],
    }


def _slot(slot: MemorySlot, totals: Totals) -> Data:
    """A slot, cut into cells of one or several chunks each with how often it was written."""
    cells: list[Data] = []
    cell = max(totals.chunk, 1)
    while slot.size > cell * _MOST_CELLS:
        cell *= 2
    if totals.chunk and not slot.readonly:
        found = [[0, 0] for _ in range(-(-slot.size // cell))]
        for gpa, heat in totals.heat.items():
            if slot.gpa <= gpa < slot.gpa + slot.size:
                at = found[(gpa - slot.gpa) // cell]
                at[0] = max(at[0], heat.times)
                at[1] += heat.pages
        cells = [
            {"gpa": f"{slot.gpa + n * cell:#x}", "times": times, "pages": pages}
            for n, (times, pages) in enumerate(found)
        ]
    return {
        "gpa": f"{slot.gpa:#x}",
        "gpaEnd": f"{slot.gpa + slot.size - 1:#x}",
        "hva": f"{slot.hva:#x}",
        "hvaEnd": f"{slot.hva + slot.size - 1:#x}",
        "bytes": slot.size,
        "cell": cell,
        "readonly": slot.readonly,
        "cells": cells,
    }
