"""Memory accesses of the software vCPU that RAM does not answer: MMIO, and writes to ROM.

QEMU's memory core would cut them into pieces that no device on a PC sees: 8-byte accesses into two
halves, unaligned writes into bytes, unaligned reads into two aligned ones around them. So the
MMIO ranges deny reading and writing, which makes the engine ask a hook with the whole access first.
An aligned access goes on to the range's callbacks, as one piece. An unaligned one is made by the
hook; what the engine then does in pieces is answered from that, and reaches no device. Only an
unaligned access across two pages, each of which may be anything, stays in pieces.

When a run is to end, it must not go on to the end of the translated block. So the callback leaves
the instruction where it began, and `SoftVcpu` executes that once more by itself; what had been
accessed already is then answered from a log.
"""

import ctypes
import struct
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from vmexit.accel.soft.native import (
    Library,
    MemoryCallback,
    MmioReadCallback,
    MmioWriteCallback,
    StopWords,
    Stubs,
    address_of,
)
from vmexit.core.bus import Bus
from vmexit.core.errors import HostError
from vmexit.core.memory import PAGE_SIZE, Region
from vmexit.core.trace import ExitObserver

# Byte offsets in QEMU's MemoryRegion, and in the structure with callbacks that an MMIO range owns.
_REGION_OPS, _REGION_OPAQUE, _REGION_PERMS = 16, 24, 136
_CALLBACK_READ, _CALLBACK_WRITE, _CALLBACK_OPS, _CALLBACK_MAX_SIZE = 0, 16, 32, 100


# More accesses than any one instruction makes.
_LOGGED = 64


class _Done(NamedTuple):
    """An access that was made."""

    write: bool
    gpa: int
    size: int
    value: int


