"""What CPUID says on the software CPU.

The engine's own answers are those of a Haswell, whose vulnerabilities an emulator does not have
and whose timers it does not offer. A guest kernel that believed them would guard every system call
against them. So the family and model are those of an Intel processor that does not speculate, an
Atom of the Bonnell kind, with the instructions that the engine knows.
"""

import ctypes
import time
from typing import TYPE_CHECKING

from vmexit.accel.base import ANY_CPU
from vmexit.accel.soft.native import Library
from vmexit.arch.x86.cpu_model import CpuModel

if TYPE_CHECKING:
    from vmexit.arch.x86.cpuid import Table

_VENDOR = b"GenuineIntel"
_SIGNATURE = b"vmexitvmexit"
_BRAND = b"vmexit software CPU".ljust(48, b"\0")

_BONNELL = 0x106CA  # family 6, model 0x1c, stepping 10
_MAX_LEAF = 0x16
_HYPERVISOR = 0x4000_0000
_EXTENDED, _MAX_EXTENDED = 0x8000_0000, 0x8000_0008

# Leaf 1, ECX: XSAVE, OSXSAVE, AVX and F16C (no XSAVE state is kept), x2APIC, TSC deadline and PCID
# (no MSR or control register behind them).
_NOT_1_ECX = 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 21 | 1 << 24 | 1 << 17
_HYPERVISOR_BIT = 1 << 31
# Leaf 1, EDX: machine check and MTRRs, whose MSRs do nothing; the APIC where there is one; HTT.
_NOT_1_EDX = 1 << 7 | 1 << 14 | 1 << 12
_APIC_BIT, _HTT_BIT = 1 << 9, 1 << 28
# Leaf 7, EBX: FSGSBASE, BMI1, SMEP, BMI2, ERMS and ADX are all that is known to work.
_ONLY_7_EBX = 1 << 0 | 1 << 3 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 19
_INVARIANT_TSC = 1 << 8
_WITH_SUBLEAVES, _MAX_SUBLEAVES = (4, 7, 0xB), 4

CRYSTAL_HZ = 25_000_000
"""The clock that leaf 0x15 speaks of, and which drives the timers of the LAPICs."""

Registers = tuple[int, int, int, int]  # eax, ebx, ecx, edx

_ZERO: Registers = (0, 0, 0, 0)


