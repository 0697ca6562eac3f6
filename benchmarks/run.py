#!/usr/bin/env python3
"""Measure vmexit against C and QEMU, side by side on this machine; README.md says what and how."""

import argparse
import faulthandler
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import boot
import create
import exits
import loop
import machines
import observing
import snapshot
import start
import stop
import virtio
from measure import Row, attempt, table

GROUPS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "exits": exits.rows,
    "loop": loop.rows,
    "observing": observing.rows,
    "start": start.rows,
    "boot": boot.rows,
    "create": create.rows,
    "stop": stop.rows,
    "machines": machines.rows,
    "snapshot": snapshot.rows,
    "virtio": virtio.rows,
}

LONGEST = 1800  # seconds


def main() -> int:
    """Measure the groups that the arguments name, or all, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="few rounds: only to see it work")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in GROUPS]
    if unknown:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(GROUPS)}")
    faulthandler.dump_traceback_later(LONGEST, exit=True)  # a guest that hangs must not hang us
    rows: list[Row] = []
    for name in arguments.names or GROUPS:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += attempt(name, GROUPS[name](arguments.quick))
    faulthandler.cancel_dump_traceback_later()
    print(f"\n{_host()}{'; QUICK: too few rounds to mean anything' * arguments.quick}\n")
    print(table(rows))
    if arguments.json is not None:
        content = {"host": _host(), "quick": arguments.quick, "rows": [r.as_json() for r in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _host() -> str:
    module = next((m for m in ("kvm_intel", "kvm_amd", "kvm_pvm") if _loaded(m)), "none")
    optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    built = f"built with{'' if optimized else 'out'} optimizations (PGO)"
    if sys.base_prefix == "/usr":  # whoever packaged it has optimized it, and left no trace of that
        built = "of the distribution"
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    busy = "; BUSY: others used the processors, too, so take it all with care"
    return (
        f"Python {platform.python_version()} {built}, Linux {platform.release()}, {cpus} CPUs, "
        f"load {load:.1f}, KVM module {module}{busy * (load > cpus)}"
    )


def _loaded(module: str) -> bool:
    return Path("/sys/module", module).exists()


if __name__ == "__main__":
    sys.exit(main())
