"""Guest physical memory: RAM on a memfd, ROM beside it, reached by guest physical address (GPA).

RAM is one memfd mapped shared, so that another process, or a second mapping, can see the same
pages. From the first `capture()` on it is a private mapping of an image. A region is a contiguous
range of GPAs over a contiguous range of host virtual addresses.
"""

import ctypes
import fcntl
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from vmexit.core.errors import ConfigError, GuestAddressError, HostError
from vmexit.core.holes import punch_hole
from vmexit.core.memory_image import (
    MemoryImage,
    in_pieces,
    merged,
    private_stretches,
    stretches,
    unlike,
)
from vmexit.core.remap import map_over, reserve, zeros_over
from vmexit.core.written import WrittenPages

PAGE_SIZE = 4096
_LARGE = 1 << 20  # bytes

_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")


MEMFD_FLAGS = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING


def set_size(memfd: int, size: int) -> None:
    """Give a new memfd its size for good. Raises OSError, OverflowError.

    Who else has it cannot take pages from under our mapping, which would be a SIGBUS.
    """
    os.ftruncate(memfd, size)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


# Told of a range of GPAs: its start and size.
HostWrite = Callable[[int, int], None]


# A part of a region, and what is to be there.
Source = tuple[slice, memoryview]


class Region(NamedTuple):
    """A range of GPAs with memory behind it.

    `hva` is the host virtual address of its first byte; `view` the same bytes, writable by the
    host even where `readonly` keeps the guest from writing; who writes calls `host_wrote()`.
    """

    gpa: int
    size: int
    hva: int
    view: memoryview
    readonly: bool

    @property
    def end(self) -> int:
        """The first GPA behind the region."""
        return self.gpa + self.size

    def part(self, gpa: int, size: int) -> memoryview:
        """The view of `size` bytes at `gpa`, which are in the region."""
        start = gpa - self.gpa
        return self.view[start : start + size]


def _require_such(image: MemoryImage, ranges: Iterable[tuple[int, int]]) -> None:
    if set(ranges) != set(image.ranges):
        raise ConfigError(
            f"this is an image of {image.size} bytes of memory laid out otherwise; use a machine "
            "with as much --memory"
        )


