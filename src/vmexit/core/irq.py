"""Interrupts between devices and the interrupt controller, and between that and the vCPUs."""

import os
from typing import Protocol


class IrqChip(Protocol):
    """An interrupt controller, as devices see it. Any thread may call it."""

    def set_level(self, gsi: int, level: bool) -> None:
        """Raise or lower the input `gsi` (a Global System Interrupt, ACPI 6.4, 5.2.13)."""
        ...


class IrqLine:
    """A wire from a device to one input of the interrupt controller.

    Raising a line is the one call that a device may make while it holds its own lock: the
    controller never calls devices back from it.
    """

    __slots__ = ("_chip", "_gsi")

    def __init__(self, chip: IrqChip, gsi: int) -> None:
        self._chip = chip
        self._gsi = gsi

    def set_level(self, level: bool) -> None:
        """Raise (True) or lower the line; to set the level that it has changes nothing."""
        self._chip.set_level(self._gsi, level)

    def pulse(self) -> None:
        """Raise it and lower it again: one edge."""
        self._chip.set_level(self._gsi, True)
        self._chip.set_level(self._gsi, False)


class EdgeLine(Protocol):
    """What a device has for whose interrupts the edge counts alone."""

    def pulse(self) -> None:
        """Raise it and lower it again: one edge."""
        ...


class EventfdLine:
    """Such a wire as an eventfd, which the accelerator takes for one: KVM's irqfd."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pulse(self) -> None:
        os.eventfd_write(self._fd, 1)


class VcpuInterrupts(Protocol):
    """The interrupt controller, as one vCPU sees it. Any thread may call it."""

    def pending(self) -> bool:
        """Whether an interrupt waits that this vCPU would take now, if its IF were set."""
        ...

    def acknowledge(self) -> int:
        """The vector of that interrupt, which is in service from now on: an INTA cycle.

        If nothing is pending any more, the vector of a spurious interrupt.
        """
        ...

    def take_nmi(self) -> bool:
        """Whether a non-maskable interrupt waits; it is taken by asking."""
        ...

    def nmi_may_come(self) -> bool:
        """Whether some device's interrupt would reach this vCPU as a non-maskable one."""
        ...

    def take_startup(self) -> "Startup | None":
        """An INIT or a start-up request that has come for this vCPU; taken by asking."""
        ...


class Startup:
    """What the LAPIC asks of its processor (Intel SDM vol. 3, 9.4): INIT, or SIPI with a vector."""

    __slots__ = ("vector",)

    def __init__(self, vector: int | None) -> None:
        """`vector` is that of a SIPI; None stands for INIT."""
        self.vector = vector
