"""The memory balloon, as a program that holds a machine sees it."""

from collections.abc import Callable
from typing import Protocol


class MemoryBalloon(Protocol):
    """Takes memory from the guest for the host; sizes in bytes. Any thread may use it."""

    @property
    def target(self) -> int:
        """How much it shall have."""
        ...

    @property
    def actual(self) -> int:
        """How much it has, as the guest says."""
        ...

    @property
    def statistics(self) -> dict[str, int]:
        """What the guest has told last: `free_memory`, `major_faults`, … (virtio 5.5.6.4)."""
        ...

    def set_target(self, size: int) -> None:
        """Ask the guest for `size` bytes in all. Raises ConfigError for less than none."""
        ...

    def on_change(self, function: Callable[[int], None]) -> None:
        """Call `function`, in any thread, with how much it has whenever the guest says so."""
        ...

    def ask_for_statistics(self) -> None:
        """Have the guest tell its statistics anew, some time later."""
        ...
