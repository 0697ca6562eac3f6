"""What `x-query-exits` needs of an observer: `ExitStats` has it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


class Row(Protocol):
    """The exits of one reason at one address; times in nanoseconds."""

    @property
    def reason(self) -> str: ...
    @property
    def address(self) -> int | None: ...
    @property
    def size(self) -> int: ...
    @property
    def exits(self) -> int: ...
    @property
    def timed(self) -> int: ...
    @property
    def host_ns(self) -> int: ...
    @property
    def median_ns(self) -> int: ...


class Times(Protocol):
    """How a vCPU's time is divided, in nanoseconds."""

    @property
    def vcpu(self) -> int: ...
    @property
    def guest_ns(self) -> int: ...
    @property
    def host_ns(self) -> int: ...
    @property
    def elsewhere_ns(self) -> int: ...


class Snapshot(Protocol):
    """All of it at one moment."""

    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def vcpus(self) -> Sequence[Times]: ...


@runtime_checkable
class ExitCounts(Protocol):
    """Who counts exits by reason and address; any thread may ask."""

    def snapshot(self) -> Snapshot: ...
