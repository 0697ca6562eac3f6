"""Memory accesses of the software vCPU that RAM does not answer: MMIO, and writes to ROM.

QEMU's memory core would cut them into pieces that no device on a PC sees: 8-byte accesses into two
halves, unaligned writes into bytes, unaligned reads into two aligned ones around them. So the
MMIO ranges deny reading and writing, which makes the engine ask a hook with the whole access first.
An aligned access goes on to the range's callbacks, as one piece. An unaligned one is made by the
hook; what the engine then does in pieces is answered from that, and reaches no device. Only an
unaligned access across two pages, each of which may be anything, stays in pieces.

The page walk and the fetching of code come to the callbacks as well, but not to the hooks. They are
no accesses of an instruction that could be left and executed again.
"""

import ctypes
import struct
from collections.abc import Callable

from vmexit.accel.soft.native import (
    Library,
    MemoryCallback,
    MmioReadCallback,
    MmioWriteCallback,
    address_of,
)
from vmexit.accel.soft.replay import Replay
from vmexit.accel.soft.stubs import StopWords, Stubs
from vmexit.core.bus import Bus
from vmexit.core.errors import HostError
from vmexit.core.memory import PAGE_SIZE, Region
from vmexit.core.trace import ExitObserver

# Byte offsets in QEMU's MemoryRegion, and in the structure with callbacks that an MMIO range owns.
_REGION_OPS, _REGION_OPAQUE, _REGION_PERMS = 16, 24, 136
_CALLBACK_READ, _CALLBACK_WRITE, _CALLBACK_OPS, _CALLBACK_MAX_SIZE = 0, 16, 32, 100


class Mmio:
    """The MMIO ranges and ROMs of one engine."""

    def __init__(
        self,
        library: Library,
        engine: int,
        bus: Bus,
        words: memoryview,
        replay: Replay,
        rip: Callable[[], int],
        fail: Callable[[BaseException], None],
    ) -> None:
        """`words` are the stubs', `rip()` is that of the instruction that accesses something.

        `fail` takes what a device raises: it cannot pass through C.
        """
        self._library = library
        self._engine = engine
        self._index = 0
        self._bus = bus
        self._observer: ExitObserver | None = None
        self._words = words
        self._fail = fail
        self._replay = replay
        self._rip = rip
        # C holds the addresses of these.
        self._callbacks: list[object] = []
        # The unaligned access under way: its pieces still to come, and for a read the bytes.
        self._pieces = 0
        self._gpa = 0
        self._data = b""

    def serve(self, index: int, observer: ExitObserver | None) -> None:
        """The accesses to come are those of vCPU `index`."""
        self._index = index
        self._observer = observer

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

    # Called from C: none may let an exception out.

    def _read(self, gpa: int, size: int, *, load: bool = True) -> int:
        """`load`: an instruction does it."""
        if load and self._replay.repeating:
            answer = self._replay.answer("read", gpa, size)
            if answer is not None:
                return answer
        value = (1 << 8 * size) - 1
        try:
            if self._observer is None:
                value = self._bus.read(gpa, size)
            else:
                value = self._observed_read(self._observer, gpa, size)
        except BaseException as error:
            self._fail(error)
        if load:
            self._replay.made(self._rip(), "read", gpa, size, value)
        return value

    def _write(self, gpa: int, size: int, value: int, *, store: bool = True) -> None:
        """`store`: an instruction does it."""
        if store and self._replay.repeating and self._replay.answer("write", gpa, size) is not None:
            return
        value &= (1 << 8 * size) - 1
        try:
            if self._observer is None:
                self._bus.write(gpa, size, value)
            else:
                self._observed_write(self._observer, gpa, size, value)
        except BaseException as error:
            self._fail(error)
        if store:
            self._replay.made(self._rip(), "write", gpa, size, value)

    def _observed_read(self, observer: ExitObserver, gpa: int, size: int) -> int:
        observer.left(self._index)
        value = self._bus.read(gpa, size)
        observer.mmio(self._index, False, gpa, value.to_bytes(size, "little"))
        observer.enters(self._index)
        return value

    def _observed_write(self, observer: ExitObserver, gpa: int, size: int, value: int) -> None:
        observer.left(self._index)
        observer.mmio(self._index, True, gpa, value.to_bytes(size, "little"))
        self._bus.write(gpa, size, value)
        observer.enters(self._index)

    def _by_instruction(self) -> bool:
        words = self._words
        by_instruction = bool(words[StopWords.LOADS])
        words[StopWords.LOADS] = 0
        return by_instruction

    def _reader(self, base: int) -> Callable[[int, int, int, int], int]:
        def read(_uc: int, offset: int, size: int, _data: int) -> int:
            gpa, load = base + offset, self._by_instruction()
            if self._pieces:
                self._pieces -= 1
                at = gpa - self._gpa
                piece = self._data[max(at, 0) : at + size].rjust(size, b"\0")
                return int.from_bytes(piece, "little")
            return self._read(gpa, size, load=load)

        return read

    def _writer(self, base: int) -> Callable[[int, int, int, int, int], None]:
        def write(_uc: int, offset: int, size: int, value: int, _data: int) -> None:
            store = self._by_instruction()
            if self._pieces:
                self._pieces -= 1
            else:
                self._write(base + offset, size, value, store=store)

        return write

    def _on_unaligned_read(
        self, _uc: int, _type: int, gpa: int, size: int, _value: int, _data: int
    ) -> bool:
        if gpa % PAGE_SIZE + size <= PAGE_SIZE:
            data = self._read(gpa, size).to_bytes(size, "little")
            # The lower piece begins before the access, the upper one ends behind it.
            self._gpa, self._data = gpa, data.ljust(2 * size, b"\0")
            self._pieces = 0 if self._replay.unfinished else 2
        return True

    def _on_unaligned_write(
        self, _uc: int, _type: int, gpa: int, size: int, value: int, _data: int
    ) -> bool:
        if gpa % PAGE_SIZE + size <= PAGE_SIZE:
            self._write(gpa, size, value)
            self._pieces = 0 if self._replay.unfinished else size
        return True

    def _on_rom_write(
        self, _uc: int, _type: int, gpa: int, size: int, value: int, _data: int
    ) -> bool:
        if self._pieces:
            self._pieces -= 1
            return True
        self._write(gpa, size, value)
        if gpa % size and gpa % PAGE_SIZE + size <= PAGE_SIZE and not self._replay.unfinished:
            self._pieces = size
        return True

    def close(self) -> None:
        """Let go of the callbacks; the engine may not run afterwards."""
        self._callbacks.clear()


def _word(address: int, size: int = 8) -> int:
    value: int = struct.unpack("<Q" if size == 8 else "<I", ctypes.string_at(address, size))[0]
    return value
