"""Programs that serve a device by a Unix socket, started and ended with the machine."""

import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress

from vmexit.backends.wait import reason
from vmexit.core.errors import HostError
from vmexit.core.memory import MEMFD_FLAGS, set_size

_PATIENCE = 10.0  # seconds for one to end in order
_MOST_SAID = 1 << 16

# It ends in order (SIGTERM) when our end of the pipe is closed, however we end: a disk's image is
# written out then. Its own input is empty.
# END stands for a descriptor that the socket does not have.
_SUPERVISOR = """\
exec END<&0
"$@" END<&- </dev/null & program=$!
{ read -r _ <&END; kill $program; } >/dev/null 2>&1 & reader=$!
wait $program
status=$?
kill $reader 2>/dev/null
exit $status
"""


def connect_to(path: str) -> socket.socket:
    """A connection to the Unix socket at `path`. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except (OSError, ValueError) as error:  # the latter for a NUL in it
        connection.close()
        raise OSError(getattr(error, "errno", 0), reason(error)) from error
    return connection


class Complaints:
    """What a program says on its standard error: the first of it, so that it never waits for us."""

    def __init__(self) -> None:
        """Raises OSError."""
        self.fd = os.memfd_create("vmexit-stderr", MEMFD_FLAGS)
        set_size(self.fd, _MOST_SAID)  # what comes behind is refused

    def lines(self) -> list[str]:
        """Those that are not empty."""
        said = os.pread(self.fd, _MOST_SAID, 0).rstrip(b"\0").decode(errors="replace")
        return [line.strip() for line in said.splitlines() if line.strip()]

    def close(self) -> None:
        os.close(self.fd)


class Program:
    """One of them, with a listening socket that it finds open."""

    def __init__(self, name: str, command: Callable[[int], Sequence[str]]) -> None:
        """`command` gives its words for the descriptor of the socket. Raises HostError."""
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: Complaints | None = None
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._complaints = Complaints()
            # Nobody else can come by: the folder is ours, and gone when we are connected.
            with tempfile.TemporaryDirectory(prefix="vmexit-") as folder:
                path = os.path.join(folder, "socket")  # noqa: PTH118 - bind() takes a text
                self._server.bind(path)
                self._server.listen(1)
                self._client: socket.socket | None = socket.socket(
                    socket.AF_UNIX, socket.SOCK_STREAM
                )
                self._client.connect(path)
            fd = self._server.fileno()
            supervisor = _SUPERVISOR.replace("END", "4" if fd == 3 else "3")
            self._process = subprocess.Popen(  # noqa: S603 - the words are ours
                ["/bin/sh", "-c", supervisor, "sh", *command(fd)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._complaints.fd,
                pass_fds=[fd],
                process_group=0,  # a Ctrl-C is for us
            )
        except OSError as error:
            self.close()
            why = error.strerror or error
            raise HostError(f"cannot start {name}: {why}; see TMPDIR") from error
        finally:
            self._server.close()

    def connect(self) -> socket.socket:
        """The one connection that there is. Raises ConnectionError when it was used up."""
        client, self._client = self._client, None
        if client is None:
            raise ConnectionError(f"{self.name} has ended")
        return client

    def complaint(self) -> str:
        """End it; the last line of what it has said, or its status."""
        process = self._process
        assert process is not None and self._complaints is not None
        self._end(process)
        lines = self._complaints.lines()
        if not lines:
            return f"it ended at once with status {process.returncode}"
        # Some repeat their arguments, which are ours: what comes behind is what matters.
        return lines[-1].rpartition("}: ")[2].strip()

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()

    def close(self) -> None:
        """End it in order."""
        if getattr(self, "_client", None) is not None:
            self.connect().close()
        if self._process is not None:
            self._end(self._process)
            self._process = None
        if self._complaints is not None:
            self._complaints.close()
            self._complaints = None
