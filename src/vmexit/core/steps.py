"""Requests to a driver, and copies, one after the other with as little as can be in between."""

import ctypes
from typing import TYPE_CHECKING

_Buffer = bytes | bytearray | memoryview

# An ioctl that does not let other threads of Python run: `fcntl.ioctl` does.
_ioctl = ctypes.PyDLL(None).ioctl


class PythonSteps:
    """What is done again and again in the same way, as a list that is made once.

    A step ends the list where it fails, so each is for something that goes well nearly always; who
    made it finds out what went wrong, and goes on from there. No other thread of Python runs
    meanwhile, and one that does comes back as late as it pleases: so each step has to be short.
    """

    def __init__(self) -> None:
        self._steps: list[
            tuple[
                tuple[memoryview, slice, _Buffer] | None,
                tuple[_Request, int] | None,
                tuple[_Buffer, _Buffer] | None,
            ]
        ] = []

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._steps)

    def clear(self) -> None:
        """There are none any more, and nothing is held for them."""
        self._steps.clear()

    def call(self, fd: int, request: int, data: bytearray, result: int = 0) -> None:
        """An ioctl(2) that reads and writes `data`, and fails unless it returns `result`.

        Raises ValueError if that is shorter than the request says that it is.
        """
        if len(data) < request >> 16 & 0x3FFF:  # include/uapi/asm-generic/ioctl.h, _IOC_SIZE
            raise ValueError(f"{len(data)} bytes are too few for request {request:#x}")
        self._steps.append((None, (_Request(fd, request, data), result), None))

    def copy(self, to: memoryview, here: slice, source: _Buffer) -> None:
        """`to[here] = source`, of bytes that lie one behind the other.

        Raises ValueError if one is longer than the other.
        """
        room, size = to[here].nbytes, memoryview(source).nbytes
        if size != room:
            raise ValueError(f"{size} bytes do not fill {room}")
        self._steps.append(((to, here, source), None, None))

    def compare(self, a: _Buffer, b: _Buffer) -> None:
        """It fails unless both are the same. Raises ValueError if one is longer than the other."""
        if len(a) != len(b):
            raise ValueError(f"{len(b)} bytes are never the same as {len(a)}")
        self._steps.append((None, None, (a, b)))

    def run(self) -> int:
        """Take them. Returns how many went well: all, or those before the first that failed."""
        for done, (copy, call, both) in enumerate(self._steps):
            if copy is not None:
                to, here, source = copy
                to[here] = source
            elif call is not None:
                request, result = call
                if _ioctl(request.fd, request.number, request.data) != result:
                    return done
            elif both is not None and both[0] != both[1]:
                return done
        return len(self._steps)


class _Request:
    """As ctypes takes it: to make that takes a third of the call."""

    def __init__(self, fd: int, number: int, data: bytearray) -> None:
        self._held = (ctypes.c_char * len(data)).from_buffer(data)
        self.fd, self.number = ctypes.c_int(fd), ctypes.c_ulong(number)
        self.data = ctypes.c_void_p(ctypes.addressof(self._held))


if TYPE_CHECKING:
    Steps = PythonSteps
else:
    try:
        from vmexit.core._steps import Steps
    except ImportError:  # installed where there was no compiler
        Steps = PythonSteps

COMPILED: bool = Steps is not PythonSteps
"""Whether `Steps` is a loop in C."""
