"""The composition root: the one module that knows every part."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from vmexit.accel.base import Accelerator, Executor, Vcpu, Vm
from vmexit.arch.x86.layout import COM1_PORT, ROM_MAX_SIZE, ram_ranges
from vmexit.boot import firmware, flat
from vmexit.boot.entry import BootEntry
from vmexit.boot.image import ImageKind, detect, read_image
from vmexit.core.bus import Bus, Device
from vmexit.core.errors import HostError, ImageError, shown
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
    executors: Sequence[Executor]
    devices: dict[str, Device]
    serial: str
    closer: ExitStack


class _Engine(NamedTuple):
    """A VM with its vCPUs, on the accelerator that it was possible on."""

    accelerator: Accelerator
    vm: Vm
    vcpus: list[Vcpu]

    def close(self) -> None:
        self.vm.close()
        self.accelerator.close()


def _open_kvm() -> Accelerator:
    from vmexit.accel.kvm.system import System

    return System()


def _open_soft() -> Accelerator:
    from vmexit.accel.soft.engine import SoftAccelerator

    return SoftAccelerator()


_OPEN = {"kvm": _open_kvm, "soft": _open_soft}


def _create(
    accel: str, memory: GuestMemory, pio: Bus, mmio: Bus, observer: ExitObserver | None
) -> _Engine:
    """A VM with one vCPU on accelerator `kvm` or `soft`. Raises HostError."""
    with ExitStack() as stack:
        accelerator = _OPEN[accel]()
        stack.callback(accelerator.close)
        vm = accelerator.create_vm(memory, pio, mmio)
        stack.callback(vm.close)
        engine = _Engine(accelerator, vm, [vm.create_vcpu(0, observer, None)])
        stack.pop_all()
        return engine


def _create_any(
    accel: str, memory: GuestMemory, pio: Bus, mmio: Bus, observer: ExitObserver | None
) -> tuple[_Engine, str]:
    """`_create()` on the accelerator asked for, `auto` being the first possible; and why it is."""
    if accel != "auto":
        return _create(accel, memory, pio, mmio, observer), "asked for"
    try:
        return _create("kvm", memory, pio, mmio, observer), "KVM is usable"
    except HostError as error:
        no_kvm = str(error).partition(";")[0]
    try:
        return _create("soft", memory, pio, mmio, observer), no_kvm
    except HostError as error:
        raise HostError(f"no accelerator is usable: {no_kvm}, and {error}") from error


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
        engine, why = _create_any(config.accel, memory, pio, mmio, observer)
        stack.callback(engine.close)
        first = engine.vcpus[0]
        first.set_system_registers(entry.system)
        first.set_registers(entry.registers)
        accel = engine.accelerator.name
        return Parts(
            accel,
            why,
            memory,
            pio,
            mmio,
            engine.vcpus,
            engine.vm.executors,
            devices,
            where,
            stack.pop_all(),
        )


def _load(config: MachineConfig, memory: GuestMemory) -> BootEntry:
    if config.firmware is not None:
        return firmware.load(
            memory, read_image(config.firmware, limit=ROM_MAX_SIZE, what="firmware")
        )
    image = None
    if config.image is not None:
        at = config.load_address
        data = read_image(config.image, limit=config.memory)
        _require_flat(str(config.image), detect(data), config.entry, at)
        flat.check_entry(config.entry, len(data), at)
        flat.load(memory, data, at)
        image = range(at, at + len(data))
    return flat.start(memory, config.entry, config.mode, image, config.segment)


def _require_flat(path: str, kind: ImageKind, entry: int, at: int) -> None:
    """Raises ImageError for what cannot run as it is, or not from there."""
    remedy = {
        "elf": f"`vmexit inspect {shown(path)}` shows how to convert it",
        "gzip": "unpack it with gunzip",
        "bzimage": "vmexit does not boot Linux yet",
    }.get(kind.name, "")
    if kind.name == "boot-sector" and not at <= entry < at + 512:
        remedy = "use --load-address 0x7c00 --entry 0:0x7c00"
    if remedy:
        raise ImageError(f"{shown(path)} is {kind.description}, not a flat image; {remedy}")


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

        backend = open_chardev(config.serial, request.pending)
        on_close(backend.close)
        where = backend.where
        attach("serial", COM1_PORT, 8, Serial(backend))
    if config.debugcon is not None:
        from vmexit.backends.chardev import File, Stdio
        from vmexit.devices.debugcon import Debugcon

        port, path = config.debugcon
        log = File(path, request.pending) if path else Stdio(request.pending)
        on_close(log.close)
        attach("debugcon", port, 1, Debugcon(log.write))
    if config.debug_exit is not None:
        from vmexit.devices.debug_exit import DebugExit

        def end(value: int) -> None:
            request(Stop(StopReason.DEBUG_EXIT, value=value, detail=f"the guest wrote {value:#x}"))

        attach("debug-exit", config.debug_exit, 1, DebugExit(end), overhang=True)
    return devices, where
