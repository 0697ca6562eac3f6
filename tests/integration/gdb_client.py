"""gdb, scripted; and its protocol by hand, for what gdb would never send."""

import os
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from command import SLOW, VMEXIT

SECONDS = 100 * SLOW


def gdb(where: object, *commands: str, file: Path | None = None, seconds: float = SECONDS) -> str:
    """What a real gdb says to these commands, attached to `where`, until it ends."""
    if shutil.which("gdb") is None:
        pytest.skip("no gdb; apt-get install gdb")
    words = ["gdb", "-nx", "-q", "-batch"]
    for command in (
        "set pagination off", "set confirm off", "set width 0", "set tcp connect-timeout 60",
        f"target remote {where}", *commands,
    ):  # fmt: skip
        words += ["-ex", command]
    if file is not None:
        words.append(str(file))
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
    )
    return done.stdout + done.stderr


class Run:
    """`vmexit run …` with a gdb socket."""

    def __init__(self, socket_path: Path, *arguments: object) -> None:
        self.path = socket_path
        self.process = subprocess.Popen(
            [*VMEXIT, "run", "--timeout", str(SECONDS), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.said = ""
        while "gdb at" not in self.said:
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line

    def finish(self) -> tuple[int, str, str]:
        """Its status and output, once it ends."""
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, self.said + err

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()


class Wire:
    """The protocol, packet by packet."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(SECONDS)
        self.socket.connect(os.fspath(path))
        self._received = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(b"$%s#%02x" % (data, sum(data) & 0xFF))

    def receive(self) -> bytes:
        """The data of the next packet, acknowledged; empty at the end."""
        while True:
            start = self._received.find(b"$")
            end = self._received.find(b"#", start)
            if start >= 0 and 0 <= end <= len(self._received) - 3:
                packet, self._received = self._received[start + 1 : end], self._received[end + 3 :]
                with suppress(BrokenPipeError):
                    self.socket.sendall(b"+")
                return packet
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:  # closed, with what we have sent not read
                return b""
            if not data:
                return b""
            self._received += data

    def ask(self, data: bytes) -> bytes:
        self.send(data)
        return self.receive()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()
