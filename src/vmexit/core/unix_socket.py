"""Listening Unix sockets, as files that come and go."""

import os
import socket
import stat
from pathlib import Path


class SocketFile:
    """The file of a listening Unix socket, to which only its owner may connect."""

    def __init__(self, server: socket.socket, path: str) -> None:
        """Bind `server` to `path`, in place of a socket that nobody listens at any more.

        Raises OSError, and ValueError for what is no path.
        """
        if not path or "\0" in path:  # another name space, and what would be passed over
            raise ValueError("a path is not empty, and has no zero byte")
        os.fchmod(server.fileno(), 0o600)
        _remove_stale(path)
        server.bind(path)
        self._path = path
        self._process = os.getpid()
        self._inode = _inode(path)

    def remove(self) -> None:
        """Remove it, unless it is another one's by now; a fork leaves it to who made it."""
        if os.getpid() != self._process:
            return
        if self._inode is not None and _inode(self._path) == self._inode:
            Path(self._path).unlink(missing_ok=True)


def _inode(path: str) -> tuple[int, int] | None:
    """What is at `path` now; None if nothing is."""
    try:
        status = Path(path).lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _remove_stale(path: str) -> None:
    """Remove a socket whose owner was killed."""
    try:
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except ConnectionRefusedError:
        Path(path).unlink(missing_ok=True)
    except OSError:
        return  # not there, or in use: bind() tells
