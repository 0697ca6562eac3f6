"""A Linux guest of the command, with its console on pipes: typed to, and read from."""

import os
import re
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from command import SLOW, VMEXIT

SECONDS = 100 * SLOW
# What the guests of tests of devices run on: the lab is there for its KVM.
ACCEL = "kvm" if os.environ.get("VMEXIT_IN_LAB") == "1" else "soft"
PROMPT = b"/root # "
BANNER = b"vmexit guest: a busybox shell."


class Guest:
    """`vmexit run --kernel …`. What it prints is in `output`."""

    def __init__(
        self,
        kernel: Path,
        initrd: Path,
        append: str = "",
        *more: str,
        accel: str = "soft",
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix` are words before the command, as of `ip netns exec`."""
        command = [*prefix, *VMEXIT, "run", "--accel", accel, "--kernel", str(kernel)]
        command += ["--initrd", str(initrd), "--append", f"console=ttyS0 {append}".strip()]
        limit = [] if "--timeout" in more else ["--timeout", str(SECONDS)]
        self.output = b""
        self.process = subprocess.Popen(
            [*command, *limit, *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    def _read(self, seconds: float) -> bool:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(seconds, 0))
        data = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
        self.output += data
        return bool(data) or not ready

    def expect(self, text: bytes, seconds: float = SECONDS) -> str:
        """Wait for `text`; returns what came up to its end, and forgets it."""
        end = time.monotonic() + seconds
        while text not in self.output:
            left = end - time.monotonic()
            assert left > 0 and self._read(left), f"no {text!r} in {self.output[-1500:]!r}"
        before, _, self.output = self.output.partition(text)
        return (before + text).decode(errors="replace")

    def boot(self) -> str:
        """Wait for the shell; returns what the kernel has printed."""
        log = self.expect(BANNER)
        self.expect(PROMPT)
        return log

    def run(self, command: str, seconds: float = SECONDS) -> str:
        """What `command` prints in the shell."""
        # The echo of what is typed may be broken into lines, what the two `echo` print is not.
        self.type(f"echo =$((20+1))=; {command}; echo =$((40+2))=\n")
        text = self.expect(b"=42=", seconds)
        self.expect(PROMPT)
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r\n", "\n")
        return text.partition("=21=\n")[2].rpartition("=42=")[0].strip("\n")

    def status(self, seconds: float = SECONDS) -> int:
        """Wait for the end of the command; its exit status."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, self.output[-1500:]
            if not self._read(0.2):
                self.process.wait(10)
        return self.process.returncode

    def power_off(self, command: str = "poweroff -f") -> None:
        """Have the guest switch itself off, and the command end with status 0."""
        self.type(f"{command}\n")
        assert self.status() == 0
