"""KVM's log of the pages of a memory slot that the guest has written to (KVM API 4.8, 4.116)."""

import ctypes
from fcntl import ioctl

from vmexit.abi.kvm import (
    KVM_CLEAR_DIRTY_LOG,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_GET_DIRTY_LOG,
)
from vmexit.abi.kvm_caps import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
from vmexit.abi.kvm_state import KVM_ENABLE_CAP, kvm_enable_cap
from vmexit.abi.kvm_structs import kvm_clear_dirty_log, kvm_dirty_log
from vmexit.core.errors import HostError
from vmexit.core.steps import Steps


def enable(vm: int, capability: int, argument: int) -> None:
    """KVM_ENABLE_CAP for a VM (KVM API 4.37). Raises OSError."""
    request = kvm_enable_cap(cap=capability)
    request.args[0] = argument
    ioctl(vm, KVM_ENABLE_CAP, bytes(request))


def empty_bitmap(pages: int) -> bytearray:
    """A bit for each page, in words of 64 bits, as KVM has them."""
    return bytearray(-(-pages // 64) * 8)


def keep_marks(vm: int) -> None:
    """Have reading the logs of this VM leave them as they are. Raises HostError."""
    try:
        enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    except OSError as error:
        raise HostError(
            f"KVM refused to log what is written: {error.strerror}; use --accel soft"
        ) from error


class SlotLog:
    """That of one slot, which was mapped with KVM_MEM_LOG_DIRTY_PAGES."""

    def __init__(self, vm: int, slot: int, pages: int, *, kept: bool) -> None:
        """`kept`: see `keep_marks()`; where KVM lacks that, reading is forgetting."""
        self._vm = vm
        self._bitmap = empty_bitmap(pages)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._bitmap))
        self._get = bytearray(kvm_dirty_log(slot=slot, dirty_bitmap=address))
        self._read = Steps()
        self._read.call(vm, KVM_GET_DIRTY_LOG, self._get)
        self._clear: bytes | None = None
        if kept:
            clear = kvm_clear_dirty_log(slot=slot, num_pages=pages, dirty_bitmap=address)
            self._clear = bytes(clear)

    def read(self) -> bytearray:
        """A bit for each page that was written since it was forgotten, the lowest first.

        It may be changed, and is good until the next call. Raises HostError.
        """
        if not self._read.run():
            self._ask(KVM_GET_DIRTY_LOG, self._get)  # for what KVM says
        return self._bitmap

    def forget(self) -> None:
        """The pages that `read()` has given are logged when they are written again."""
        if self._clear is not None:
            self._ask(KVM_CLEAR_DIRTY_LOG, self._clear)

    def _ask(self, request: int, data: bytes | bytearray) -> None:
        try:
            ioctl(self._vm, request, data)
        except OSError as error:
            raise HostError(
                f"KVM does not tell what was written: {error.strerror}; make a new machine"
            ) from error
