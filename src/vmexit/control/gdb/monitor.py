"""gdb's `monitor` commands: those of the human monitor, and some of gdb's own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine


def run(machine: "Machine", line: str, vcpu: int) -> str:
    """What the command answers."""
    words = line.split()
    match words:
        case ["reset" | "system_reset"]:
            machine.reset()
            return "the machine is at its beginning\n"
        case ["info", "registers"]:
            return machine.dump(vcpu) + "\n"
        case ["info", "breakpoints"]:
            lines = [
                f"{point.gva:#x} {point.kind.value} {point.length} "
                f"{way.value if way is not None else 'new'}\n"
                for point, way in machine.breakpoints.items()
            ]
            return "".join(lines) or "no breakpoints\n"
    return f"there is no {line!r}; use reset, info registers, info breakpoints\n"
