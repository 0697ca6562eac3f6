"""Guest memory goes back to an image, again and again."""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple, Protocol

from vmexit.core.memory import PAGE_SIZE, GuestMemory, Region, Source
from vmexit.core.memory_image import MemoryImage
from vmexit.core.steps import Steps
from vmexit.core.written import WrittenPages, runs

# So many pages may have been copied since the image was mapped, and so many times as many as now:
# each is one that the machine has for itself, though it is as in the image.
_MANY, _FACTOR = 4096, 4
# So many pages are kept once more, where they are read faster: 4 MiB at most.
_TOGETHER = 1024
# So many times going back leaves what is marked in the log marked, unless it gets to be so many
# times as many pages, and so many more, as when nothing was.
_MOST_ROUNDS, _GROWTH, _AND_PAGES = 64, 2, 64


class DirtyLog(Protocol):
    """The part of `vmexit.accel.base.Vm` that tells which pages the guest has written to."""

    def start_dirty_log(self) -> None: ...

    def written(self, region: Region) -> bytes | bytearray: ...

    def forget_written(self, region: Region) -> None: ...


class _Marked(NamedTuple):
    """What was marked in a region the last time, what to copy there, and how many pages it is."""

    bitmap: bytes
    sources: list[Source]
    pages: int
    again: Steps | None = None

    def steps(self, region: Region) -> Steps:
        """For going back there once more."""
        steps, sources = Steps(), [source for _, source in self.sources]
        if self.pages <= _TOGETHER:
            sources = _together(sources)
        for (here, _), source in zip(self.sources, sources, strict=True):
            steps.copy(region.view, here, source)
        return steps


def _together(sources: list[memoryview]) -> list[memoryview]:
    """The same bytes from one place, and zeros, which are the most, all from the same."""
    data = [bytes(source) for source in sources]
    zeros = bytes(max(map(len, data), default=0))
    no_bytes = {size: zeros[:size] for size in set(map(len, data))}
    rest = [b"" if one == no_bytes[len(one)] else one for one in data]
    ends = accumulate(map(len, rest))
    whole, nothing = memoryview(b"".join(rest)), memoryview(zeros)
    return [
        whole[end - len(one) : end] if one else nothing[: len(source)]
        for one, end, source in zip(rest, ends, sources, strict=True)
    ]


class Rewind:
    """Puts memory back to an image, while no vCPU runs.

    To map the image anew is always right, but then each page has to be mapped into the guest again,
    too. From the second time on, with a log of what the guest writes, only those pages are copied
    that somebody has written to.

    The log keeps its marks for some time: a guest that is rewound again and again writes to the
    same pages, and to copy a page once too often is cheaper than to have KVM see the first write to
    it, a page fault each time.
    """

    def __init__(
        self, memory: GuestMemory, log: DirtyLog | None, image: MemoryImage | None = None
    ) -> None:
        """`log` misses nothing that the guest does, or there is none.

        `image` is what memory was made from, if it was; no vCPU has run since.
        """
        self._memory = memory
        self._ram = [region for region, _ in memory.shared()]
        self._log = log
        self._logging = False
        self._image: MemoryImage | None = None
        self._mapped = 0
        self._by_host = WrittenPages()
        self._made_from = image
        self._rounds = 0  # since the log was empty
        self._marked_at_first = 0
        self._copied: dict[int, int] = {}  # a bit for each page, by the GPA of the region
        self._last: dict[int, _Marked] = {}  # by the same; most often it is the same again

    def leave_log(self) -> None:
        """Somebody else reads the log from now on, which forgets what it has told."""
        self._log = None

    def close(self) -> None:
        """Memory does not go back any more: what it was is let go."""
        self._image = self._made_from = None
        for last in self._last.values():  # whoever holds them: an exception may
            last.sources.clear()
            if last.again is not None:
                last.again.clear()
        self._last.clear()

    def to(self, image: MemoryImage) -> None:
        """Memory holds what `image` does. Raises ConfigError, HostError."""
        memory, log = self._memory, self._log
        if self._made_from is not None:
            same, self._made_from = image is self._made_from and memory.as_made, None
            memory.note_host_writes(None)
            if same:
                self._image, self._mapped = image, memory.mapped
                return
        again = image is self._image and memory.mapped == self._mapped
        self._image = None  # if this fails, nothing is known
        if log is not None and again and not self._logging:
            memory.note_host_writes(self._by_host)
            log.start_dirty_log()
            self._logging, again = True, False
        # Before the log is read: what others write from now on is for the next time.
        by_host = self._by_host.take(), memory.exposed
        few = not (by_host[0].too_many or by_host[1].too_many)
        if not (again and log is not None and few and self._copy(image, log, by_host)):
            memory.restore(image)
            self._copied.clear()
            self._last.clear()
            if log is not None and self._logging:
                for region in self._ram:
                    log.written(region)
                self._empty(log)
        self._image, self._mapped = image, memory.mapped

    def _copy(self, image: MemoryImage, log: DirtyLog, by_host: Iterable[WrittenPages]) -> bool:
        """Copy what was written; False if too many pages have become private copies by that.

        The same ones again are no more.
        """
        now, others = 0, False
        for region in self._ram:
            bitmap = log.written(region)
            for pages in by_host:
                if pages:
                    bitmap = bytearray(bitmap)
                    pages.mark(bitmap, region.gpa, region.size // PAGE_SIZE)
            last = self._last.get(region.gpa)
            if last is not None and last.bitmap == bitmap:
                again = last.again
                if again is None:
                    again = last.steps(region)
                    self._last[region.gpa] = last._replace(again=again)
                again.run()
            else:
                bits, others = int.from_bytes(bitmap, "little"), True
                sources = self._memory.sources(image, region, runs(bitmap))
                last = _Marked(bytes(bitmap), sources, bits.bit_count())
                self._last[region.gpa] = last
                self._copied[region.gpa] = self._copied.get(region.gpa, 0) | bits
                self._memory.copy(region, sources)
            now += last.pages
        self._keep_log(log, now)
        if not others:
            return True
        copied = sum(pages.bit_count() for pages in self._copied.values())
        return copied <= _MANY + _FACTOR * min(now, self._marked_at_first)

    def _keep_log(self, log: DirtyLog, marked: int) -> None:
        """Empty it if it is time to, now that so many pages were marked."""
        if not self._rounds:
            self._marked_at_first = marked
        self._rounds += 1
        most = _GROWTH * self._marked_at_first + _AND_PAGES
        if self._rounds >= _MOST_ROUNDS or marked > most:
            self._empty(log)

    def _empty(self, log: DirtyLog) -> None:
        """What it has told is noted when it is written again."""
        for region in self._ram:
            log.forget_written(region)
        self._rounds = 0
