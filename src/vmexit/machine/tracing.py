"""What a trace tells of a machine: names, memory slots, and which memory is written."""

import threading
import time
from collections.abc import Callable, Iterator

from vmexit import __version__
from vmexit.accel.base import Vm
from vmexit.core.chrome_trace import ChromeTrace, MemorySlot, TraceInfo
from vmexit.core.errors import HostError
from vmexit.core.memory import PAGE_SIZE, GuestMemory
from vmexit.core.threads import start_without_signals
from vmexit.machine.builder import Parts

_CHUNK = 2 << 20  # bytes: as a large page
_LEAST_CHUNKS = 64  # so that of a small guest something is seen, too

_INTERVAL = 0.5  # seconds
_SHARE = 20  # and at least so many times what looking took: it costs a twentieth at most


def begin(trace: ChromeTrace, parts: Parts, fail: Callable[[BaseException], None]) -> None:
    """Begin `trace`; until the machine is closed its memory is looked at. Raises HostError."""
    slots = [MemorySlot(r.gpa, r.size, r.hva, r.readonly) for r in parts.memory.regions]
    trace.begin(
        TraceInfo(
            __version__,
            parts.accel,
            len(parts.vcpus),
            tuple(slots),
            lambda mmio, address: (parts.mmio if mmio else parts.pio).name_at(address),
        )
    )
    parts.rewind.leave_log()
    sampler = DirtySampler(parts.vm, parts.memory, trace, fail)
    parts.closer.callback(sampler.close)


class DirtySampler:
    """Looks now and then which chunks of guest memory were written, from a thread of its own."""

    def __init__(
        self,
        vm: Vm,
        memory: GuestMemory,
        trace: ChromeTrace,
        fail: Callable[[BaseException], None],
    ) -> None:
        """`fail` takes what goes wrong in the thread. Raises HostError."""
        self._vm = vm
        self._regions = [region for region in memory.regions if not region.readonly]
        self._trace = trace
        self._fail = fail
        self._chunk = _chunk_of(sum(region.size for region in self._regions))
        self._end = threading.Event()
        vm.start_dirty_log()
        # A daemon: a program that forgets close() must still be able to end.
        self._thread = threading.Thread(target=self._main, name="vmexit-dirty", daemon=True)
        try:
            start_without_signals(self._thread)
        except RuntimeError as error:
            raise HostError(
                f"cannot start a thread that looks at memory: {error}; free memory"
            ) from error

    def _main(self) -> None:
        wait = _INTERVAL
        try:
            while not self._end.wait(wait):
                begun = time.perf_counter()
                self.sample()
                wait = max(_INTERVAL, _SHARE * (time.perf_counter() - begun))
            self.sample()
        except Exception as error:  # whatever it is, it is for the caller of run()
            self._fail(error)

    def sample(self) -> None:
        """Tell the trace what was written since the last time, if anything was."""
        pages = dict(self._written())
        if pages:
            self._trace.dirty(self._chunk, pages)

    def _written(self) -> Iterator[tuple[int, int]]:
        step = self._chunk // PAGE_SIZE // 8  # bytes of the bitmap
        for region in self._regions:
            bitmap = self._vm.dirty_log(region)
            for at in range(0, len(bitmap), step):
                pages = int.from_bytes(bitmap[at : at + step], "little").bit_count()
                if pages:
                    yield region.gpa + at * 8 * PAGE_SIZE, pages

    def close(self) -> None:
        """Look a last time, and end the thread."""
        self._end.set()
        self._thread.join()


def _chunk_of(memory: int) -> int:
    """The size of a chunk: a power of two, and of at least eight pages, a byte of the log."""
    chunk = _CHUNK
    while chunk > 8 * PAGE_SIZE and memory < chunk * _LEAST_CHUNKS:
        chunk //= 2
    return chunk
