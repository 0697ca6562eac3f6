"""The test device that the guests of kvm-unit-tests use, as QEMU's `pc-testdev` has it.

A register that gives back what was written, some memory that is reached by exits only, and the
inputs of the interrupt controller, for the guest to raise itself.
"""

import threading

from vmexit.core.bus import State
from vmexit.core.irq import IrqChip
from vmexit.core.saved import Saved

ECHO_SIZE = 4
LINES = 24
MEMORY_SIZE = 0x1_0000
VERSION = 1


class TestDev:
    """Five blocks of registers, each to be attached at an address of its own.

    `echo`, and again as `echo_bytes`, which takes single bytes only; `flush`; `lines`; `memory`.
    Any vCPU may enter: one lock.
    """

    __test__ = False  # for pytest, which takes it for one by its name

    def __init__(self, chip: IrqChip | None) -> None:
        """`lines` are the inputs of `chip`; without one they do nothing."""
        self._chip = chip
        self._lock = threading.Lock()
        self._levels = [False] * LINES
        self._echo = bytearray(ECHO_SIZE)
        self._memory = bytearray(MEMORY_SIZE)
        self.echo = _Bytes(self._lock, self._echo, (1, 2, 4))
        self.echo_bytes = _Bytes(self._lock, self._echo, (1,))
        self.flush = _Flush()
        self.lines = _Lines(self)
        self.memory = _Bytes(self._lock, self._memory, (1, 2, 4, 8))

    def set_level(self, line: int, level: bool) -> None:
        """Raise or lower an input of the interrupt controller."""
        with self._lock:
            self._set_level(line, level)

    def _set_level(self, line: int, level: bool) -> None:
        self._levels[line] = level
        if self._chip is not None:
            self._chip.set_level(line, level)

    def reset(self) -> None:
        """Lower the lines that are raised; others may be some other device's."""
        with self._lock:
            for line, level in enumerate(self._levels):
                if level:
                    self._set_level(line, False)
            self._echo[:] = bytes(ECHO_SIZE)
            self._memory[:] = bytes(MEMORY_SIZE)

    def state(self) -> State:
        with self._lock:
            return {
                "version": VERSION,
                "levels": [int(level) for level in self._levels],
                "echo": bytes(self._echo),
                "memory": bytes(self._memory),
            }

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        saved = Saved(state, "a test device", VERSION)
        levels = saved.numbers("levels", 1, LINES)
        echo = saved.data("echo", ECHO_SIZE, ECHO_SIZE)
        memory = saved.data("memory", MEMORY_SIZE, MEMORY_SIZE)
        with self._lock:
            for line, level in enumerate(levels):
                if self._levels[line] or level:
                    self._set_level(line, bool(level))
            self._echo[:], self._memory[:] = echo, memory


class _Bytes:
    """Memory, little-endian."""

    def __init__(self, lock: threading.Lock, data: bytearray, widths: tuple[int, ...]) -> None:
        self._lock = lock
        self._data = data
        self.widths = widths

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            return int.from_bytes(self._data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            self._data[offset : offset + size] = value.to_bytes(size, "little")


class _Flush:
    """Where QEMU has its host drop a guest's page for a moment: here, nothing comes of it.

    A guest sees no difference, and a page that is gone could be one that a device just uses.
    """

    widths = (4,)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """It is taken, and that is all."""


class _Lines:
    """One byte for each input: what is written there is its level."""

    widths = (1,)

    def __init__(self, device: TestDev) -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.set_level(offset, value != 0)
