"""What an accelerator offers: a `Vm` holding guest memory, and `Vcpu`s that run.

Running answers port I/O and MMIO itself, from the buses that were given, and returns only with
what is not I/O.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from vmexit.arch.x86.code import linear_ip
from vmexit.arch.x86.cpu_model import CpuModel
from vmexit.arch.x86.paging import translate
from vmexit.arch.x86.registers import EFER_LMA, Registers, SystemRegisters
from vmexit.core.bus import Bus, State
from vmexit.core.irq import VcpuInterrupts
from vmexit.core.memory import GuestMemory, Region
from vmexit.core.trace import ExitObserver


class ExitReason(Enum):
    """Why `Vcpu.run()` returned. The value is the name in traces."""

    HALT = "hlt"
    SHUTDOWN = "shutdown"  # triple fault (Intel SDM vol. 3, 6.15, interrupt 8)
    INTERNAL_ERROR = "internal_error"
    FAIL_ENTRY = "fail_entry"
    UNKNOWN = "unknown"  # the hardware exited for a reason that the accelerator does not know
    SYSTEM_EVENT = "system_event"
    DEBUG = "debug"
    IRQ_WINDOW = "irq_window"
    INTERRUPTED = "intr"  # kicked


class SystemEvent(Enum):
    """What a guest asked of its machine (KVM API 5, KVM_EXIT_SYSTEM_EVENT)."""

    POWEROFF = 1
    RESET = 2
    CRASH = 3


class PointKind(Enum):
    """What the guest does at an address where a debugger wants it to stop."""

    EXECUTE = "execute"  # it stops before the instruction
    WRITE = "write"  # behind it, for these three
    READ = "read"
    ACCESS = "access"


class Point(NamedTuple):
    """A breakpoint or watchpoint: `length` bytes at the linear address `gva`."""

    gva: int
    kind: PointKind = PointKind.EXECUTE
    length: int = 1


class Exit(NamedTuple):
    """One return of `run()`: the reason, in words what is known beyond it, and of which vCPU."""

    reason: ExitReason
    detail: str = ""
    event: SystemEvent | None = None
    vcpu: int = 0
    point: Point | None = None
    """Where it stopped, for DEBUG; None there means that a step is done."""


class Executor(Protocol):
    """What one host thread runs: a vCPU of KVM, or all vCPUs of the software CPU in turns.

    `run` is for one thread at a time; `kick` may come from any thread, at any time.
    """

    def attach_thread(self) -> None:
        """The calling thread will call `run()`, until `detach_thread()`."""
        ...

    def detach_thread(self) -> None:
        """Undo `attach_thread()`, in the same thread."""
        ...

    def run(self) -> Exit:
        """Run guest code until something happens that is not I/O.

        An access that the guest has begun is completed before this returns. Raises whatever a
        device raises; GuestCrash on an exit that is not known.
        """
        ...

    def kick(self) -> None:
        """Make `run()`, under way or the next one, return INTERRUPTED soon."""
        ...


class Vcpu(Protocol):
    """One virtual CPU.

    Registers are for whoever knows that the vCPU does not run, or for code called from within one
    of its own accesses.
    """

    index: int

    def registers(self) -> Registers:
        """General registers, RIP and RFLAGS."""
        ...

    def set_registers(self, registers: Registers) -> None:
        """Load all of what `registers()` gives."""
        ...

    def system_registers(self) -> SystemRegisters:
        """Segments, descriptor tables, control registers and EFER."""
        ...

    def set_system_registers(self, system: SystemRegisters) -> None:
        """Load all of what `system_registers()` gives."""
        ...

    def fpu(self) -> bytes:
        """x87 and SSE: what FXSAVE stores in 64-bit mode, 512 bytes (Intel SDM vol. 1, 10.5.1)."""
        ...

    def set_fpu(self, image: bytes) -> None:
        """Load what `fpu()` gives."""
        ...

    def msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Model-specific registers by index. Raises HostError naming one that cannot be read."""
        ...

    def set_msrs(self, values: Mapping[int, int]) -> list[int]:
        """Load MSRs; returns the indices of those that the accelerator refused."""
        ...

    def state(self) -> State:
        """All that the guest can tell of it, as plain versioned data, for this accelerator.

        No instruction of it is under way. Raises HostError.
        """
        ...

    def restore(self, state: State) -> None:
        """Take over what `state()` gave, of this vCPU or of another one, in any process.

        Raises ConfigError for what is no such state, or another accelerator's; HostError.
        """
        ...


class Way(Enum):
    """How an accelerator stops at a point."""

    SOFTWARE = "software"  # an INT3 in its place while the guest runs
    HARDWARE = "hardware"  # a debug register
    PORT = "port"  # an OUT in its place: for a processor that tells its KVM of neither
    STEPPING = "single-stepping"  # looking at each instruction: thousands of times as slow
    ENGINE = "engine"  # the software CPU's own


