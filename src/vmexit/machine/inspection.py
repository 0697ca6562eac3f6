"""Looking into a machine: its memory by address of either kind, symbols, backtraces."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from vmexit.accel.base import Vcpu
from vmexit.arch.x86.code import read_linear
from vmexit.arch.x86.paging import translate
from vmexit.core.errors import ConfigError, GuestAddressError
from vmexit.core.memory import PAGE_SIZE, GuestMemory
from vmexit.core.symbols import SymbolTable
from vmexit.machine import report
from vmexit.machine.backtrace import Frame, backtrace
from vmexit.machine.config import MachineConfig


class Inspection(ABC):
    """What `Machine` offers for that; all of it while no vCPU runs, or from within an access."""

    config: MachineConfig
    _symbols: SymbolTable | None = None

    @property
    @abstractmethod
    def memory(self) -> GuestMemory:
        """Guest physical memory: `vm.memory[gpa:end]`, `vm.memory.read_u32(gpa)`, …"""

    @abstractmethod
    def _vcpus(self) -> Sequence[Vcpu]: ...

    @abstractmethod
    def require_still(self, vcpu: int | None = None) -> None:
        """Raises VmexitError unless no vCPU runs, or the caller is within an access of `vcpu`."""

    def _vcpu(self, vcpu: int) -> Vcpu:
        """That vCPU. Raises ConfigError if there is none."""
        vcpus = self._vcpus()
        if not 0 <= vcpu < len(vcpus):
            raise ConfigError(f"there is no vCPU {vcpu}; there are {len(vcpus)}, from 0 on")
        return vcpus[vcpu]

    def translate(self, gva: int, vcpu: int = 0) -> int | None:
        """The GPA of guest virtual address `gva` by the page tables of `vcpu`; None if unmapped.

        From a GPA, `memory.hva(gpa)` leads on to the host virtual address.
        """
        self.require_still(vcpu)
        return translate(self.memory, self._vcpu(vcpu).system_registers(), gva)

    def read_virtual(self, gva: int, size: int, vcpu: int = 0) -> bytes:
        """Up to `size` bytes at guest virtual address `gva`; fewer where no memory is mapped."""
        self.require_still(vcpu)
        return read_linear(self.memory, self._vcpu(vcpu).system_registers(), gva, size)

    def write_virtual(self, gva: int, data: bytes, vcpu: int = 0) -> None:
        """Write `data` at guest virtual address `gva`, whatever its pages allow the guest.

        Raises GuestAddressError, with nothing written, where no memory is mapped.
        """
        self.require_still(vcpu)
        pieces = list(self._pieces(gva, len(data), vcpu))
        for gpa, start, end in pieces:
            self.memory.write(gpa, data[start:end])

    def _pieces(self, gva: int, size: int, vcpu: int) -> Iterator[tuple[int, int, int]]:
        system = self._vcpu(vcpu).system_registers()
        start = 0
        while start < size:
            at = gva + start
            end = min(size, start + PAGE_SIZE - at % PAGE_SIZE)
            gpa = translate(self.memory, system, at)
            if gpa is None:
                raise GuestAddressError(f"nothing is mapped at {at:#x}; use another address")
            self.memory.region(gpa, end - start)
            yield gpa, start, end
            start = end

    @property
    def symbols(self) -> SymbolTable:
        """Names for addresses, read at the first use: `vm.symbols.address("start_kernel")`.

        From the file `symbols` that the machine was made with: an ELF file, a System.map, or a
        Linux kernel, which carries its own. Without one, from the kernel's symbol table if it is an
        ELF file that has one; else empty. Raises ImageError if the file has none.
        """
        if self._symbols is None:
            self._symbols = report.read_symbols(self.config)
        return self._symbols

    def backtrace(self, vcpu: int = 0, limit: int = 32) -> list[Frame]:
        """Where `vcpu` is and through which calls it came there, the innermost first.

        By the guest's frame pointers; where there are none, by what on the stack looks like a
        return address, if there are symbols. Raises ImageError for a bad file of symbols.
        """
        self.require_still(vcpu)
        one = self._vcpu(vcpu)
        return backtrace(self.memory, one.registers(), one.system_registers(), self.symbols, limit)

    def dump(self, vcpu: int = 0) -> str:
        """All registers, the next instruction and the calls that led there, as text."""
        self.require_still(vcpu)
        one = self._vcpu(vcpu)
        return report.describe(
            self.memory, one.registers(), one.system_registers(), lambda: self.symbols
        )
