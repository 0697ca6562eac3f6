"""The composition root: the one module that knows every part."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from vmexit.accel.base import Accelerator, Vcpu
from vmexit.arch.x86.layout import COM1_PORT, ram_ranges
from vmexit.boot import firmware, flat
from vmexit.boot.entry import BootEntry
from vmexit.boot.image import detect, read_image
from vmexit.core.bus import Bus, Device
from vmexit.core.errors import HostError, ImageError
from vmexit.core.memory import GuestMemory
from vmexit.core.trace import ExitObserver
from vmexit.machine.config import MachineConfig
from vmexit.machine.runner import StopRequest
from vmexit.machine.stop import Stop, StopReason


class Parts(NamedTuple):
    """What a machine is made of; `closer` takes it apart in the right order."""

    accel: str
    why: str
    memory: GuestMemory
    pio: Bus
    mmio: Bus
    vcpus: list[Vcpu]
    devices: dict[str, Device]
    serial: str
    closer: ExitStack


def open_accelerator(name: str) -> tuple[Accelerator, str]:
    """The accelerator `auto`, `kvm` or `soft`, and why it was chosen. Raises HostError."""
    if name == "kvm":
        return _open_kvm(), "asked for"
    if name == "soft":
        return _open_soft(), "asked for"
    try:
        return _open_kvm(), "KVM is usable"
    except HostError as error:
        no_kvm = str(error).partition(";")[0]
    try:
        return _open_soft(), no_kvm
    except HostError as error:
        raise HostError(f"no accelerator is usable: {no_kvm}, and {error}") from error


def _open_kvm() -> Accelerator:
    from vmexit.accel.kvm.system import System

    return System()


def _open_soft() -> Accelerator:
    from vmexit.accel.soft.engine import SoftAccelerator

    return SoftAccelerator()


def build(config: MachineConfig, request: StopRequest, observer: ExitObserver | None) -> Parts:
    """Make all parts of a machine, its first vCPU where the guest begins.

    Raises ConfigError, ImageError or HostError; nothing is left open then.
    """
    with ExitStack() as stack:
        # The image before the accelerator: what is wrong with it shows on every host.
        memory = GuestMemory(ram_ranges(config.memory))
        stack.callback(memory.close)
        entry = _load(config, memory)
        pio, mmio = Bus("port"), Bus("MMIO")
        devices, where = _attach_devices(config, pio, request, stack.callback)
        accelerator, why = open_accelerator(config.accel)
        stack.callback(accelerator.close)
        vm = accelerator.create_vm(memory, pio, mmio)
        stack.callback(vm.close)
        vcpu = vm.create_vcpu(0, observer)
        vcpu.set_system_registers(entry.system)
        vcpu.set_registers(entry.registers)
        return Parts(
            accelerator.name, why, memory, pio, mmio, [vcpu], devices, where, stack.pop_all()
        )


def _load(config: MachineConfig, memory: GuestMemory) -> BootEntry:
    if config.firmware is not None:
        return firmware.load(memory, read_image(config.firmware))
    image = None
    if config.image is not None:
        at = config.load_address
        data = read_image(config.image, limit=config.memory)
        kind = detect(data)
        if kind.name == "elf":
            raise ImageError(
                f"{config.image} is {kind.description}, not a flat image; "
                "convert it with objcopy -O binary"
            )
        flat.check_entry(config.entry, len(data), at)
        flat.load(memory, data, at)
        image = range(at, at + len(data))
    return flat.start(memory, config.entry, config.mode, image)


def _attach_devices(
    config: MachineConfig,
    pio: Bus,
    request: StopRequest,
    on_close: Callable[[Callable[[], None]], object],
) -> tuple[dict[str, Device], str]:
    devices: dict[str, Device] = {}
    where = ""

    def attach(name: str, port: int, size: int, device: Device, overhang: bool = False) -> None:
        pio.attach(port, size, device, overhang=overhang)
        devices[name] = device

    if config.serial is not None:
        from vmexit.backends.chardev import open_chardev
        from vmexit.devices.serial import Serial

        backend = open_chardev(config.serial)
        on_close(backend.close)
        where = backend.where
        attach("serial", COM1_PORT, 8, Serial(backend))
    if config.debugcon is not None:
        from vmexit.backends.chardev import File, Stdio
        from vmexit.devices.debugcon import Debugcon

        port, path = config.debugcon
        log = File(path) if path else Stdio()
        on_close(log.close)
        attach("debugcon", port, 1, Debugcon(log.write))
    if config.debug_exit is not None:
        from vmexit.devices.debug_exit import DebugExit

        def end(value: int) -> None:
            request(Stop(StopReason.DEBUG_EXIT, value=value, detail=f"the guest wrote {value:#x}"))

        attach("debug-exit", config.debug_exit, 1, DebugExit(end), overhang=True)
    return devices, where
