"""The two guests that write N bytes to port 0x10, and a vCPU to run them without a `Machine`.

Ring 0 of KVM on PVM is emulated by KVM itself; ring 3 runs as fast as the processor. So there is
one guest for each.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path

from measure import Unavailable

from vmexit import HostError
from vmexit.abi.kvm import KVM_GET_REGS, KVM_GET_SREGS
from vmexit.abi.kvm_structs import kvm_regs, kvm_sregs
from vmexit.accel.kvm.system import System
from vmexit.accel.kvm.vcpu import KvmVcpu
from vmexit.arch.x86.layout import FLAT_ENTRY, FLAT_LOAD_ADDRESS
from vmexit.boot import flat
from vmexit.core.bus import Bus
from vmexit.core.memory import GuestMemory
from vmexit.core.trace import ExitObserver

GUESTS = Path(__file__).resolve().parent.parent / "guests"

PORT, END_PORT = 0x10, 0xF4
COUNT_AT = 0x9000
MEMORY = 4 << 20


@dataclass(frozen=True)
class CountedGuest:
    """A guest's file, the CPU mode it starts in, and the ring it writes from."""

    name: str
    mode: str
    ring: int

    @property
    def path(self) -> Path:
        """Its image. Raises Unavailable where that was not built."""
        path = GUESTS / f"{self.name}.bin"
        if not path.exists():
            raise Unavailable(f"{path} is missing; run guests/build.py")
        return path


RING0 = CountedGuest("out-loop", "real", 0)
RING3 = CountedGuest("ring3-out", "long", 3)


def counts(quick: bool) -> list[tuple[CountedGuest, int]]:
    """The guests, and how often each is to write in a round."""
    # Where ring 3 costs most, on PVM, a round should still take less than a second.
    return [(RING0, 1_000), (RING3, 500)] if quick else [(RING0, 20_000), (RING3, 10_000)]


class Counter:
    """The least device there can be: it counts writes, as the C loop does."""

    widths = (1,)

    def __init__(self) -> None:
        self.count = 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.count += 1

    def reset(self) -> None:
        self.count = 0

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, state: dict[str, object]) -> None:
        self.count = 0


class _End(Counter):
    """Ring 3 cannot halt, so its guest writes here."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self._vcpu = vcpu

    def write(self, offset: int, size: int, value: int) -> None:
        self._vcpu.kick()


class BareVcpu:
    """A vCPU of the accelerator, `Counter` straight on its bus; it runs in the calling thread."""

    def __init__(self, guest: CountedGuest) -> None:
        self._guest = guest
        self._image = guest.path.read_bytes()
        self.counter = Counter()
        pio = Bus("port")
        with ExitStack() as stack:
            self.memory = GuestMemory([(0, MEMORY)])
            stack.callback(self.memory.close)
            try:
                system = stack.enter_context(System())
                vm = stack.enter_context(system.create_vm(self.memory, pio, Bus("MMIO")))
            except HostError as error:
                raise Unavailable(str(error)) from error
            self.vcpu = vm.create_vcpu(0)
            pio.attach(PORT, 1, self.counter)
            pio.attach(END_PORT, 1, _End(self.vcpu))
            self._closer = stack.pop_all()

    def start(self, count: int) -> None:
        """Memory and registers as at the guest's start, to count up to `count`."""
        self.counter.count = 0
        flat.load(self.memory, self._image, FLAT_LOAD_ADDRESS)
        self.memory.write_u32(COUNT_AT, count)
        entry = flat.start(self.memory, FLAT_ENTRY, self._guest.mode)
        self.vcpu.set_system_registers(entry.system)
        self.vcpu.set_registers(entry.registers)

    def another(
        self, kind: type[KvmVcpu] = KvmVcpu, observer: ExitObserver | None = None
    ) -> KvmVcpu:
        """A second object for the very same vCPU. Not for ring 3, whose end kicks the first."""
        vcpu = self.vcpu
        size = len(vcpu._pages)
        return kind(vcpu.fd, 0, size, self.memory, vcpu._pio, vcpu._mmio, observer)

    def state(self) -> bytes:
        """What kvm_loop reads: struct kvm_sregs, struct kvm_regs, the memory."""
        sregs, regs = kvm_sregs(), kvm_regs()
        ioctl(self.vcpu.fd, KVM_GET_SREGS, sregs, True)
        ioctl(self.vcpu.fd, KVM_GET_REGS, regs, True)
        return bytes(sregs) + bytes(regs) + self.memory.read(0, MEMORY)

    def close(self) -> None:
        self._closer.close()

    def __enter__(self) -> "BareVcpu":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
