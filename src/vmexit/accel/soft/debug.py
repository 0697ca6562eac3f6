"""Breakpoints, watchpoints and single steps of the software CPU; see points.py."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from vmexit.accel.base import Point, PointKind, Way, WhereLinked, first_gpa, linear_rip, nowhere
from vmexit.core.errors import HostError
from vmexit.core.memory import PAGE_SIZE, GuestMemory

if TYPE_CHECKING:
    from vmexit.accel.soft.processor import Processor
    from vmexit.accel.soft.scheduler import Scheduler
    from vmexit.accel.soft.vcpu import SoftVcpu


class SoftDebugger:
    """What stops the vCPUs of one VM."""

    def __init__(
        self,
        processor: "Processor",
        scheduler: "Scheduler",
        vcpus: list["SoftVcpu"],
        memory: GuestMemory,
    ) -> None:
        self._processor = processor
        self._scheduler = scheduler
        self._vcpus = vcpus
        self._memory = memory
        self._armed = False

    def arm(
        self,
        points: Collection[Point],
        step: int | None = None,
        only: int | None = None,
        linked: WhereLinked = nowhere,
    ) -> dict[Point, Way]:
        """See `vmexit.accel.base.Debugger`. Raises HostError."""
        self.disarm()
        skipped = linear_rip(self._vcpus[step]) if step is not None else None
        breakpoints = [p for p in points if p.kind is PointKind.EXECUTE and p.gva != skipped]
        watched = [(p, self._ranges(p)) for p in points if p.kind is not PointKind.EXECUTE]
        self._armed = True
        try:
            self._processor.debug(breakpoints, watched)
        except BaseException:
            self.disarm()
            raise
        self._scheduler.debug(step, only)
        return dict.fromkeys((*breakpoints, *(point for point, _ in watched)), Way.ENGINE)

    def _ranges(self, point: Point) -> list[tuple[int, int]]:
        """`(gpa, size)` of what a watchpoint is about: one for each page."""
        ranges = []
        gva, end = point.gva, point.gva + point.length
        while gva < end:
            size = min(end - gva, PAGE_SIZE - gva % PAGE_SIZE)
            ranges.append((self._gpa(gva), size))
            gva += size
        return ranges

    def _gpa(self, gva: int) -> int:
        gpa = first_gpa(self._memory, self._vcpus, gva)
        if gpa is None:
            raise HostError(
                f"no memory is mapped at {gva:#x}; set the watchpoint once the guest has mapped it"
            )
        return gpa

    def disarm(self) -> None:
        """See `vmexit.accel.base.Debugger`."""
        if self._armed:
            self._processor.debug((), ())
            self._scheduler.debug(None, None)
            self._armed = False
