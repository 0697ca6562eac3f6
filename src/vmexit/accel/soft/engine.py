"""The software accelerator and its VMs: one Unicorn engine over the guest's own memory."""

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmexit.accel.base import ANY_CPU, Executor
from vmexit.accel.soft.native import UNICORN_VERSION, Engine, Library
from vmexit.accel.soft.processor import Processor
from vmexit.accel.soft.scheduler import Scheduler
from vmexit.accel.soft.vcpu import SoftVcpu
from vmexit.arch.x86.cpu_model import CpuModel
from vmexit.arch.x86.layout import PHYSICAL_END
from vmexit.core.bus import Bus, State
from vmexit.core.errors import HostError
from vmexit.core.irq import VcpuInterrupts
from vmexit.core.memory import GuestMemory, Region
from vmexit.core.saved import Saved
from vmexit.core.trace import ExitObserver

_WORD = (1 << 64) - 1
_MOST_KHZ = (1 << 32) - 1

if TYPE_CHECKING:
    from vmexit.accel.soft.debug import SoftDebugger
    from vmexit.accel.soft.page_sums import PageSums
    from vmexit.arch.x86.cpuid import Table


class SoftAccelerator:
    """Unicorn, loaded. Raises HostError if it is missing or not the release that is known."""

    name = "soft"

    def __init__(self) -> None:
        try:
            import unicorn  # GPL-2.0, and 40 ms: only those who use it load it
        except ImportError as error:
            raise HostError(
                f"the software accelerator needs Unicorn: pip install unicorn=={UNICORN_VERSION}"
            ) from error
        if unicorn.__version__ != UNICORN_VERSION:
            raise HostError(
                f"Unicorn {unicorn.__version__} is installed, but vmexit knows {UNICORN_VERSION} "
                f"only: pip install unicorn=={UNICORN_VERSION}"
            )
        from unicorn.unicorn_py3.unicorn import uclib

        try:
            self._native = Library(uclib._name)
        except (AttributeError, OSError) as error:
            raise HostError(
                f"this build of Unicorn is not the one that is known ({error}): "
                f"pip install --force-reinstall unicorn=={UNICORN_VERSION}"
            ) from error

    def create_vm(
        self, memory: GuestMemory, pio: Bus, mmio: Bus, cpus: int = 1, model: CpuModel = ANY_CPU
    ) -> "SoftVm":
        """A VM whose engine sees the pages of `memory` themselves."""
        return SoftVm(self._native, memory, pio, mmio, cpus, model)

    def close(self) -> None:
        """Nothing is held."""


# What Unicorn maps for the code that it translates.
_CODE_BUFFER = 1 << 30
_SLACK = 64 << 20  # and what else it needs


