"""Programs that serve a device by a Unix socket, started and ended with the machine."""

import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress

from vmexit.backends.wait import reason
from vmexit.core.errors import HostError

_PATIENCE = 10.0  # seconds for one to end in order

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


class Program:
    """One of them, with a listening socket that it finds open."""

    def __init__(self, name: str, command: Callable[[int], Sequence[str]]) -> None:
        """`command` gives its words for the descriptor of the socket. Raises HostError."""
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
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
                stderr=subprocess.PIPE,
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
        assert process is not None
        self._end(process)
        said = process.stderr.read() if process.stderr is not None else b""
        lines = said.decode(errors="replace").strip().splitlines()
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
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process = None
