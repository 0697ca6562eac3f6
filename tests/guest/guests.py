"""The guests of `guests/`, and running one with everything about it recorded."""

import importlib.util
import json
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from vmexit import JsonTrace, Machine, Stop

FOLDER = Path(__file__).resolve().parents[2] / "guests"


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guests_build", FOLDER / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()

# By name, the CPU mode that each starts in.
GUESTS: dict[str, str] = build.GUESTS

# Those that test_delivery.py and test_storms.py run: not every KVM can, and what they log differs
# in RF.
DELIVERY = frozenset(
    {
        "compatibility",
        "double-fault",
        "exceptions-long",
        "exceptions-protected",
        "exceptions-real",
        "gates-protected",
        "int1",
        "interrupt-sources",
        "interrupts",
        "nested-exceptions",
        "processors",
        "software-interrupts",
        "storms",
        "syscall-32",
        "sysenter",
        "sysenter-protected",
        "system-calls",
        "task-gate",
    }
)

# Those that run for ever, or until N at 0x9000 is reached.
ENDLESS = frozenset({"endless"})
COUNTED = frozenset({"out-loop", "ring3-out"})
COUNT_AT = 0x9000


class Run(NamedTuple):
    """One run: how it stopped, its exits without their times, the registers, low memory."""

    stop: Stop
    exits: list[dict[str, object]]
    registers: dict[str, object]
    memory: bytes
    serial: str


def trace_of(text: str) -> list[dict[str, object]]:
    """The exits of a JSON trace, without the times."""
    exits = [json.loads(line) for line in text.splitlines()]
    for exit in exits:
        assert exit.pop("t") >= 0
    return exits


def run_guest(accel: str, name: str, serial: Path, *, timeout: float = 60, count: int = 5) -> Run:
    """Run a guest of the folder to its end."""
    trace = StringIO()
    with Machine(
        memory="64M",
        accel=accel,
        image=FOLDER / f"{name}.bin",
        mode=GUESTS[name],
        serial=f"file:{serial}",
        observer=JsonTrace(trace),
    ) as vm:
        if name in COUNTED:
            vm.memory.write_u32(COUNT_AT, count)
        stop = vm.run(timeout)
        registers = vm.vcpus[0].regs.as_dict()
        memory = bytes(vm.memory[0:0x20000])
    return Run(stop, trace_of(trace.getvalue()), registers, memory, serial.read_text())