class GuestMemory:
    """RAM ranges and ROMs of one guest. Slices are views, not copies.

    >>> memory = GuestMemory([(0, 0x10000)])
    >>> memory.write_u32(0x5000, 0x11223344)
    >>> bytes(memory[0x5000:0x5002])
    b'D3'
    >>> memory.close()
    """

    def __init__(self, ram: Iterable[tuple[int, int]], image: MemoryImage | None = None) -> None:
        """Map RAM for each `(gpa, size)`; both multiples of 4096.

        It holds zeros, or what `image` does. Raises ConfigError, HostError.
        """
        ranges = list(ram)
        for gpa, size in ranges:
            if size <= 0 or size % PAGE_SIZE or gpa % PAGE_SIZE:
                raise ConfigError(
                    f"memory of {size:#x} bytes at {gpa:#x} is not made of whole pages; "
                    f"use a multiple of {PAGE_SIZE} bytes"
                )
        self.regions: list[Region] = []
        self._starts: list[int] = []
        self._maps: list[mmap.mmap] = []
        self._offsets: dict[int, int] = {}  # in the memfd, by the GPA of a RAM region
        self._listeners: list[HostWrite] = []
        self._closed = False
        self._host_writes = None if image is None else WrittenPages()
        self.exposed = WrittenPages()
        """Pages that somebody may hold a view of, and so write to at any time."""
        self.private = image is not None
        """Whether `fd` is an image, which what is written to RAM does not reach."""
        self.mapped = 0
        """How often an image was put in the place of what there was."""
        if image is not None:
            _require_such(image, ranges)
        try:
            if image is None:
                self.fd = os.memfd_create("vmexit-ram", MEMFD_FLAGS)
            else:
                self.fd = os.dup(image.fd)
        except OSError as error:
            raise HostError(f"cannot make guest memory: {error.strerror}; close files") from error
        try:
            if image is None:
                set_size(self.fd, sum(size for _, size in ranges))
            offset = 0
            for gpa, size in ranges:
                # Python's mapping would hold the file for good, and this may be another's later.
                region = self._add(gpa, reserve(size), readonly=False)
                if image is None:
                    map_over(region.hva, size, self.fd, offset, private=False)
                    self._offsets[gpa] = offset
                offset += size
            if image is not None:
                self._map(image, reserved=True)
        except (OSError, OverflowError, ValueError) as error:
            self.close()
            raise ConfigError(
                f"cannot map {sum(size for _, size in ranges)} bytes of guest memory: {error}; "
                "use a smaller --memory"
            ) from error
        except ConfigError:
            self.close()
            raise

    def add_rom(self, gpa: int, data: bytes) -> Region:
        """Put `data` (padded with zeros to whole pages) at `gpa`, read-only for the guest.

        A ROM of that place and size gets new contents.
        """
        size = -(-len(data) // PAGE_SIZE) * PAGE_SIZE
        for region in self.regions:
            if region.readonly and (region.gpa, region.size) == (gpa, size):
                self.write(gpa, data.ljust(size, b"\0"))
                return region
        pages = mmap.mmap(-1, size)
        pages[: len(data)] = data
        return self._add(gpa, pages, readonly=True)

    def _add(self, gpa: int, pages: mmap.mmap, *, readonly: bool) -> Region:
        self._maps.append(pages)
        size = len(pages)
        for other in self.regions:
            if gpa < other.end and other.gpa < gpa + size:
                raise ConfigError(
                    f"memory at {gpa:#x}..{gpa + size - 1:#x} overlaps "
                    f"{other.gpa:#x}..{other.end - 1:#x}; use a smaller --memory"
                )
        hva = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        region = Region(gpa, size, hva, memoryview(pages), readonly)
        index = bisect_right(self._starts, gpa)
        self.regions.insert(index, region)
        self._starts.insert(index, gpa)
        return region

    def region(self, gpa: int, size: int = 1) -> Region:
        """The region that holds all of `[gpa, gpa + size)`. Raises GuestAddressError."""
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0 and size >= 0:
            region = self.regions[index]
            if gpa + size <= region.end and gpa < region.end:
                return region
        if self._closed:
            raise GuestAddressError("the guest memory is closed; use it before Machine.close()")
        have = ", ".join(f"{r.gpa:#x}..{r.end - 1:#x}" for r in self.regions)
        raise GuestAddressError(f"no guest memory at {gpa:#x} for {size} bytes; there is {have}")

    def shared(self) -> list[tuple[Region, int]]:
        """The RAM regions, with the offset in `fd` of each: what another process can map."""
        return [(r, self._offsets[r.gpa]) for r in self.regions if r.gpa in self._offsets]

    def in_use(self, region: Region) -> list[tuple[int, int]]:
        """First and end, from the beginning of `region` on, of what may not be zeros."""
        return self._in_use(region, 0, region.size)

    def _in_use(self, region: Region, start: int, stop: int) -> list[tuple[int, int]]:
        base = self._offsets[region.gpa]
        found = stretches(self.fd, base + start, base + stop)
        shared = [(first - base, end - base) for first, end in found]
        if not self.private:
            return shared
        private = private_stretches(region.hva + start, stop - start)
        return merged([*shared, *((start + first, start + end) for first, end in private)])

    def capture(self) -> MemoryImage:
        """What RAM holds now, for good; RAM itself goes on as a private copy of that.

        While nobody writes to it. The first time nothing is copied. Raises HostError.
        """
        ranges = tuple((region.gpa, region.size) for region, _ in self.shared())
        ranges = tuple(sorted(ranges, key=lambda one: self._offsets[one[0]]))
        try:
            fd = self._copy() if self.private else os.dup(self.fd)
            image = MemoryImage(fd, ranges)
            try:
                self.restore(image)
                try:
                    image.seal()
                except OSError:  # EBUSY: somebody else can write to it
                    image.close()
                    image = MemoryImage(self._copy(), ranges)
                    self.restore(image)
            except BaseException:
                image.close()
                raise
        except OSError as error:
            raise HostError(f"cannot copy guest memory: {error.strerror}; free some") from error
        return image

    def _copy(self) -> int:
        fd = os.memfd_create("vmexit-image", MEMFD_FLAGS)
        try:
            set_size(fd, sum(region.size for region, _ in self.shared()))
            for region, offset in self.shared():
                for first, end in in_pieces(self.in_use(region)):
                    data = bytes(region.view[first:end])
                    for start, stop in unlike(data, bytes(len(data))):
                        write_at(fd, memoryview(data)[start:stop], offset + first + start)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def restore(self, image: MemoryImage) -> None:
        """RAM holds what `image` does, whatever it held. Raises ConfigError, HostError."""
        self.require_layout(image)
        try:
            self.mapped += 1
            self._map(image)
            # The same number: another thread may just ask what is in use.
            os.dup2(image.fd, self.fd, inheritable=False)
        except OSError as error:
            raise HostError(f"cannot map guest memory: {error.strerror}; free some") from error
        self.private = True
        for gpa, size in image.ranges:
            self._tell(((gpa, size),), size)

    def _map(self, image: MemoryImage, *, reserved: bool = False) -> None:
        offset = 0
        for gpa, size in image.ranges:
            image.map_at(self.region(gpa).hva, offset, size, reserved=reserved)
            self._offsets[gpa] = offset
            offset += size

    def hva(self, gpa: int) -> int:
        """The host virtual address behind `gpa` (KVM API 4.35: GPA → HVA is the memory slot's)."""
        region = self.region(gpa)
        self.exposed.add(region.gpa, region.size)
        return region.hva + gpa - region.gpa

    @property
    def resident(self) -> int:
        """Bytes of RAM that the host has given, swapped or not: what was used and not discarded."""
        try:
            return 0 if self._closed else os.fstat(self.fd).st_blocks * 512
        except OSError:  # it is closed just now
            return 0

    def sources(
        self, image: MemoryImage, region: Region, pages: Iterable[tuple[int, int]]
    ) -> list[Source]:
        """What pages of `region` are in `image`, which was in the last `restore()`.

        `pages` are first and end of each run, counted from its first.
        """
        base = self._offsets[region.gpa]
        whole = image.view
        return [
            (
                slice(first * PAGE_SIZE, end * PAGE_SIZE),
                whole[base + first * PAGE_SIZE : base + end * PAGE_SIZE],
            )
            for first, end in pages
        ]

    @staticmethod
    def copy(region: Region, sources: Iterable[Source]) -> None:
        """Make these the contents of `region`; nobody is told that it has changed."""
        to = region.view
        for here, source in sources:
            to[here] = source

    def view(self, gpa: int, size: int) -> memoryview:
        """`size` bytes at `gpa` as a writable view of the guest's own bytes."""
        view = self.region(gpa, size).part(gpa, size)
        self.exposed.add(gpa, size)
        return view

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of `size` bytes at `gpa`."""
        return bytes(self.region(gpa, size).part(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `gpa`."""
        size = len(data)
        self.region(gpa, size).part(gpa, size)[:] = data
        self.host_wrote(((gpa, size),), size)

    def __getitem__(self, key: slice) -> memoryview:
        """`memory[a:b]`: a view of the bytes at the GPAs from a up to, not including, b."""
        return self.view(*_span(key))

    def __setitem__(self, key: slice, data: bytes | bytearray | memoryview) -> None:
        gpa, size = _span(key)
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes do not fill the slice of {size}")
        self.write(gpa, data)

    @property
    def as_made(self) -> bool:
        """Whether it was made from an image, and nobody but a guest can have written to it."""
        made = self._host_writes is not None and self.private and not self.mapped
        return made and not self._host_writes and not self.exposed

    def require_layout(self, image: MemoryImage) -> None:
        """Raises ConfigError unless `restore(image)` is possible."""
        _require_such(image, [(region.gpa, region.size) for region, _ in self.shared()])

    def on_host_write(self, listener: HostWrite) -> None:
        """Have `listener` told of what is written to memory other than by the guest."""
        self._listeners.append(listener)

    def note_host_writes(self, pages: WrittenPages | None) -> None:
        """From now on `pages` gets what the host may have written, but where views are exposed."""
        self._host_writes = pages

    def host_wrote(self, ranges: Iterable[tuple[int, int]], size: int) -> None:
        """Tell that views were written to: the first `size` bytes of these ranges, the rest maybe.

        The guest's page tables show nothing of that, and who has translated its code has to know.
        """
        self.may_write(ranges)
        self._tell(ranges, size)

    def may_write(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell that views of these ranges are about to be written to, maybe."""
        if self._host_writes is not None:
            for gpa, length in ranges:
                self._host_writes.add(gpa, length)

    def _tell(self, ranges: Iterable[tuple[int, int]], size: int) -> None:
        for gpa, length in ranges if self._listeners else ():
            if size <= 0:
                return
            for listener in self._listeners:
                listener(gpa, min(length, size))
            size -= length

    def discard(self, gpa: int, size: int) -> None:
        """Give the whole pages in `[gpa, gpa + size)` back to the host: they are zeros from now on.

        Where there is no RAM nothing happens.
        """
        first, end = -(-gpa // PAGE_SIZE) * PAGE_SIZE, (gpa + size) // PAGE_SIZE * PAGE_SIZE
        for region, offset in self.shared():
            start, stop = max(first, region.gpa), min(end, region.end)
            if start < stop:
                if self.private:
                    self._clear(region, start - region.gpa, stop - region.gpa)
                else:
                    punch_hole(self.fd, offset + start - region.gpa, stop - start)
                self.host_wrote(((start, stop - start),), stop - start)

    def _clear(self, region: Region, first: int, end: int) -> None:
        """Make zeros of a part of what is mapped privately."""
        if end - first >= _LARGE:  # each place takes a mapping of its own
            with suppress(OSError):  # there are too many
                zeros_over(region.hva + first, end - first)
                return
        for start, stop in self._in_use(region, first, end):
            region.view[start:stop] = bytes(stop - start)

    def read_u8(self, gpa: int) -> int:
        """The byte at `gpa`."""
        region = self.region(gpa)
        return region.view[gpa - region.gpa]

    def read_u16(self, gpa: int) -> int:
        """The little-endian 16-bit value at `gpa`."""
        return self._unpack(_U16, gpa)

    def read_u32(self, gpa: int) -> int:
        """The little-endian 32-bit value at `gpa`."""
        return self._unpack(_U32, gpa)

    def read_u64(self, gpa: int) -> int:
        """The little-endian 64-bit value at `gpa`."""
        return self._unpack(_U64, gpa)

    def write_u8(self, gpa: int, value: int) -> None:
        """Store one byte at `gpa`."""
        self.write(gpa, bytes((value,)))

    def write_u16(self, gpa: int, value: int) -> None:
        """Store a little-endian 16-bit value at `gpa`."""
        self.write(gpa, _U16.pack(value))

    def write_u32(self, gpa: int, value: int) -> None:
        """Store a little-endian 32-bit value at `gpa`."""
        self.write(gpa, _U32.pack(value))

    def write_u64(self, gpa: int, value: int) -> None:
        """Store a little-endian 64-bit value at `gpa`."""
        self.write(gpa, _U64.pack(value))

    def _unpack(self, layout: struct.Struct, gpa: int) -> int:
        region = self.region(gpa, layout.size)
        value: int = layout.unpack_from(region.view, gpa - region.gpa)[0]
        return value

    def close(self) -> None:
        """Unmap everything. A slice that somebody still holds keeps just its own pages mapped."""
        if self._closed:
            return
        self._closed = True
        for region in self.regions:
            region.view.release()
        self.regions.clear()
        self._starts.clear()
        for pages in self._maps:
            try:
                pages.close()
            except BufferError:  # a view is still held: the last one to go unmaps the pages
                continue
        self._maps.clear()
        os.close(self.fd)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of `data`. Raises OSError."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _span(key: slice) -> tuple[int, int]:
    if not isinstance(key, slice) or key.step is not None:
        raise TypeError(
            "guest memory takes a plain slice, memory[gpa:end]; or read_u8(gpa) and so on"
        )
    if key.start is None or key.stop is None or key.start < 0 or key.stop < key.start:
        raise GuestAddressError("a slice of guest memory needs both ends: memory[gpa:end]")
    return key.start, key.stop - key.start
