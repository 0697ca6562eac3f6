#!/usr/bin/env python3
"""Make docs/demo.svg: what a terminal shows when these commands are run, now and here."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    "vmexit run guests/long-hello.bin --mode long --stats",
    "vmexit run guests/triple-fault.bin --mode protected",
]


def main() -> None:
    console = Console(record=True, width=100, file=StringIO())
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in COMMANDS:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        console.print(Text(done.stdout))
    console.save_svg(str(ROOT / "docs" / "demo.svg"), title="vmexit", unique_id="vmexit")


if __name__ == "__main__":
    main()