# Tells the GPA of code at a linear address that is not mapped yet, if that is known.
WhereLinked = Callable[[int], int | None]


def nowhere(gva: int) -> int | None:
    """Nothing is known of code that is not mapped."""
    return None


class Debugger(Protocol):
    """Stops vCPUs at points, or after an instruction. For whoever knows that none runs."""

    def arm(
        self,
        points: Collection[Point],
        step: int | None = None,
        only: int | None = None,
        linked: WhereLinked = nowhere,
    ) -> dict[Point, Way]:
        """For the run to come: stop at `points`, and vCPU `step` behind one instruction.

        `only` is the one vCPU that will run, if not all do. `linked` tells the GPA of code at a
        linear address that is not mapped yet. Such stops are DEBUG exits. Tells how it is done for
        each point. Raises HostError if that cannot be, and nothing is armed then.

        What stands in memory for a point may also stop a vCPU that executes this memory at another
        linear address: then its RIP is not the point's.
        """
        ...

    def disarm(self) -> None:
        """After the run: nothing stops it any more, and nothing of it is left in memory."""
        ...


class Vm(Protocol):
    """Guest memory and its vCPUs."""

    @property
    def debugger(self) -> Debugger:
        """What stops its vCPUs at points."""
        ...

    def map(self, region: Region) -> None:
        """Let the guest see `region`."""
        ...

    def create_vcpu(
        self, index: int, observer: ExitObserver | None, interrupts: VcpuInterrupts | None
    ) -> Vcpu:
        """Make vCPU number `index`; `observer`, if any, is told of each of its exits.

        With `interrupts` it takes those, and HLT waits for one; without, HLT is an exit.
        """
        ...

    def inject_nmi(self) -> None:
        """A non-maskable interrupt for each vCPU; none runs."""
        ...

    def reset_vcpus(self) -> None:
        """Each vCPU as after power-on. Raises HostError."""
        ...

    def moment(self, ago: int = 0) -> int:
        """So many nanoseconds ago, as `state()` and `restore()` want it told."""
        ...

    def state(self, moment: int) -> State:
        """What the vCPUs have in common, their time, as it was at a `moment()` not long ago."""
        ...

    def restore(self, state: State, moment: int) -> None:
        """Have `state` been the state at that moment, after the vCPUs have theirs.

        Raises ConfigError.
        """
        ...

    def start_dirty_log(self) -> None:
        """Note from now on which pages of RAM the guest writes to; it costs, so only if asked."""
        ...

    def dirty_log(self, region: Region) -> bytes:
        """The pages of `region` written since the last call, one bit each, lowest first.

        From any thread, but one at a time. What the host itself writes need not be among them.
        """
        ...

    @property
    def executors(self) -> Sequence[Executor]:
        """What is to run, each in a thread of its own."""
        ...

    def close(self) -> None:
        """Close the vCPUs, then free everything."""
        ...


class Notifier(Protocol):
    """Eventfds in place of exits and of calls, where an accelerator has them. Raises HostError."""

    def assign_ioeventfd(self, gpa: int, size: int, value: int, eventfd: int) -> None:
        """A write of `value`, `size` bytes at `gpa`, signals `eventfd`, and no device sees it."""
        ...

    def assign_irqfd(self, gsi: int, eventfd: int) -> None:
        """Each write to `eventfd` is an edge of `gsi`."""
        ...


ANY_CPU = CpuModel()
"""All that the accelerator has."""


class Accelerator(Protocol):
    """A way to execute guest code on this host."""

    name: str

    def create_vm(
        self, memory: GuestMemory, pio: Bus, mmio: Bus, cpus: int = 1, model: CpuModel = ANY_CPU
    ) -> Vm:
        """A VM for `cpus` vCPUs of this `model` over `memory`, all of which is mapped.

        Raises HostError; ConfigError for a model that cannot be.
        """
        ...

    def close(self) -> None:
        """Free everything."""
        ...


def linear_rip(vcpu: Vcpu) -> int:
    """The linear address of the next instruction of `vcpu`."""
    return linear_ip(vcpu.registers(), vcpu.system_registers())


def first_gpa(memory: GuestMemory, vcpus: Iterable[Vcpu], gva: int) -> int | None:
    """The GPA of the linear address `gva` by the first of `vcpus` that maps it.

    Outside long mode a vCPU has no addresses above 4 GiB (Intel SDM vol. 3, 3.3).
    """
    for vcpu in vcpus:
        system = vcpu.system_registers()
        if gva >= 1 << 32 and not system.efer & EFER_LMA:
            continue
        gpa = translate(memory, system, gva)
        if gpa is not None:
            return gpa
    return None
