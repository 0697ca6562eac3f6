"""Files to write to, as users name them."""

import errno
import os
import re

from vmexit.backends.wait import reason
from vmexit.core.errors import ConfigError, shown

# Names of descriptors that are open already (proc(5)). To open one anew would begin at its start.
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


def open_output(path: str) -> tuple[int, bool]:
    """A descriptor to write to `path`, and whether what is there is to be replaced.

    What one of our own descriptors leads to already is written on, behind the rest. Raises
    ConfigError.
    """
    try:
        found = _DESCRIPTOR.fullmatch(path)
        own = int(found[1]) if found else _STANDARD.get(path)
        if own is not None:
            return os.dup(own), False
        # Not blocking: a FIFO without a reader would hold us up for ever.
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
        for standard in (1, 2):
            if _same(descriptor, standard):
                os.close(descriptor)
                return os.dup(standard), False
        return descriptor, True
    except (OSError, OverflowError, ValueError) as error:
        why = "nobody reads it" if getattr(error, "errno", 0) == errno.ENXIO else reason(error)
        raise ConfigError(f"cannot write {shown(path)}: {why}; use another path") from error


def _same(one: int, other: int) -> bool:
    try:
        return os.path.samestat(os.fstat(one), os.fstat(other))
    except OSError:  # it is closed
        return False
