"""Breakpoints, watchpoints and single steps of the software CPU; see points.py."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from vmexit.accel.base import Linked, Point, PointKind, Way, nowhere
from vmexit.arch.x86.code import linear_ip
from vmexit.arch.x86.paging import translate
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

    def arm(
        self,
        points: Collection[Point],
        step: int | None = None,
        only: int | None = None,
        linked: Linked = nowhere,
    ) -> dict[Point, Way]:
        """See `vmexit.accel.base.Debugger`. Raises HostError."""
        self.disarm()
        skipped = None
        if step is not None:
            vcpu = self._vcpus[step]
            skipped = linear_ip(vcpu.registers(), vcpu.system_registers())
        breakpoints = [p for p in points if p.kind is PointKind.EXECUTE and p.gva != skipped]
        watched = [(p, self._ranges(p)) for p in points if p.kind is not PointKind.EXECUTE]
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
        for vcpu in self._vcpus:
            gpa = translate(self._memory, vcpu.system_registers(), gva)
            if gpa is not None:
                return gpa
        raise HostError(
            f"no memory is mapped at {gva:#x}; set the watchpoint once the guest has mapped it"
        )

    def disarm(self) -> None:
        """See `vmexit.accel.base.Debugger`."""
        self._processor.debug((), ())
        self._scheduler.debug(None, None)
