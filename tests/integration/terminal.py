"""The command at a terminal, as a user sees it."""

import fcntl
import os
import select
import subprocess
import termios
import time

from command import SLOW, VMEXIT

SECONDS = 60 * SLOW


class Terminal:
    """A pseudo-terminal with the command at its other end, as a session of its own."""

    def __init__(
        self, *arguments: str, stdout: int | None = None, command: list[str] = VMEXIT
    ) -> None:
        """Standard output is the terminal, too, unless it is given."""
        self.master, slave = os.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave  # held open, so that its modes can be looked at afterwards
        self.output = b""
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )

    def type(self, data: bytes) -> None:
        while data:
            # What does not fit waits for the program to read: take its output meanwhile.
            _, writable, _ = select.select([], [self.master], [], 0.01)
            if writable:
                data = data[os.write(self.master, data[:512]) :]
            self.take()

    def take(self, seconds: float = 0) -> bool:
        ready, _, _ = select.select([self.master], [], [], seconds)
        if ready:
            try:
                self.output += os.read(self.master, 1 << 16)
            except OSError:  # the other end is closed
                return False
        return bool(ready)

    def expect(self, text: bytes) -> None:
        end = time.monotonic() + SECONDS
        while text not in self.output:
            assert time.monotonic() < end, f"no {text!r} in {self.output[-500:]!r}"
            self.take(0.1)

    def mode(self) -> list[int]:
        return termios.tcgetattr(self.slave)

    def wait_until_raw(self) -> None:
        end = time.monotonic() + SECONDS
        while self.mode()[3] & termios.ICANON:
            assert time.monotonic() < end, self.output[-500:]
            time.sleep(0.01)

    def wait(self) -> int:
        end = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < end, self.output[-500:]
            self.take(0.05)
        while self.take(0.01):
            pass
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
