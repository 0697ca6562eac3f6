"""The devices of a machine by what its configuration says, for those who ask."""

import os
from typing import NamedTuple

from vmexit.core.errors import ConfigError
from vmexit.machine.drive import Drive
from vmexit.machine.machine import Machine


class Disk(NamedTuple):
    """A disk of the guest, by its name among the machine's devices."""

    device: str
    drive: Drive

    @property
    def size(self) -> int | None:
        """In bytes, of a raw image or a block device; None if that cannot be told."""
        if self.drive.socket or self.drive.format not in ("", "raw"):
            return None
        try:
            with open(self.drive.file, "rb") as file:
                return file.seek(0, os.SEEK_END)
        except OSError:
            return None

    @property
    def where(self) -> str:
        """The file, or the socket of the other program whose disk it is."""
        return self.drive.file or f"vhost-user:{self.drive.socket}"


class Channel(NamedTuple):
    """A serial port or a console, and where it leads to."""

    label: str
    where: str


def disks(vm: Machine) -> list[Disk]:
    """In the order in which the guest has them."""
    return [Disk(f"disk{n}", Drive.parse(text)) for n, text in enumerate(vm.config.drives)]


def channels(vm: Machine) -> list[Channel]:
    """The serial port, then the consoles."""
    found = []
    if vm.config.serial is not None:
        found.append(Channel("serial0", vm.serial_where or vm.config.serial))
    for number, (text, where) in enumerate(zip(vm.config.consoles, vm.console_where, strict=True)):
        found.append(Channel(f"console{number}", where or text.partition(",")[0]))
    return found


def memory_left(vm: Machine) -> int:
    """How many bytes of its memory the guest has without what is in the balloon.

    Raises ConfigError for a machine without one.
    """
    return vm.config.memory - vm.balloon.actual


def leave_memory(vm: Machine, size: int) -> None:
    """Ask the guest to do with `size` bytes. Raises ConfigError."""
    balloon = vm.balloon
    if size <= 0:
        raise ConfigError("Parameter 'target' expects a size")
    balloon.set_target(max(0, vm.config.memory - size))
