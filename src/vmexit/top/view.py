"""The tables that people look at."""

import time
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmexit.core.errors import shown
from vmexit.top.rates import FlowRate, Rates

_LEAST_ROWS = 3
_STYLES = {"running": "green", "crashed": "bold red", "paused": "yellow"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def view(rates: Rates, height: int | None = None) -> Group:
    """All of it, with as many rows of exits as `height` lines have room for; None: all."""
    parts = [*_head(rates), *_vcpus(rates), *_devices(rates)]
    used = 0
    for part in parts:  # a table has a line of titles
        used += part.row_count + 1 if isinstance(part, Table) else 1
    rows = None if height is None else max(_LEAST_ROWS, height - used - 2)
    return Group(*parts, *_exits(rates, rows))


def _head(rates: Rates) -> Iterator[RenderableType]:
    now = rates.now
    days, seconds = divmod(max(0.0, time.time() - now.started), 86400)
    up = f"{days:.0f} d " * (days > 0) + time.strftime("%H:%M:%S", time.gmtime(seconds))
    yield Text.assemble(
        ("vmexit", "bold"),
        f"  {shown(now.machine)} on {shown(now.accelerator)}  ",
        (shown(now.state), _STYLES.get(now.state, "bold")),
        f"  up {up}  CPU {rates.cpu:.0%}  process {_bytes(now.process_resident)}",
        no_wrap=True,
    )
    balloon = "" if now.balloon is None else f", balloon {_bytes(now.balloon)}"
    yield Text(
        f"memory {_bytes(now.memory)}, resident {_bytes(now.resident)}{balloon}; "
        f"unclaimed accesses {now.unclaimed}",
        no_wrap=True,
    )
    yield Text()


def _table(*columns: str) -> Table:
    """Titles that begin with `>` are of columns with numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.lstrip(">"), justify="right" if column[0] == ">" else "left", no_wrap=True
        )
    return table


def _vcpus(rates: Rates) -> Iterator[RenderableType]:
    if rates.vcpus is None:
        return
    table = _table("vcpu", "state", ">guest", ">host", ">elsewhere")
    for one in rates.vcpus:
        parts = [f"{part:.1%}" for part in (one.guest, one.host, one.elsewhere)]
        table.add_row(str(one.vcpu), Text(one.doing, _STYLES.get(one.doing, "")), *parts)
    yield table
    yield Text()


def _devices(rates: Rates) -> Iterator[RenderableType]:
    flows = [flow for flow in rates.flows if rates.now.flows[flow.name].operations]
    if not flows:
        return
    table = _table("device", "type", "operation", ">ops/s", ">bytes/s", ">limited", ">bytes")
    for flow in flows:
        table.add_row(*_device(flow), _bytes(rates.now.flows[flow.name].size))
    yield table
    yield Text()


def _device(flow: FlowRate) -> list[Text | str]:
    return [
        *map(_name, flow.name),
        f"{flow.operations:.0f}",
        _bytes(flow.size),
        "" if not flow.waited else f"{flow.waited:.0%}",
    ]


def _exits(rates: Rates, rows: int | None) -> Iterator[RenderableType]:
    if rates.exits is None:
        yield Text("exits and vCPUs are there if the machine runs with --stats, too", "dim")
        return
    table = _table("exit", "address/size", "device", ">exits/s", ">share", ">µs each", ">total")
    for one in rates.exits[:rows]:
        each = "" if one.nanoseconds is None else f"{one.nanoseconds / 1e3:.1f}"
        table.add_row(
            *map(_name, one.place), f"{one.rate:.0f}", f"{one.share:.1%}", each, str(one.total)
        )
    total = sum(one.total for one in rates.exits)
    table.add_row("total", "", "", f"{rates.exit_rate:.0f}", "", "", str(total), style="bold")
    yield table


def _name(text: str) -> Text:
    """What another program says, which is no markup, and moves no cursor."""
    return Text(shown(text) if text else "")


def _bytes(size: float) -> str:
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    digits = 0 if not unit or size >= 100 else 1
    return f"{size:.{digits}f} {_UNITS[unit]}"
