"""Where protocols put the guest's memory: files, and descriptors that a client has sent."""

import os
import select
import stat

from vmexit.backends.wait import Ending, never
from vmexit.core.errors import HostError, VmexitError, shown

# A pipe that can be written to has room for so much (pipe(7)); of a file any piece is good.
_PIPE_PIECE, _FILE_PIECE = 4096, 1 << 20
# How long a reader may do nothing, and how often we look whether the machine ends, in seconds.
_PATIENCE, _SLICE = 10.0, 0.1


class Sink:
    """A descriptor to write to, which is closed in the end."""

    def __init__(self, descriptor: int, name: str, ending: Ending = never) -> None:
        """`ending()` tells that nobody is to be waited for any more."""
        self._descriptor = descriptor
        self._name = name
        self._ending = ending
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)

    @classmethod
    def to_file(cls, path: str, ending: Ending = never) -> "Sink":
        """A file, for its owner only: in a guest's memory there may be anything.

        Raises VmexitError.
        """
        # Not blocking: a FIFO without a reader would hold us up for ever.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            return cls(os.open(path, flags, 0o600), path, ending)
        except (OSError, ValueError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or error
            raise HostError(f"Could not open '{shown(path)}': {why}; use another path") from error

    def write(self, data: bytes | memoryview) -> None:
        """Write all of it. Raises HostError, and VmexitError if the machine ends meanwhile."""
        rest = memoryview(data)
        piece = _FILE_PIECE if self._is_file else _PIPE_PIECE
        while rest:
            self._wait()
            try:
                rest = rest[os.write(self._descriptor, rest[:piece]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise HostError(
                    f"cannot write {shown(self._name)}: {error.strerror}; use another path"
                ) from error

    def _wait(self) -> None:
        waited = 0.0
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while not self._ending():
            if self._is_file or poll.poll(_SLICE * 1000):
                return
            waited += _SLICE
            if waited > _PATIENCE:
                raise HostError(f"nobody reads {shown(self._name)}; use a file")
        raise VmexitError("the machine is about to end; ask another one")

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)
