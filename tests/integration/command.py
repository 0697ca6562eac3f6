"""Running the command as a user does: a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GUESTS = ROOT / "guests"
# In the KVM lab all is ten times slower.
SLOW = 5 if os.environ.get("VMEXIT_IN_LAB") == "1" else 1
# There the longest tests do less, unless `make lab-full` asks for all of it, which takes hours.
FULL = os.environ.get("VMEXIT_FULL") == "1"
FEWER = 1 if FULL else SLOW**2
VMEXIT = [sys.executable, "-m", "vmexit"]


class Done(NamedTuple):
    """How the command ended."""

    status: int
    out: str
    err: str


def vmexit(
    *arguments: object,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Done:
    """Run `vmexit ARGUMENTS` to its end."""
    done = subprocess.run(
        [*prefix, *VMEXIT, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=100,
        env={**os.environ, **(env or {})},
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def assert_one_line(done: Done, status: int, *words: str) -> None:
    """An error is one line on standard error that names the thing and the remedy."""
    assert done.status == status, done
    lines = [line for line in done.err.splitlines() if not line.startswith("vmexit: accelerator ")]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("vmexit")
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert "Traceback" not in done.err
