"""vmexit: a virtual machine monitor for x86-64 guests that a Python program holds in its hand."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmexit.arch.x86.registers import Segment, Table
    from vmexit.core.chrome_trace import ChromeTrace
    from vmexit.core.errors import (
        ConfigError,
        GuestAddressError,
        GuestCrash,
        HostError,
        ImageError,
        VmexitError,
    )
    from vmexit.core.exit_stats import ExitStats
    from vmexit.core.memory import GuestMemory
    from vmexit.core.trace import ExitObserver, JsonTrace, Tee, TextLog
    from vmexit.machine.config import MachineConfig
    from vmexit.machine.hooks import Access
    from vmexit.machine.machine import Machine
    from vmexit.machine.stop import Stop, StopReason

__version__ = "0.1.0"

# Where each public name is. They are loaded when first used: `vmexit --help`, and a program that
# wants `vmexit.abi` alone, do not need all of it.
_HOMES = {
    "vmexit.arch.x86.registers": ("Segment", "Table"),
    "vmexit.core.chrome_trace": ("ChromeTrace",),
    "vmexit.core.errors": (
        "ConfigError",
        "GuestAddressError",
        "GuestCrash",
        "HostError",
        "ImageError",
        "VmexitError",
    ),
    "vmexit.core.exit_stats": ("ExitStats",),
    "vmexit.core.memory": ("GuestMemory",),
    "vmexit.core.trace": ("ExitObserver", "JsonTrace", "Tee", "TextLog"),
    "vmexit.machine.config": ("MachineConfig",),
    "vmexit.machine.hooks": ("Access",),
    "vmexit.machine.machine": ("Machine",),
    "vmexit.machine.stop": ("Stop", "StopReason"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Access",
    "ChromeTrace",
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


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'vmexit' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
