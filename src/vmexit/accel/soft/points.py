"""Where the engine's CPU is to stop for a debugger.

Breakpoints are QEMU's own, which Unicorn still has: a block of translated code ends before one, so
they cost nothing elsewhere. Of its watchpoints only empty functions are left. So a hook notes that
the memory was accessed, and another one, before each instruction, stops behind the one that did.
"""

import ctypes
from collections.abc import Callable, Iterable

from vmexit.accel.base import Point, PointKind
from vmexit.accel.soft.native import Library
from vmexit.accel.soft.stubs import StopWords, Stubs

_LARGEST_ACCESS = 64  # bytes of one access to memory


class _Watch(ctypes.Structure):
    """What the hook of a watchpoint gets: one more than its place in the list, and its GPA."""

    _fields_ = (("number", ctypes.c_uint64), ("gpa", ctypes.c_uint64))


class Points:
    """Breakpoints and watchpoints of one engine."""

    def __init__(self, library: Library, engine: int, cpu: int, stubs: Stubs) -> None:
        """`cpu` is the engine's CPUState."""
        self._library = library
        self._engine = engine
        self._cpu = cpu
        self._stubs = stubs
        self._breakpoints: dict[int, Point] = {}  # by linear address
        self._watched: list[Point] = []
        self._hooks: list[int] = []
        self._data: list[_Watch] = []  # C holds the addresses of these

    @property
    def watching(self) -> bool:
        """Whether there are watchpoints: hooks look at each instruction then."""
        return bool(self._hooks)

    def set(
        self, breakpoints: Iterable[Point], watched: Iterable[tuple[Point, list[tuple[int, int]]]]
    ) -> None:
        """These and no others; each watchpoint comes with its ranges of GPAs and sizes."""
        import unicorn

        breaks = {point.gva: point for point in breakpoints}
        if breaks or self._breakpoints:
            self._library.break_at(self._cpu, breaks)
        self._breakpoints = breaks
        for handle in self._hooks:
            self._library.unhook(self._engine, handle)
        self._hooks.clear()
        self._data.clear()
        self._watched.clear()
        for point, ranges in watched:
            self._watched.append(point)
            for gpa, size in ranges:
                self._watch(point.kind, gpa, size)
        if self._watched:
            kind, stub = unicorn.UC_HOOK_CODE, self._stubs.instruction_hook
            self._hooks.append(self._library.hook(self._engine, kind, stub))

    def _watch(self, kind: PointKind, gpa: int, size: int) -> None:
        import unicorn

        read, write = unicorn.UC_HOOK_MEM_READ, unicorn.UC_HOOK_MEM_WRITE
        hooks = {PointKind.READ: read, PointKind.WRITE: write, PointKind.ACCESS: read | write}
        watch = _Watch(len(self._watched), gpa)
        self._data.append(watch)
        self._hooks.append(
            self._library.hook(
                self._engine, hooks[kind], self._stubs.watch_hook,
                begin=max(gpa - _LARGEST_ACCESS + 1, 0), end=gpa + size - 1,
                data=ctypes.addressof(watch),
            )
        )  # fmt: skip

    def forget(self) -> None:
        """The CPU is about to run: it has stopped at none of them yet."""
        words = self._stubs.view
        words[StopWords.HIT] = words[StopWords.WATCHED] = 0

    def hit(self, linear_ip: Callable[[], int]) -> Point | None:
        """The point at which the CPU has stopped.

        At a watchpoint with a breakpoint right behind it that is the former, which is not seen
        again; the next run begins at the latter, and stops there.
        """
        words = self._stubs.view
        if number := words[StopWords.WATCHED]:
            return self._watched[number - 1]
        return self._breakpoints.get(linear_ip()) if words[StopWords.HIT] else None
