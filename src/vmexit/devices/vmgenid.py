"""The generation of a virtual machine: a number that is another one in each copy of it.

Microsoft's "Virtual Machine Generation ID" has it in memory that ACPI tells of; here it is read
like registers. A guest that finds it changed knows that its random numbers are no secret any more.
"""

import secrets
import threading

from vmexit.core.bus import State
from vmexit.core.irq import EdgeLine
from vmexit.core.saved import Saved

SIZE = 16


class VmGenId:
    """16 bytes to be read. Any vCPU, and who renews it, may enter: one lock."""

    widths = (1, 2, 4, 8)

    def __init__(self, irq: EdgeLine) -> None:
        self._irq = irq
        self._lock = threading.Lock()
        self._id = secrets.token_bytes(SIZE)

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            return int.from_bytes(self._id[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing can be written."""

    def renew(self) -> None:
        """Another number from now on; the guest is told."""
        with self._lock:
            self._id = secrets.token_bytes(SIZE)
        self._irq.pulse()

    def reset(self) -> None:
        """A machine that begins anew is none that anybody has a copy of."""
        with self._lock:
            self._id = secrets.token_bytes(SIZE)

    def state(self) -> State:
        with self._lock:
            return {"version": 1, "id": self._id}

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        saved = Saved(state, "a generation ID", 1).data("id", SIZE, SIZE)
        with self._lock:
            self._id = saved