class Cpuid:
    """The CPUID instruction of one VM."""

    def __init__(self, library: Library, state: int, cpus: int, model: CpuModel) -> None:
        """`state` is the engine's CPUX86State. Raises ConfigError for a model that cannot be."""
        self._library = library
        self._state = state
        self._cpus = cpus
        self._results = (ctypes.c_uint32 * 4)()
        self._addresses = [
            ctypes.cast(ctypes.byref(self._results, 4 * i), ctypes.POINTER(ctypes.c_uint32))
            for i in range(4)
        ]
        self._first = self._sample()
        self._tsc_khz = 0
        self._model = ANY_CPU
        if model.required:
            model.require(self.table(0, True), "the software CPU")
            self._tsc_khz = 0  # measured over too short a time
        self._model = model

    def _native(self, leaf: int, subleaf: int) -> Registers:
        self._library.cpuid(self._state, leaf, subleaf, *self._addresses)
        a, b, c, d = self._results
        return a, b, c, d

    def _sample(self) -> tuple[int, int]:
        """The TSC, which is the host's, and nanoseconds at the same moment."""
        before = time.monotonic_ns()
        tsc: int = self._library.get_tsc(self._state)
        return tsc, (before + time.monotonic_ns()) // 2

    def tsc_khz(self) -> int:
        """The frequency of the TSC, measured from the making of the VM to the first question."""
        if not self._tsc_khz:
            (tsc0, time0), (tsc, now) = self._first, self._sample()
            self._tsc_khz = (tsc - tsc0) * 1_000_000 // max(now - time0, 1)
        return self._tsc_khz

    @property
    def known_khz(self) -> int:
        """That frequency if somebody has asked for it, else 0. A machine that goes on elsewhere
        tells it once more.
        """
        return self._tsc_khz

    @known_khz.setter
    def known_khz(self, value: int) -> None:
        self._tsc_khz = value

    def query(self, leaf: int, subleaf: int, cpu: int, apic: bool) -> Registers:
        """The answer for vCPU number `cpu`, which has a LAPIC or not (Intel SDM vol. 2, CPUID)."""
        answer = self._query(leaf, subleaf, cpu, apic)
        if self._model.left_out:
            from vmexit.arch.x86.cpuid import Leaf

            key = leaf, subleaf if leaf in _WITH_SUBLEAVES else None
            answer = self._model.without({key: Leaf(*answer)})[key]
        return answer

    def table(self, cpu: int, apic: bool) -> "Table":
        """All leaves that are not zero."""
        from vmexit.arch.x86.cpuid import Leaf

        leaves = [*range(_MAX_LEAF + 1), _HYPERVISOR, *range(_EXTENDED, _MAX_EXTENDED + 1)]
        table: Table = {}
        for leaf in leaves:
            for subleaf in range(_MAX_SUBLEAVES if leaf in _WITH_SUBLEAVES else 1):
                answer = Leaf(*self.query(leaf, subleaf, cpu, apic))
                if any(answer):
                    table[leaf, subleaf if leaf in _WITH_SUBLEAVES else None] = answer
        return table

    def _query(self, leaf: int, subleaf: int, cpu: int, apic: bool) -> Registers:
        if leaf >= _EXTENDED:
            return self._extended(leaf)
        if leaf >= _HYPERVISOR:
            # The highest leaf of this range, and who speaks (the convention of hypervisors).
            return (_HYPERVISOR, *_words(_SIGNATURE)) if leaf == _HYPERVISOR else _ZERO
        return self._basic(leaf, subleaf, cpu, apic)

    def _basic(self, leaf: int, subleaf: int, cpu: int, apic: bool) -> Registers:
        siblings = (self._cpus - 1).bit_length()  # bits of the APIC id below the package's
        if leaf == 0:
            b, c, d = _words(_VENDOR)
            return _MAX_LEAF, b, d, c
        if leaf == 1:
            _, b, c, d = self._native(1, 0)
            b = b & 0xFFFF | cpu << 24
            d = d & ~(_NOT_1_EDX | _APIC_BIT | _HTT_BIT) | (_APIC_BIT if apic else 0)
            if self._cpus > 1:
                b |= (1 << siblings) << 16
                d |= _HTT_BIT
            return _BONNELL, b, c & ~_NOT_1_ECX | _HYPERVISOR_BIT, d
        if leaf == 4:
            a, b, c, d = self._native(4, subleaf)
            return (a & 0x3FFF | (1 << siblings) - 1 << 26 if a else 0), b, c, d
        if leaf == 7:
            a, b, c, d = self._native(7, subleaf) if subleaf == 0 else _ZERO
            return 0, b & _ONLY_7_EBX, 0, 0
        if leaf == 0xB:
            levels = ((0, 1, 1), (siblings, self._cpus, 2))  # shift, logical processors, type
            if subleaf >= len(levels):
                return 0, 0, subleaf, cpu
            shift, count, kind = levels[subleaf]
            return shift, count, kind << 8 | subleaf, cpu
        if leaf == 0x15:
            return (*_ratio(self.tsc_khz()), CRYSTAL_HZ, 0)
        if leaf == 0x16:
            megahertz = self.tsc_khz() // 1000
            return megahertz, megahertz, CRYSTAL_HZ // 1_000_000, 0
        if leaf in (2, 6):
            return self._native(leaf, subleaf)
        return _ZERO

    def _extended(self, leaf: int) -> Registers:
        if leaf == _EXTENDED:
            return _MAX_EXTENDED, 0, 0, 0
        if leaf == 0x8000_0001:
            _, _, c, d = self._native(leaf, 0)
            return 0, 0, c, d
        if 0x8000_0002 <= leaf <= 0x8000_0004:
            at = 16 * (leaf - 0x8000_0002)
            a, b, c = _words(_BRAND[at : at + 12])
            return a, b, c, int.from_bytes(_BRAND[at + 12 : at + 16], "little")
        if leaf == 0x8000_0007:
            return 0, 0, 0, _INVARIANT_TSC
        if leaf in (0x8000_0006, _MAX_EXTENDED):
            a, b, c, d = self._native(leaf, 0)
            return (a, 0, 0, 0) if leaf == _MAX_EXTENDED else (0, 0, c, 0)
        return _ZERO


def _ratio(tsc_khz: int) -> tuple[int, int]:
    """Denominator and numerator of the TSC's frequency to the crystal's, within a few ppm.

    As large as possible, but Linux multiplies the numerator and kHz of the crystal in 32 bits.
    """
    crystal_khz = CRYSTAL_HZ // 1000
    denominator = max(((1 << 32) - crystal_khz) // max(tsc_khz, 1), 1)
    return denominator, round(tsc_khz * denominator / crystal_khz)


def _words(text: bytes) -> tuple[int, int, int]:
    a, b, c = (int.from_bytes(text[i : i + 4], "little") for i in (0, 4, 8))
    return a, b, c