class Mmio:
    """The MMIO ranges and ROMs of one engine."""

    def __init__(
        self,
        library: Library,
        engine: int,
        index: int,
        bus: Bus,
        observer: ExitObserver | None,
        words: memoryview,
        fail: Callable[[BaseException], None],
    ) -> None:
        """`words` are the stubs'. `fail` takes what a device raises: it cannot pass through C."""
        self._library = library
        self._engine = engine
        self._index = index
        self._bus = bus
        self._observer = observer
        self._words = words
        self._fail = fail
        # The last accesses, for an instruction that is executed again, and whether one is to be.
        self._log: deque[_Done] = deque(maxlen=_LOGGED)
        self._again: list[_Done] = []
        self._repeating = False
        self.unfinished = False
        # C holds the addresses of these.
        self._callbacks: list[object] = []
        # The unaligned access under way: its pieces still to come, and for a read the bytes.
        self._pieces = 0
        self._gpa = 0
        self._data = b""

    def _c(self, callback: Callable[..., object]) -> int:
        self._callbacks.append(callback)
        return address_of(callback)

    def add_hole(self, gpa: int, size: int, stubs: Stubs) -> None:
        """Send accesses to `[gpa, gpa + size)` to the bus. Raises HostError."""
        import unicorn

        read = stubs.leaving_hook(self._c(MmioReadCallback(self._reader(gpa))))
        write = stubs.leaving_hook(self._c(MmioWriteCallback(self._writer(gpa))))
        if self._library.mmio_map(self._engine, gpa, size, read, None, write, None):
            raise HostError(f"Unicorn refused MMIO at {gpa:#x} for {size:#x} bytes")
        self._open(gpa, read, write)
        for kind, function in (
            (unicorn.UC_HOOK_MEM_READ_PROT, self._on_unaligned_read),
            (unicorn.UC_HOOK_MEM_WRITE_PROT, self._on_unaligned_write),
        ):
            hook = stubs.unaligned_hook(stubs.leaving_hook(self._c(MemoryCallback(function))))
            self._library.hook(self._engine, kind, hook, begin=gpa, end=gpa + size - 1)

    def add_rom(self, region: Region, stubs: Stubs) -> None:
        """Send writes to `region`, which is read-only, to the bus; the engine drops them."""
        import unicorn

        hook = stubs.leaving_hook(self._c(MemoryCallback(self._on_rom_write)))
        kind = unicorn.UC_HOOK_MEM_WRITE_PROT
        self._library.hook(self._engine, kind, hook, begin=region.gpa, end=region.end - 1)

    def _open(self, gpa: int, read: int, write: int) -> None:
        """Let accesses of 8 bytes through in one, and deny all, so that the hooks are asked."""
        region = self._library.find_region(self._engine, gpa)
        callbacks = _word(region + _REGION_OPAQUE) if region else 0
        if (
            not callbacks
            or _word(region + _REGION_OPS) != callbacks + _CALLBACK_OPS
            or _word(region + _REGION_PERMS, 4) != 3
            or _word(callbacks + _CALLBACK_READ) != read
            or _word(callbacks + _CALLBACK_WRITE) != write
            or _word(callbacks + _CALLBACK_MAX_SIZE, 4) != 0
        ):
            raise HostError(
                "this Unicorn keeps its MMIO ranges elsewhere than release 2.1.4 does; "
                "install unicorn==2.1.4, or use --accel kvm"
            )
        ctypes.c_uint32.from_address(callbacks + _CALLBACK_MAX_SIZE).value = 8
        ctypes.c_uint32.from_address(region + _REGION_PERMS).value = 0

    def repeat(self) -> None:
        """The instruction that was left is executed again: do not repeat what it has accessed."""
        self.unfinished = False
        self._repeating = True
        self._again = []

    def finished(self) -> None:
        """It is done."""
        self._repeating = False

    def _logged(self, write: bool, gpa: int, size: int) -> _Done | None:
        """What this access gave before, if it is one of the instruction that is executed again."""
        if not self._again:
            # Its accesses are the last ones of the log, from one like this on.
            log = list(self._log)
            for at in range(len(log) - 1, -1, -1):
                if log[at][:3] == (write, gpa, size):
                    self._again = log[at:]
                    break
            self._log.clear()
        if self._again and self._again[0][:3] == (write, gpa, size):
            return self._again.pop(0)
        return None

    # Called from C: none may let an exception out.

    def _read(self, gpa: int, size: int) -> int:
        if self._repeating and (done := self._logged(False, gpa, size)) is not None:
            return done.value
        value = 0
        try:
            value = self._bus.read(gpa, size)
            if self._observer is not None:
                self._observer.mmio(self._index, False, gpa, value.to_bytes(size, "little"))
        except BaseException as error:
            self._fail(error)
        self._made(_Done(False, gpa, size, value))
        return value

    def _write(self, gpa: int, size: int, value: int) -> None:
        if self._repeating and self._logged(True, gpa, size) is not None:
            return
        value &= (1 << 8 * size) - 1
        try:
            if self._observer is not None:
                self._observer.mmio(self._index, True, gpa, value.to_bytes(size, "little"))
            self._bus.write(gpa, size, value)
        except BaseException as error:
            self._fail(error)
        self._made(_Done(True, gpa, size, value))

    def _made(self, done: _Done) -> None:
        self._log.append(done)
        if self._words[StopWords.KICK] and not self._repeating:
            self.unfinished = True
            self._words[StopWords.LEAVE] = 1

    def _reader(self, base: int) -> Callable[[int, int, int, int], int]:
        def read(_uc: int, offset: int, size: int, _data: int) -> int:
            gpa = base + offset
            if self._pieces:
                self._pieces -= 1
                at = gpa - self._gpa
                piece = self._data[max(at, 0) : at + size].rjust(size, b"\0")
                return int.from_bytes(piece, "little")
            return self._read(gpa, size)

        return read

    def _writer(self, base: int) -> Callable[[int, int, int, int, int], None]:
        def write(_uc: int, offset: int, size: int, value: int, _data: int) -> None:
            if self._pieces:
                self._pieces -= 1
            else:
                self._write(base + offset, size, value)

        return write

    def _on_unaligned_read(
        self, _uc: int, _type: int, gpa: int, size: int, _value: int, _data: int
    ) -> bool:
        if gpa % PAGE_SIZE + size <= PAGE_SIZE:
            data = self._read(gpa, size).to_bytes(size, "little")
            # The lower piece begins before the access, the upper one ends behind it.
            self._gpa, self._data = gpa, data.ljust(2 * size, b"\0")
            self._pieces = 0 if self.unfinished else 2
        return True

    def _on_unaligned_write(
        self, _uc: int, _type: int, gpa: int, size: int, value: int, _data: int
    ) -> bool:
        if gpa % PAGE_SIZE + size <= PAGE_SIZE:
            self._write(gpa, size, value)
            self._pieces = 0 if self.unfinished else size
        return True

    def _on_rom_write(
        self, _uc: int, _type: int, gpa: int, size: int, value: int, _data: int
    ) -> bool:
        if self._pieces:
            self._pieces -= 1
            return True
        self._write(gpa, size, value)
        if gpa % size and gpa % PAGE_SIZE + size <= PAGE_SIZE and not self.unfinished:
            self._pieces = size
        return True

    def close(self) -> None:
        """Let go of the callbacks; the engine may not run afterwards."""
        self._callbacks.clear()


def _word(address: int, size: int = 8) -> int:
    value: int = struct.unpack("<Q" if size == 8 else "<I", ctypes.string_at(address, size))[0]
    return value
