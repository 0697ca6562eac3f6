"""What is told of a vCPU, at a crash above all: registers, instruction, backtrace, with names."""

from collections.abc import Callable

from vmexit.arch.x86.code import dump, linear_ip, next_instruction
from vmexit.arch.x86.registers import Registers, SystemRegisters
from vmexit.core.errors import VmexitError
from vmexit.core.memory import GuestMemory
from vmexit.core.symbols import SymbolTable
from vmexit.machine.backtrace import backtrace
from vmexit.machine.config import MachineConfig


def read_symbols(config: MachineConfig) -> SymbolTable:
    """The symbols of the guest, as far as the configuration names any. Raises ImageError."""
    if config.symbols is None and config.kernel is None:
        return SymbolTable()
    from vmexit.boot.symbols import load_symbols, own_symbols  # only a crash needs them

    if config.symbols is not None:
        return load_symbols(config.symbols)
    assert config.kernel is not None
    return own_symbols(config.kernel)


def describe(
    memory: GuestMemory,
    registers: Registers,
    system: SystemRegisters,
    symbols: Callable[[], SymbolTable],
) -> str:
    """All registers and the next instruction; then the backtrace, if it is more than that.

    If `symbols` cannot be read that is told, too: what has happened to the guest is worth more.
    """
    problem = []
    try:
        table = symbols()
    except VmexitError as error:
        table = SymbolTable()
        problem.append(f"no symbols: {error}")
    _, instruction = next_instruction(memory, registers, system)
    here = linear_ip(registers, system)
    if table.find(here) is not None:
        instruction = f"{table.describe(here)}: {instruction}"
    lines = [dump(registers, system, instruction)]
    frames = backtrace(memory, registers, system, table)
    if len(frames) > 1:
        lines += ["backtrace:", *(f"  {frame}" for frame in frames)]
    return "\n".join(lines + problem)
