#!/usr/bin/env python3
"""Make docs/demo.svg and docs/top.svg: what a terminal shows when commands are run, now and here.

`docs/record.py top` makes the second one only.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vmexit.control.qmp_client import QmpClient
from vmexit.fetch.debian import fetch
from vmexit.top.rates import rates
from vmexit.top.sample import take
from vmexit.top.view import view

ROOT = Path(__file__).resolve().parents[1]
LINUX = "--kernel build/debian/vmlinuz --initrd build/debian/initrd.gz --append console=ttyS0"
TYPED = "uname -sr; grep 'model name' /proc/cpuinfo; poweroff -f\n"
SHOWN_FIRST, SHOWN_LAST = 3, 12  # lines of the boot


# While `vmexit top` looks, the guest reads its disk and prints dots.
BUSY = "while :; do dd if=/dev/vda of=/dev/null bs=64k count=64 2>/dev/null; echo -n .; done\n"
HEIGHT = 24


def main() -> None:
    if sys.argv[1:] != ["top"]:
        record_commands()
    record_top()


def record_top() -> None:
    """The table of `vmexit top` for a Linux that reads its disk."""
    found = fetch("cloud-amd64", ["virtio_blk", "virtio_balloon"], lambda what, done: None)
    with tempfile.TemporaryDirectory() as folder:
        disk, where = Path(folder, "disk"), Path(folder, "vm.sock")
        disk.write_bytes(os.urandom(64 << 20))
        command = [sys.executable, "-m", "vmexit", "run", "--kernel", found.kernel]
        command += ["--initrd", found.initrd, "--append", "console=ttyS0 quiet", "--smp", "2"]
        command += ["--drive", f"file={disk},bps=4M", "--balloon", "0"]
        command += ["--stats", "--qmp", f"unix:{where}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as process:
            assert process.stdin is not None and process.stdout is not None
            output = b""
            while b"/root # " not in output:
                output += os.read(process.stdout.fileno(), 1 << 16)
            output = b""
            process.stdin.write(BUSY.encode())
            process.stdin.flush()
            while output.count(b".") < 8:  # the first three are those that were typed
                output += os.read(process.stdout.fileno(), 1 << 16)
            with QmpClient(str(where)) as client:
                before = take(client)
                time.sleep(2)
                now = take(client)
            process.kill()
    console = Console(record=True, width=100, file=StringIO())
    console.print(view(rates(before, now), HEIGHT))
    path = str(ROOT / "docs" / "top.svg")
    console.save_svg(path, title="vmexit top vm.sock", unique_id="top")


def record_commands() -> None:
    """What the commands of the first minutes print."""
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
