"""Guest memory as it is, by physical or by virtual addresses."""

from vmexit.control.sink import Sink
from vmexit.core.errors import GuestAddressError, VmexitError
from vmexit.core.memory import PAGE_SIZE
from vmexit.machine.machine import Machine

_MASK = (1 << 64) - 1


def _nothing_there(at: int, size: int) -> VmexitError:
    return VmexitError(f"Invalid addr 0x{at:016x}/size {size} specified; no memory is there")


def check_vcpu(vm: Machine, vcpu: int) -> None:
    """Raises VmexitError for a number that no vCPU has."""
    if not 0 <= vcpu < len(vm.vcpus):
        raise VmexitError("Parameter 'cpu-index' expects a CPU number")


def _check_size(size: int) -> None:
    if size < 0:
        raise VmexitError("Parameter 'size' expects a size")


def save_physical(vm: Machine, gpa: int, size: int, sink: Sink) -> None:
    """The `size` bytes at `gpa`, from one moment. Raises VmexitError where there is no memory."""
    _check_size(size)
    with vm.paused():
        while size:
            try:
                region = vm.memory.region(gpa)
            except GuestAddressError as error:
                raise _nothing_there(gpa, size) from error
            piece = min(size, region.end - gpa)
            sink.write(region.part(gpa, piece))
            gpa, size = gpa + piece, size - piece


def save_virtual(vm: Machine, vcpu: int, gva: int, size: int, sink: Sink) -> None:
    """The `size` bytes at `gva`, a linear address of `vcpu`; raises VmexitError likewise."""
    _check_size(size)
    check_vcpu(vm, vcpu)
    gva &= _MASK
    with vm.paused():
        while size:
            piece = min(size, PAGE_SIZE - gva % PAGE_SIZE)
            data = vm.read_virtual(gva, piece, vcpu)
            if len(data) < piece:
                raise _nothing_there(gva, size)
            sink.write(data)
            gva, size = gva + piece & _MASK, size - piece
