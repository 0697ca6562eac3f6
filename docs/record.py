#!/usr/bin/env python3
"""Make docs/demo.svg: what a terminal shows when these commands are run, now and here."""

import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
LINUX = "--kernel build/debian/vmlinuz --initrd build/debian/initrd.gz --append console=ttyS0"
TYPED = "uname -sr; grep 'model name' /proc/cpuinfo; poweroff -f\n"
SHOWN_FIRST, SHOWN_LAST = 3, 12  # lines of the boot


def main() -> None:
    console = Console(record=True, width=100, file=StringIO())
    for command, typed in (
        ("vmexit fetch debian --output build/debian", ""),
        (f"vmexit run {LINUX}", TYPED),
        ("vmexit run guests/triple-fault.bin --mode protected", ""),
    ):
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        lines = run(command, typed)
        if typed:
            lines = [*lines[:SHOWN_FIRST], "...", *lines[-SHOWN_LAST:]]
        console.print(Text("\n".join(lines)))
    console.save_svg(str(ROOT / "docs" / "demo.svg"), title="vmexit", unique_id="vmexit")


def run(command: str, typed: str) -> list[str]:
    """What the command prints, on both outputs, without terminal control."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "PATH": path}, input=typed.encode(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", done.stdout.decode(errors="replace"))
    return text.replace("\r", "").rstrip("\n").split("\n")


if __name__ == "__main__":
    main()