def _require_code_buffer() -> None:
    """Raises HostError where Unicorn could not map its code buffer: it would end the process."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        mmap.mmap(-1, _CODE_BUFFER + _SLACK, flags=flags, prot=protection).close()
    except OSError as error:
        raise HostError(
            f"cannot map {_CODE_BUFFER >> 20} MiB for translated code: {error.strerror}; "
            "raise the limit (ulimit -v), or use --accel kvm"
        ) from error


class SoftVm:
    """One Unicorn engine, and the vCPUs that take turns on it."""

    def __init__(
        self,
        library: Library,
        memory: GuestMemory,
        pio: Bus,
        mmio: Bus,
        cpus: int,
        model: CpuModel,
    ) -> None:
        import unicorn

        self._memory = memory
        self._vcpus: list[SoftVcpu] = []
        self._page_sums: PageSums | None = None
        # 64-bit mode for every mode: the engine then knows all of the instruction set, and the
        # CPU state says what the guest may use of it.
        _require_code_buffer()
        self._engine: Engine | None = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        # No address ends the run: the guest's own HLT does.
        self._engine.ctl_exits_enabled(True)
        self._engine.ctl_set_exits([])
        for region in memory.regions:
            self.map(region)
        self._processor = Processor(
            library, self._engine, memory, pio, mmio, list(self._holes()), cpus, model
        )
        self._scheduler = Scheduler(self._processor, self._vcpus)
        self._debugger: SoftDebugger | None = None

    def map(self, region: Region) -> None:
        """Let the engine see `region` at its GPA: the same pages, no copy."""
        import unicorn

        assert self._engine is not None
        access = unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC
        if not region.readonly:
            access |= unicorn.UC_PROT_WRITE
        try:
            self._engine.mem_map_ptr(region.gpa, region.size, unicorn.UC_PROT_ALL, region.hva)
            # Mapping without write access lets a handled write through; protecting drops it.
            self._engine.mem_protect(region.gpa, region.size, access)
        except unicorn.UcError as error:
            raise HostError(
                f"Unicorn refused the memory {region.gpa:#x}..{region.end - 1:#x}: {error}; "
                "use less --memory"
            ) from error

    def create_vcpu(
        self,
        index: int,
        observer: ExitObserver | None = None,
        interrupts: VcpuInterrupts | None = None,
    ) -> SoftVcpu:
        """One more vCPU; with `interrupts` it takes those, and HLT waits for one."""
        vcpu = SoftVcpu(self._processor, index, interrupts, observer)
        self._vcpus.append(vcpu)
        return vcpu

    def inject_nmi(self) -> None:
        """A non-maskable interrupt for each vCPU; none runs."""
        for vcpu in self._vcpus:
            vcpu.nmi = True

    def reset_vcpus(self) -> None:
        """Each vCPU as after power-on."""
        for vcpu in self._vcpus:
            vcpu.power_on()

    def moment(self, ago: int = 0) -> int:
        """The time stamp counter of the host."""
        ticks = ago * self._processor.host_khz // 1_000_000 if ago else 0
        return self._processor.host_tsc - ticks

    def state(self, moment: int) -> State:
        """The TSC of each vCPU, and their frequency."""
        values = []
        for vcpu in self._vcpus:
            self._processor.select(vcpu)
            values.append(self._processor.tsc_offset + moment & _WORD)
        return {"version": 2, "tsc": values, "tsc_khz": self._processor.tsc_khz}

    def restore(self, state: State, moment: int) -> None:
        saved = Saved(state, "the software CPU", 2)
        values = saved.numbers("tsc", _WORD, len(self._vcpus))
        self._processor.tsc_khz = saved.number("tsc_khz", _MOST_KHZ)
        for vcpu, value in zip(self._vcpus, values, strict=True):
            self._processor.select(vcpu)
            self._processor.tsc_offset = value - moment & _WORD

    @property
    def debugger(self) -> "SoftDebugger":
        """What stops its vCPUs at points."""
        if self._debugger is None:
            from vmexit.accel.soft.debug import SoftDebugger

            self._debugger = SoftDebugger(
                self._processor, self._scheduler, self._vcpus, self._memory
            )
        return self._debugger

    def start_dirty_log(self) -> None:
        """Note which pages of RAM change; what writes the same bytes again is not seen."""
        from vmexit.accel.soft.page_sums import PageSums

        self._page_sums = PageSums(self._memory)

    def dirty_log(self, region: Region) -> bytes:
        """The pages of `region` that have changed since the last call, one bit each."""
        assert self._page_sums is not None
        return self._page_sums.changed(region)

    @property
    def executors(self) -> list[Executor]:
        """The one thread that runs all vCPUs."""
        return [self._scheduler]

    @property
    def current(self) -> int:
        """The number of the vCPU whose turn it is: the one that makes an access."""
        return self._scheduler.current

    def cpuid(self, index: int) -> "Table":
        """What vCPU `index` says of itself."""
        return self._processor.cpuid(index)

    def attention(self) -> None:
        """The interrupt controller has news for some vCPU; from any thread."""
        self._scheduler.attention()

    def _holes(self) -> Iterator[tuple[int, int]]:
        """`(gpa, size)` of what is not memory: there the MMIO bus answers."""
        at = 0
        for region in self._memory.regions:
            if region.gpa > at:
                yield at, region.gpa - at
            at = region.end
        if at < PHYSICAL_END:
            yield at, PHYSICAL_END - at

    def close(self) -> None:
        """Free the vCPUs, then the engine."""
        self._processor.close()
        self._vcpus.clear()
        self._engine = None  # its finalizer frees it: uc_close
