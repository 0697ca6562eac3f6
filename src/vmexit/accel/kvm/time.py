"""The time of a VM: the clock that guests know as kvm-clock, and the TSCs of its vCPUs."""

import ctypes
import os
import struct
import time
from collections.abc import Callable, Sequence
from fcntl import ioctl

from vmexit.abi.kvm import KVM_GET_MSRS
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
from vmexit.accel.kvm import msrs
from vmexit.accel.kvm.system import System
from vmexit.accel.kvm.vcpu import KvmVcpu
from vmexit.core.bus import State
from vmexit.core.errors import HostError
from vmexit.core.saved import Saved

_WORD = (1 << 64) - 1
_IA32_TSC, _IA32_TSC_DEADLINE = 0x10, 0x6E0
_VERSION = 2
_CLOCK_SIZE = ctypes.sizeof(kvm_clock_data)
_CLOCK = struct.Struct(f"=Q{_CLOCK_SIZE - 8}x")  # the rest is flags, and what they say is there


# An ioctl that lets other threads of Python run comes back as late as they please, and what was
# read is old by then: so one that does not.
_ioctl = ctypes.PyDLL(None, use_errno=True).ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_SOON, _TRIES = 20_000, 10  # nanoseconds

# The host's counter was so much at that moment, by its frequency in kHz. So soon afterwards it is
# what the frequency says, to some microseconds: the host's clock is slewed by 500 ppm at most.
_host: dict[int, tuple[int, int]] = {}
_FRESH = 10_000_000  # nanoseconds


def _at_once(fd: int, request: int, prepare: Callable[[int], bytearray]) -> tuple[bytearray, int]:
    """Make a request with what `prepare(now)` gives; the answer, and when that was.

    Again, if something came between. Raises HostError.
    """
    for _ in range(_TRIES):
        before = time.monotonic_ns()
        buffer = prepare(before)
        place = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        failed = _ioctl(fd, request, ctypes.addressof(place)) < 0
        after = time.monotonic_ns()
        if failed:
            why = os.strerror(ctypes.get_errno())
            raise HostError(f"KVM refused to tell or set a clock: {why}; use --accel soft")
        if after - before < _SOON:
            break
    return buffer, (before + after) // 2


class VmTime:
    """What this KVM can tell of it is found out once."""

    def __init__(self, system: System, vm: int, vcpus: Sequence[KvmVcpu]) -> None:
        """`vm` is the descriptor; `vcpus` are all that there will be."""
        self._vm = vm
        self._vcpus = vcpus
        self._has_clock = bool(system.check_extension(KVM_CAP_ADJUST_CLOCK))
        offsets = [_TscOffset(vcpu) for vcpu in vcpus]
        self._offsets = offsets if offsets[0].exists() else None

    def save(self, moment: int) -> State:
        """What they showed at `moment`, in nanoseconds on the host's monotonic clock."""
        clock: int | None = None
        if self._has_clock:
            buffer, now = _at_once(self._vm, KVM_GET_CLOCK, lambda now: bytearray(_CLOCK_SIZE))
            clock = max(kvm_clock_data.from_buffer(buffer).clock - (now - moment), 0)
        tsc: list[int] | None = None
        if self._offsets is not None:
            then = _host_tsc(self._vcpus[0], self._offsets[0], moment)
            tsc = [offset.get() + then & _WORD for offset in self._offsets]
        wanted = [vcpu.msrs_that_exist((_IA32_TSC_DEADLINE,)) for vcpu in self._vcpus]
        deadlines = [found.get(_IA32_TSC_DEADLINE, 0) for found in wanted]
        return {"version": _VERSION, "clock": clock, "tsc": tsc, "deadlines": deadlines}

    def load(self, state: State, moment: int) -> None:
        """They go on from there: the time from the saving until `moment` has not passed.

        The TSCs of vCPUs stay as far apart as they were. Raises ConfigError.
        """
        vcpus = self._vcpus
        saved = Saved(state, "a VM of KVM", _VERSION)
        clock = saved.optional("clock", _WORD >> 1)
        tsc = None if state.get("tsc", 0) is None else saved.numbers("tsc", _WORD, len(vcpus))
        deadlines = saved.numbers("deadlines", _WORD, len(vcpus))
        if tsc is not None and self._offsets is not None:
            then = _host_tsc(vcpus[0], self._offsets[0], moment)
            for number, deadline in enumerate(deadlines):
                self._offsets[number].set(tsc[number] - then & _WORD)
                if deadline:  # it was armed by another counter
                    vcpus[number].set_msrs({_IA32_TSC_DEADLINE: deadline})
        if clock is not None and self._has_clock:
            begin = clock - moment
            _at_once(
                self._vm,
                KVM_SET_CLOCK,
                lambda now: bytearray(_CLOCK.pack(begin + now)),
            )


def _host_tsc(vcpu: KvmVcpu, offset: "_TscOffset", moment: int) -> int:
    """The host's counter at `moment`, at the rate of the guest's."""
    khz = vcpu.tsc_khz()
    counter, then = _host.get(khz, (0, -_FRESH))
    if not then <= time.monotonic_ns() < then + _FRESH:
        asked = msrs.pack({_IA32_TSC: 0})
        buffer, then = _at_once(vcpu.fd, KVM_GET_MSRS, lambda now: msrs.request(asked))
        counter = msrs.answer(buffer)[_IA32_TSC] - offset.get()
        if khz:
            _host[khz] = counter, then
    return counter + (moment - then) * khz // 1_000_000 & _WORD


class _TscOffset:
    """How far the TSC of a vCPU is ahead of the host's counter (devices/vcpu.rst, 4)."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self._vcpu = vcpu
        self._word = ctypes.c_uint64()
        self._request = bytes(
            kvm_device_attr(
                group=KVM_VCPU_TSC_CTRL,
                attr=KVM_VCPU_TSC_OFFSET,
                addr=ctypes.addressof(self._word),
            )
        )

    def exists(self) -> bool:
        """Whether this KVM can tell."""
        try:
            ioctl(self._vcpu.fd, KVM_HAS_DEVICE_ATTR, self._request)
        except OSError:
            return False
        return True

    def get(self) -> int:
        """Modulo 2^64."""
        ioctl(self._vcpu.fd, KVM_GET_DEVICE_ATTR, self._request)
        return self._word.value

    def set(self, value: int) -> None:
        """The same."""
        self._word.value = value
        ioctl(self._vcpu.fd, KVM_SET_DEVICE_ATTR, self._request)
