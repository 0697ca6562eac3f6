"""vmexit: a virtual machine monitor for x86-64 guests that a Python program holds in its hand."""

from vmexit.arch.x86.registers import Segment, Table
from vmexit.core.errors import (
    ConfigError,
    GuestAddressError,
    GuestCrash,
    HostError,
    ImageError,
    VmexitError,
)
from vmexit.core.memory import GuestMemory
from vmexit.core.trace import ExitObserver, ExitStats, JsonTrace, Tee, TextLog
from vmexit.machine.config import MachineConfig
from vmexit.machine.hooks import Access
from vmexit.machine.machine import Machine
from vmexit.machine.stop import Stop, StopReason

__version__ = "0.1.0"

__all__ = [
    "Access",
    "ConfigError",
    "ExitObserver",
    "ExitStats",
    "GuestAddressError",
    "GuestCrash",
    "GuestMemory",
    "HostError",
    "ImageError",
    "JsonTrace",
    "Machine",
    "MachineConfig",
    "Segment",
    "Stop",
    "StopReason",
    "Table",
    "Tee",
    "TextLog",
    "VmexitError",
    "__version__",
]
