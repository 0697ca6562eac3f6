"""All of a machine but its memory and disks, as plain data: taken from its parts, and put back."""

import hashlib
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from vmexit.core.bus import State
from vmexit.core.errors import ConfigError, VmexitError, quoted
from vmexit.core.memory import GuestMemory
from vmexit.machine.builder import Parts
from vmexit.machine.config import MachineConfig

_IRQCHIP, _IN_KERNEL = "irqchip", ("irqchip", "pit")
_SOON, _TRIES = 50_000, 20  # nanoseconds


class MachineState(NamedTuple):
    """What `take()` gives: numbers, texts, bytes, and lists and dicts of them."""

    accel: str
    vm: State
    vcpus: list[State]
    devices: dict[str, State]
    roms: dict[str, str]
    """A digest of each ROM, by its GPA: what is in them comes from files."""


def take(parts: Parts) -> MachineState:
    """The state of a machine none of whose vCPUs runs.

    Raises ConfigError that names a device which cannot be saved.
    """
    devices = {}
    try:
        moment = _stand(parts)
        # What goes on though our clocks stand comes first: timers in the kernel.
        vm = parts.vm.state(moment)
        vcpus = [vcpu.state() for vcpu in parts.vcpus]
        for name in sorted(parts.devices, key=lambda name: name not in _IN_KERNEL):
            try:
                devices[name] = parts.devices[name].state()
            except ConfigError as error:
                raise ConfigError(f"no snapshot is possible with {name}: {error}") from error
    finally:
        parts.go_on()
    return MachineState(parts.accel, vm, vcpus, devices, _roms(parts.memory))


def check(parts: Parts, state: MachineState) -> None:
    """Raises ConfigError if `state` is that of a machine with other parts."""
    if parts.accel != state.accel:
        raise ConfigError(
            f"the snapshot is of a machine on {state.accel}, and this one is on {parts.accel}; "
            f"use --accel {state.accel}"
        )
    if len(parts.vcpus) != len(state.vcpus):
        raise ConfigError(
            f"the snapshot has {len(state.vcpus)} vCPUs, and this machine {len(parts.vcpus)}; "
            "use a machine with as many"
        )
    if other := sorted(parts.devices.keys() ^ state.devices.keys()):
        where = "the snapshot" if other[0] in state.devices else "this machine"
        raise ConfigError(f"only {where} has {quoted(other[0])}; use a machine with the same parts")
    parts.require_fit(state.devices)
    _check_roms(parts, state)


def check_again(parts: Parts, state: MachineState) -> None:
    """The part of `check()` whose answer may change while there is the machine."""
    parts.require_fit(state.devices)
    if state.roms:  # a ROM is never new
        _check_roms(parts, state)


def _check_roms(parts: Parts, state: MachineState) -> None:
    if _roms(parts.memory) != state.roms:
        raise ConfigError("the firmware has changed since the snapshot; use the file as it was")


def put(parts: Parts, state: MachineState, ago: int = 0) -> None:
    """Have the machine, which does not run and whose memory is set, go on from there.

    It was there so many nanoseconds `ago`: so much time has passed for the guest. `check()` comes
    first. Raises ConfigError for what is no state of such a machine; it is of no use then.
    """
    # The interrupt controllers first: what devices do to them next, they have done before. The
    # local APICs of KVM are the vCPUs', and get what the I/O APIC has for them once more.
    # Clocks that a guest can compare have to go on from one moment, or it trusts none of them.
    try:
        moment = _stand(parts, ago)
        if _IRQCHIP in parts.devices:
            _restore(parts, state, _IRQCHIP)
        for vcpu, saved in zip(parts.vcpus, state.vcpus, strict=True):
            vcpu.restore(saved)
        parts.vm.restore(state.vm, moment)
        for name in parts.devices:
            if name != _IRQCHIP:
                _restore(parts, state, name)
    finally:
        parts.go_on()


def _stand(parts: Parts, ago: int = 0) -> int:
    """The clocks stand, so many ns ago; when that is, as the VM tells it. `go_on()` is next."""
    for _ in range(_TRIES):
        begin = time.monotonic_ns()
        parts.stand(ago)
        moment = parts.vm.moment(ago)
        if time.monotonic_ns() - begin < _SOON:
            break
        # Another thread came between: once more.
    return moment


def _restore(parts: Parts, state: MachineState, name: str) -> None:
    try:
        parts.devices[name].restore(state.devices[name])
    except VmexitError as error:
        raise ConfigError(f"{name} cannot be restored: {error}") from error


def _roms(memory: GuestMemory) -> dict[str, str]:
    return {
        f"{region.gpa:#x}": hashlib.sha256(region.view).hexdigest()
        for region in memory.regions
        if region.readonly
    }


def require_own_disks(config: MachineConfig) -> None:
    """Raises ConfigError if a disk is the guest's alone: it cannot go back, nor be shared."""
    from vmexit.machine.drive import Drive

    for number, text in enumerate(config.drives):
        drive = Drive.parse(text)
        if not drive.readonly and not drive.snapshot:
            raise ConfigError(
                f"disk{number} is not as it was at the snapshot: the guest writes to its file; "
                "use readonly=on or snapshot=on from the beginning, or give other drives"
            )


def for_a_clone(
    config: MachineConfig,
    accel: str,
    *,
    serial: str,
    consoles: Sequence[str] | None,
    drives: Sequence[str] | None,
    nets: Sequence[str] | None,
    shares: Sequence[str] | None,
    vsock: str | None,
) -> MachineConfig:
    """`config` with other ends on the host. Raises ConfigError."""
    debugcon = config.debugcon
    if consoles is None:
        from vmexit.machine.console import ConsoleOptions

        names = [ConsoleOptions.parse(text).name.replace(",", ",,") for text in config.consoles]
        consoles = [f"null,name={name}" if name else "null" for name in names]
    return config._replace(
        accel=accel,
        serial=None if config.serial is None else serial,
        debugcon=None if debugcon is None else (debugcon[0], os.devnull),
        consoles=tuple(consoles),
        drives=config.drives if drives is None else tuple(drives),
        nets=config.nets if nets is None else tuple(nets),
        shares=config.shares if shares is None else tuple(shares),
        vsock=config.vsock if vsock is None else vsock,
    )
