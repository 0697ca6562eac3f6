"""vmexit: a virtual machine monitor for x86-64 guests that a Python program holds in its hand."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmexit.accel.base import Point, PointKind, Way
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
    from vmexit.core.symbols import Symbol, SymbolTable
    from vmexit.core.trace import ExitObserver, JsonTrace, Tee, TextLog
    from vmexit.machine.backtrace import Frame
    from vmexit.machine.config import MachineConfig
    from vmexit.machine.events import Event, EventKind, RunState
    from vmexit.machine.hooks import Access
    from vmexit.machine.lifecycle import After
    from vmexit.machine.machine import Machine
    from vmexit.machine.snapshot import Snapshot
    from vmexit.machine.stop import Stop, StopReason

__version__ = "0.1.0"

# Where each public name is. They are loaded when first used: `vmexit --help`, and a program that
# wants `vmexit.abi` alone, do not need all of it.
_HOMES = {
    "vmexit.accel.base": ("Point", "PointKind", "Way"),
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
    "vmexit.core.symbols": ("Symbol", "SymbolTable"),
    "vmexit.core.trace": ("ExitObserver", "JsonTrace", "Tee", "TextLog"),
    "vmexit.machine.backtrace": ("Frame",),
    "vmexit.machine.config": ("MachineConfig",),
    "vmexit.machine.events": ("Event", "EventKind", "RunState"),
    "vmexit.machine.hooks": ("Access",),
    "vmexit.machine.lifecycle": ("After",),
    "vmexit.machine.machine": ("Machine",),
    "vmexit.machine.snapshot": ("Snapshot",),
    "vmexit.machine.stop": ("Stop", "StopReason"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Access",
    "After",
    "ChromeTrace",
    "ConfigError",
    "Event",
    "EventKind",
    "ExitObserver",
    "ExitStats",
    "Frame",
    "GuestAddressError",
    "GuestCrash",
    "GuestMemory",
    "HostError",
    "ImageError",
    "JsonTrace",
    "Machine",
    "MachineConfig",
    "Point",
    "PointKind",
    "RunState",
    "Segment",
    "Snapshot",
    "Stop",
    "StopReason",
    "Symbol",
    "SymbolTable",
    "Table",
    "Tee",
    "TextLog",
    "VmexitError",
    "Way",
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
