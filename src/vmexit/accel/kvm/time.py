"""The time of a VM: the clock that guests know as kvm-clock, and the TSCs of its vCPUs."""

import ctypes
import time
from collections.abc import Sequence
from fcntl import ioctl

from vmexit.abi.kvm_caps import KVM_CAP_ADJUST_CLOCK
from vmexit.abi.kvm_irq import KVM_GET_CLOCK, KVM_SET_CLOCK, kvm_clock_data
from vmexit.abi.kvm_state import (
    KVM_GET_DEVICE_ATTR,
    KVM_HAS_DEVICE_ATTR,
    KVM_SET_DEVICE_ATTR,
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    kvm_device_attr,
)
from vmexit.accel.kvm.system import System
from vmexit.accel.kvm.vcpu import KvmVcpu
from vmexit.core.bus import State
from vmexit.core.saved import Saved

_WORD = (1 << 64) - 1
_IA32_TSC = 0x10
_VERSION = 2


def save(system: System, vm: int, vcpus: Sequence[KvmVcpu], moment: int) -> State:
    """What they showed at `moment`, in nanoseconds on the host's monotonic clock."""
    clock: int | None = None
    if system.check_extension(KVM_CAP_ADJUST_CLOCK):
        buffer = bytearray(ctypes.sizeof(kvm_clock_data))
        ioctl(vm, KVM_GET_CLOCK, buffer, True)
        clock = kvm_clock_data.from_buffer(buffer).clock - (time.monotonic_ns() - moment)
        clock = max(clock, 0)
    tsc: list[int] | None = None
    if _has_offset(vcpus):
        then = _host_tsc(vcpus[0], moment)
        tsc = [_offset(vcpu) + then & _WORD for vcpu in vcpus]
    return {"version": _VERSION, "clock": clock, "tsc": tsc}


def load(system: System, vm: int, vcpus: Sequence[KvmVcpu], state: State, moment: int) -> None:
    """They go on from there: the time from the saving until `moment` has not passed.

    The TSCs of vCPUs stay as far apart as they were. Raises ConfigError.
    """
    saved = Saved(state, "a VM of KVM", _VERSION)
    clock = saved.optional("clock", _WORD >> 1)
    tsc = None if state.get("tsc", 0) is None else saved.numbers("tsc", _WORD, len(vcpus))
    if tsc is not None and _has_offset(vcpus):
        then = _host_tsc(vcpus[0], moment)
        for vcpu, value in zip(vcpus, tsc, strict=True):
            _set_offset(vcpu, value - then & _WORD)
    if clock is not None and system.check_extension(KVM_CAP_ADJUST_CLOCK):
        clock += time.monotonic_ns() - moment
        ioctl(vm, KVM_SET_CLOCK, bytes(kvm_clock_data(clock=clock)))


def _host_tsc(vcpu: KvmVcpu, moment: int) -> int:
    """The host's counter at `moment`, at the rate of the guest's."""
    now = vcpu.msrs((_IA32_TSC,))[_IA32_TSC]
    passed = time.monotonic_ns() - moment
    return now - _offset(vcpu) - passed * vcpu.tsc_khz() // 1_000_000 & _WORD


def _has_offset(vcpus: Sequence[KvmVcpu]) -> bool:
    """Whether this KVM can tell the offset (Documentation/virt/kvm/devices/vcpu.rst, 4)."""
    try:
        _attribute(vcpus[0], KVM_HAS_DEVICE_ATTR, 0)
    except OSError:
        return False
    return True


def _offset(vcpu: KvmVcpu) -> int:
    """By how much its TSC is ahead of the host's counter, modulo 2^64."""
    return _attribute(vcpu, KVM_GET_DEVICE_ATTR, 0)


def _set_offset(vcpu: KvmVcpu, value: int) -> None:
    _attribute(vcpu, KVM_SET_DEVICE_ATTR, value)


def _attribute(vcpu: KvmVcpu, request: int, value: int) -> int:
    word = ctypes.c_uint64(value)
    attribute = kvm_device_attr(
        group=KVM_VCPU_TSC_CTRL, attr=KVM_VCPU_TSC_OFFSET, addr=ctypes.addressof(word)
    )
    ioctl(vcpu.fd, request, bytes(attribute))
    return word.value
