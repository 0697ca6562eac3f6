"""The time of a VM: the clock that guests know as kvm-clock, and the TSCs of its vCPUs."""

import ctypes
from collections.abc import Sequence
from fcntl import ioctl
from time import monotonic_ns
from typing import NamedTuple

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
from vmexit.core.known import Known
from vmexit.core.saved import Saved
from vmexit.core.steps import Steps

_WORD = (1 << 64) - 1
IA32_TSC, IA32_TSC_DEADLINE = 0x10, 0x6E0
_VERSION = 2
_CLOCK_SIZE = ctypes.sizeof(kvm_clock_data)
_SOON, _TRIES = 20_000, 10  # nanoseconds

# The host's counter was so much at that moment, by its frequency in kHz. So soon afterwards it is
# what the frequency says, to some microseconds: the host's clock is slewed by 500 ppm at most.
_host: dict[int, tuple[int, int]] = {}
_FRESH = 10_000_000  # nanoseconds


# By the path of the KVM, whether it tells offsets, and whether it keeps those that it is given. One
# that does not, since its guests see the host's counter, is not told any more.
_has_offsets: dict[str, bool] = {}
_keeps_offsets: dict[str, bool] = {}


class _Prompt:
    """A request that is made at once, with the buffer that it reads and fills in."""

    def __init__(self, fd: int, request: int, buffer: bytearray, result: int = 0) -> None:
        self._fd = fd
        self._request = request
        self._result = result
        self.buffer = buffer
        self._words = memoryview(buffer).cast("Q")
        self._steps = Steps()  # which lets no other thread of Python come between
        self._steps.call(fd, request, buffer, result)

    def make(self, ahead: int | None = None) -> int:
        """Make it, and again if something came between; when that was.

        With `ahead`, its first word is so much more than the host's clock. Raises HostError.
        """
        for _ in range(_TRIES):
            before = monotonic_ns()
            if ahead is not None:
                self._words[0] = before + ahead
            if not self._steps.run():
                self._explain()
            after = monotonic_ns()
            if after - before < _SOON:
                break
        return (before + after) // 2

    def _explain(self) -> None:
        why = "it does not have it"
        try:
            if ioctl(self._fd, self._request, self.buffer, True) == self._result:
                return
        except OSError as error:
            why = error.strerror or why
        raise HostError(f"KVM refused to tell or set a clock: {why}; use --accel soft")


class _Saved(NamedTuple):
    clock: int | None
    tsc: list[int] | None
    armed: list[tuple[int, int]]
    """The TSC deadlines, and of which vCPU each is."""


_known: Known[_Saved] = Known(8)


def _parsed(state: State, vcpus: int) -> _Saved:
    found = _known.find(state, vcpus)
    if found is None:
        saved = Saved(state, "a VM of KVM", _VERSION)
        tsc = None if state.get("tsc", 0) is None else saved.numbers("tsc", _WORD, vcpus)
        deadlines = enumerate(saved.numbers("deadlines", _WORD, vcpus))
        armed = [(index, deadline) for index, deadline in deadlines if deadline]
        found = _Saved(saved.optional("clock", _WORD >> 1), tsc, armed)
        _known.add(state, found, vcpus)
    return found


class VmTime:
    """The time of one VM."""

    def __init__(self, system: System, vm: int, vcpus: Sequence[KvmVcpu]) -> None:
        """`vm` is the descriptor; `vcpus` are all that there will be."""
        self._vm = vm
        self._vcpus = vcpus
        self._set_clock: _Prompt | None = None
        if system.check_extension(KVM_CAP_ADJUST_CLOCK):
            self._set_clock = _Prompt(vm, KVM_SET_CLOCK, bytearray(_CLOCK_SIZE))
        there = has_tsc_offset(system, vcpus[0])
        self._offsets = [_TscOffset(vcpu) for vcpu in vcpus] if there else None
        self._path = system.path
        self._loaded: tuple[State, _Saved] | None = None  # the last time

    def save(self, moment: int) -> State:
        """What they showed at `moment`, in nanoseconds on the host's monotonic clock."""
        clock: int | None = None
        if self._set_clock is not None:
            get = _Prompt(self._vm, KVM_GET_CLOCK, bytearray(_CLOCK_SIZE))
            now = get.make()
            clock = max(kvm_clock_data.from_buffer(get.buffer).clock - (now - moment), 0)
        tsc: list[int] | None = None
        if self._offsets is not None:
            then = _host_tsc(self._vcpus[0], self._offsets[0], moment)
            tsc = [offset.get() + then & _WORD for offset in self._offsets]
        wanted = [vcpu.msrs_that_exist((IA32_TSC_DEADLINE,)) for vcpu in self._vcpus]
        deadlines = [found.get(IA32_TSC_DEADLINE, 0) for found in wanted]
        return {"version": _VERSION, "clock": clock, "tsc": tsc, "deadlines": deadlines}

    def load(self, state: State, moment: int) -> None:
        """They go on from there: the time from the saving until `moment` has not passed.

        The TSCs of vCPUs stay as far apart as they were. Raises ConfigError.
        """
        if self._loaded is None or self._loaded[0] is not state:
            self._loaded = state, _parsed(state, len(self._vcpus))
        clock, tsc, armed = self._loaded[1]
        if tsc is not None:
            self._load_tscs(tsc, moment)
            for index, deadline in armed:  # by another counter
                self._vcpus[index].set_msrs({IA32_TSC_DEADLINE: deadline})
            if self._offsets is not None and self._path not in _keeps_offsets:
                _keeps_offsets[self._path] = any(offset.taken() for offset in self._offsets)
        if clock is not None and self._set_clock is not None:
            self._set_clock.make(clock - moment)

    def _load_tscs(self, tsc: list[int], moment: int) -> None:
        offsets = self._offsets
        if offsets is None:
            for vcpu, value in zip(self._vcpus, tsc, strict=True):
                vcpu.set_msrs({IA32_TSC: value})
        elif _keeps_offsets.get(self._path, True):
            then = _host_tsc(self._vcpus[0], offsets[0], moment)
            for offset, value in zip(offsets, tsc, strict=True):
                offset.set(value - then & _WORD)


def _host_tsc(vcpu: KvmVcpu, offset: "_TscOffset", moment: int) -> int:
    """The host's counter at `moment`, at the rate of the guest's."""
    khz = vcpu.tsc_khz()
    counter, then = _host.get(khz, (0, -_FRESH))
    if not then <= monotonic_ns() < then + _FRESH:
        asked = msrs.request(msrs.pack({IA32_TSC: 0}))
        get = _Prompt(vcpu.fd, KVM_GET_MSRS, asked, 1)
        then = get.make()
        counter = msrs.answer(get.buffer)[IA32_TSC] - offset.get()
        if khz:
            _host[khz] = counter, then
    return counter + (moment - then) * khz // 1_000_000 & _WORD


def has_tsc_offset(system: System, vcpu: KvmVcpu) -> bool:
    """Whether `VmTime` saves and loads the TSC of `vcpu`: all of this KVM are alike."""
    known = _has_offsets.get(system.path)
    if known is None:
        known = _has_offsets[system.path] = _TscOffset(vcpu).exists()
    return known


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

    def taken(self) -> bool:
        """Whether it is as it was set last."""
        value = self._word.value
        return self.get() == value

    def set(self, value: int) -> None:
        """The same."""
        self._word.value = value
        ioctl(self._vcpu.fd, KVM_SET_DEVICE_ATTR, self._request)
