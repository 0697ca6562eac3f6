"""The composition root: the one module that knows every part."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from vmexit.accel.base import Accelerator, Notifier, Vcpu, Vm
from vmexit.arch.x86.layout import (
    ACPI_TABLES,
    ROM_END,
    ROM_MAX_SIZE,
    TESTDEV_MEMORY,
    VIRTIO_MMIO_SIZE,
    ram_ranges,
    virtio_place,
)
from vmexit.boot import firmware, flat
from vmexit.boot.entry import BootEntry, Linked
from vmexit.boot.image import ImageKind, detect, find_multiboot, read_image
from vmexit.boot.placement import check_ram
from vmexit.core.bus import Bus, State, Stateful
from vmexit.core.errors import ConfigError, HostError, ImageError, shown
from vmexit.core.loop import EventLoop
from vmexit.core.memory import GuestMemory
from vmexit.core.memory_image import MemoryImage
from vmexit.core.threads import Workers
from vmexit.core.trace import ExitObserver
from vmexit.machine.balloon import MemoryBalloon
from vmexit.machine.board import Board, StatefulIrqChip, Tell
from vmexit.machine.config import MachineConfig
from vmexit.machine.console import GuestConsole
from vmexit.machine.counters import DeviceCounters
from vmexit.machine.rewind import DirtyLog, Rewind
from vmexit.machine.runner import StopRequest

_Path = str | os.PathLike[str]

# A kernel's file may be larger than what of it goes into memory: symbols stay outside.
_KERNEL_MAX_SIZE = 1 << 30

if TYPE_CHECKING:
    from vmexit.backends.console_tap import ConsoleTap
    from vmexit.backends.overlay import Overlay
    from vmexit.boot.firmware_items import Contents
    from vmexit.devices.irqchip import PcIrqChip


class Parts(NamedTuple):
    """What a machine is made of; `closer` takes it apart in the right order."""

    accel: str
    why: str
    memory: GuestMemory
    rewind: Rewind
    pio: Bus
    mmio: Bus
    vm: Vm
    vcpus: list[Vcpu]
    devices: dict[str, Stateful]
    serial: str
    reset: Callable[[], None]
    """Puts all of it back to the beginning, while no vCPU runs; raises what `build()` raises."""
    power_button: Callable[[], None] | None
    renew_generation: Callable[[], None] | None
    linked: Sequence[Linked]
    running: Callable[[bool], None]
    """To be called when a run begins, and when it has ended."""
    hold: Callable[[bool], None]
    """Has devices leave the guest alone, or lets them do again what they had to put off."""
    undriven: Callable[[], list[str]]
    virtio_counters: Callable[[], tuple[DeviceCounters, ...]]
    balloon: MemoryBalloon | None
    console: GuestConsole | None
    taps: Sequence["ConsoleTap"]
    console_where: Sequence[str]
    overlays: "Mapping[str, Overlay]"
    """What is written to disks with snapshot=on, by the name of the disk."""
    require_fit: Callable[[Mapping[str, State]], None]
    """Raises ConfigError if these are states of devices with something else behind them."""
    stand: Callable[[int], None]
    """The clock of the devices stands still from now on, so many nanoseconds ago."""
    go_on: Callable[[], None]
    """It goes again."""
    closer: ExitStack


class Restored(NamedTuple):
    """What is known of a machine that goes on from a snapshot, before it is made."""

    devices: Collection[str]
    memory: MemoryImage


class _Engine(NamedTuple):
    """A VM with its vCPUs, on the accelerator that it was possible on."""

    accelerator: Accelerator
    vm: Vm
    vcpus: list[Vcpu]
    chip: StatefulIrqChip | None = None
    in_process: "tuple[PcIrqChip, Callable[[], int]] | None" = None
    """The same chip, if it is ours, and what tells the number of the vCPU that makes an access."""
    notifier: Notifier | None = None
    log: DirtyLog | None = None

    def close(self) -> None:
        self.vm.close()
        self.accelerator.close()


class _Wanted(NamedTuple):
    """What a VM is made from."""

    config: MachineConfig
    memory: GuestMemory
    pio: Bus
    mmio: Bus
    loop: EventLoop
    workers: Workers
    observer: ExitObserver | None


def _create_kvm(wanted: _Wanted) -> _Engine:
    from vmexit.accel.kvm.system import System

    config = wanted.config
    with ExitStack() as stack:
        accelerator = System()
        stack.callback(accelerator.close)
        if config.accel == "auto" and config.machine != "bare":
            from vmexit.accel.kvm.probe import why_no_kernels

            if why := why_no_kernels(accelerator):
                raise HostError(f"{why}; use --accel soft")
        vm = accelerator.create_vm(
            wanted.memory, wanted.pio, wanted.mmio, config.smp, config.cpu_model
        )
        stack.callback(vm.close)
        vm.later = wanted.workers.later
        chip = vm.create_irqchip() if config.machine == "microvm" else None
        if config.dirty_ring:
            vm.use_dirty_rings(config.dirty_ring)
        vcpus: list[Vcpu] = [vm.create_vcpu(i, wanted.observer) for i in range(config.smp)]
        stack.pop_all()
        return _Engine(accelerator, vm, vcpus, chip, notifier=vm, log=vm)


def _create_soft(wanted: _Wanted) -> _Engine:
    from vmexit.accel.soft.engine import SoftAccelerator

    config = wanted.config
    with ExitStack() as stack:
        accelerator = SoftAccelerator()
        stack.callback(accelerator.close)
        vm = accelerator.create_vm(
            wanted.memory, wanted.pio, wanted.mmio, config.smp, config.cpu_model
        )
        stack.callback(vm.close)
        chip = None
        if config.machine == "microvm":
            from vmexit.accel.soft.cpuid import CRYSTAL_HZ
            from vmexit.devices.irqchip import PcIrqChip

            chip = PcIrqChip(config.smp, wanted.loop, CRYSTAL_HZ, vm.attention)
        vcpus: list[Vcpu] = [
            vm.create_vcpu(i, wanted.observer, chip.vcpus[i] if chip is not None else None)
            for i in range(config.smp)
        ]
        stack.pop_all()
        in_process = None if chip is None else (chip, lambda: vm.current)
        return _Engine(accelerator, vm, vcpus, chip, in_process)


_CREATE = {"kvm": _create_kvm, "soft": _create_soft}


def _create(wanted: _Wanted) -> tuple[_Engine, str]:
    """A VM on the accelerator asked for, `auto` being the first possible; and why it is that."""
    accel = wanted.config.accel
    if accel != "auto":
        return _CREATE[accel](wanted), "asked for"
    try:
        return _create_kvm(wanted), "KVM is usable"
    except HostError as error:
        no_kvm = str(error).partition(";")[0]
    try:
        return _create_soft(wanted), no_kvm
    except HostError as error:
        raise HostError(f"no accelerator is usable: {no_kvm}, and {error}") from error


def build(
    config: MachineConfig,
    request: StopRequest,
    observer: ExitObserver | None,
    tell: Tell,
    workers: Workers,
    restored: Restored | None = None,
) -> Parts:
    """Make all parts of a machine, its first vCPU where the guest begins.

    `tell` is for events of devices; those of `workers` that wait do what can be done later. With
    `restored`, the state of that machine is still to be put into it; only what is not in memory is
    read from files.

    Raises ConfigError, ImageError or HostError; nothing is left open then.
    """
    entry: BootEntry | None
    with ExitStack() as stack:
        # The image before the accelerator: what is wrong with it shows on every host.
        image = None if restored is None else restored.memory
        memory = GuestMemory(ram_ranges(config.memory), image)
        stack.callback(memory.close)
        if restored is None:
            entry, contents = _load(config, memory)
            if config.symbols is not None:  # they are for later, and a wrong path is told now
                read_image(config.symbols, what="symbol file")
        else:
            entry, contents = _reload(config, memory, restored.devices)
        pio, mmio = Bus("port"), Bus("MMIO")
        loop = EventLoop(request.fail)
        stack.callback(loop.close)
        engine, why = _create(_Wanted(config, memory, pio, mmio, loop, workers, observer))
        stack.callback(engine.close)
        board = Board(config, pio, mmio, request, loop, stack.callback, tell)
        board.attach_common(engine.chip)
        if engine.in_process is not None:
            board.attach_irqchip(*engine.in_process)
        if engine.chip is not None:
            board.attach_pc(engine.chip)
            if config.virtio_devices:
                board.attach_virtio(engine.chip, memory, engine.notifier)
        if "testdev" in config.devices:
            board.attach_testdev(engine.chip)
        if "pvpanic" in config.devices:
            board.attach_pvpanic()
        if "vmgenid" in config.devices:
            assert engine.chip is not None  # see MachineConfig
            board.attach_vmgenid(engine.chip)
        if contents is not None:
            board.attach_fw_cfg(memory, contents)
        stack.callback(loop.close)  # again, and now before what it watches
        if entry is not None:
            start_at(engine.vcpus[0], entry)

        def reset() -> None:
            for device in board.devices.values():
                device.reset()
            engine.vm.reset_vcpus()
            for region in memory.regions:
                memory.discard(region.gpa, region.size)
            start_at(engine.vcpus[0], _load(config, memory)[0])

        rewind = Rewind(memory, engine.log, image)
        stack.callback(rewind.close)
        return Parts(
            engine.accelerator.name,
            why,
            memory,
            rewind,
            pio,
            mmio,
            engine.vm,
            engine.vcpus,
            board.devices,
            board.serial_where,
            reset,
            board.power_button,
            board.renew_generation,
            entry.linked if entry is not None else (),
            board.running,
            board.hold,
            board.undriven,
            board.virtio_counters,
            board.balloon,
            board.console,
            board.taps,
            board.console_where,
            board.overlays,
            board.require_fit,
            loop.stand,
            loop.go_on,
            stack.pop_all(),
        )


def start_at(vcpu: Vcpu, entry: BootEntry) -> None:
    """Have `vcpu` begin where the boot layer says."""
    vcpu.set_system_registers(entry.system)
    vcpu.set_registers(entry.registers)


def _load(config: MachineConfig, memory: GuestMemory) -> "tuple[BootEntry, Contents | None]":
    """Put what is to run into memory; how it starts, and what fw_cfg tells it, if there is one."""
    if config.firmware is not None:
        rom = read_image(config.firmware, limit=ROM_MAX_SIZE, what="firmware")
        _check_testdev(config, len(rom))
        entry = firmware.load(memory, rom)
        if config.kernel is None:
            return entry, None
        return entry, _for_firmware(config, config.kernel, memory)
    if config.kernel is not None:
        return _load_kernel(config, config.kernel, memory)
    image = None
    if config.image is not None:
        at = config.load_address
        data = read_image(config.image, limit=config.memory)
        _require_flat(str(config.image), detect(data), config.entry, at)
        flat.check_entry(config.entry, len(data), at)
        flat.load(memory, data, at)
        image = range(at, at + len(data))
    return flat.start(memory, config.entry, config.mode, image, config.segment), None


def _reload(
    config: MachineConfig, memory: GuestMemory, devices: Collection[str]
) -> "tuple[BootEntry | None, Contents | None]":
    """What RAM does not hold: the ROM, and what fw_cfg tells."""
    if config.firmware is not None:
        return _load(config, memory)
    if "fw-cfg" not in devices:
        return None, None
    from vmexit.boot import firmware_items

    return None, firmware_items.machine(memory.regions, config.smp, serial=False)


def _check_testdev(config: MachineConfig, rom_size: int) -> None:
    """Raises ConfigError where the ROM would lie over the memory of the test device."""
    if "testdev" not in config.devices:
        return
    from vmexit.devices.testdev import MEMORY_SIZE

    if ROM_END - rom_size < TESTDEV_MEMORY + MEMORY_SIZE:
        raise ConfigError(
            f"a firmware ROM of {rom_size} bytes lies over the memory of testdev at "
            f"{TESTDEV_MEMORY:#x}; use a smaller --firmware, or leave out --device testdev"
        )


def _for_firmware(config: MachineConfig, path: _Path, memory: GuestMemory) -> "Contents":
    """What firmware is told of the machine, and of the kernel that it is to boot."""
    from vmexit.boot import firmware_items

    kernel, initrd = _read_kernel(config, path), _read_initrd(config)
    return (
        firmware_items.machine(memory.regions, config.smp, serial=config.serial is not None)
        | firmware_items.acpi_tables(_acpi(config, 0))
        | firmware_items.kernel(kernel, initrd, _command_line(config), memory)
    )


def _acpi(config: MachineConfig, at: int) -> bytes:
    from vmexit.arch.x86 import acpi

    devices = acpi.virtio_mmio(config.virtio_devices)
    if "pvpanic" in config.devices:
        devices += acpi.pvpanic()
    if "vmgenid" in config.devices:
        devices += acpi.vmgenid()
    return acpi.build(config.smp, at, devices)


def _load_kernel(
    config: MachineConfig, path: _Path, memory: GuestMemory
) -> "tuple[BootEntry, Contents | None]":
    """Put a kernel into memory, by the loader that its file is for."""
    from vmexit.boot import linux

    kernel = _read_kernel(config, path)
    by_multiboot = config.protocol == "auto" and find_multiboot(kernel) is not None
    if config.machine == "bare" and not by_multiboot and config.protocol != "16":
        # By 16, a boot loader may come, and a multiboot kernel may want no more than it finds.
        raise ConfigError("a Linux kernel needs interrupts and timers; use --machine microvm")
    rsdp = 0
    if config.machine == "microvm":  # the bare one has nothing that they could tell of
        rsdp = ACPI_TABLES
        tables = _acpi(config, rsdp)
        check_ram(memory, rsdp, len(tables), "the ACPI tables")
        memory.write(rsdp, tables)
    if by_multiboot:
        return _load_multiboot(config, path, kernel, memory)
    initrd, protocol = _read_initrd(config), config.protocol
    cmdline = _command_line(config)
    boot = linux.load(memory, kernel, initrd, cmdline, protocol=protocol, rsdp=rsdp)
    return boot.entry, None


def _command_line(config: MachineConfig) -> str:
    """What the user gives; where that switches ACPI off, with the virtio devices that it tells of.

    Linux takes them if it was built with CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES.
    """
    words = config.append.split()
    if "acpi=off" in words and not any(w.startswith("virtio_mmio.device=") for w in words):
        for gpa, gsi in map(virtio_place, range(config.virtio_devices)):
            words.append(f"virtio_mmio.device={VIRTIO_MMIO_SIZE:#x}@{gpa:#x}:{gsi}")
        return " ".join(words)
    return config.append


def _load_multiboot(
    config: MachineConfig, path: _Path, kernel: bytes, memory: GuestMemory
) -> "tuple[BootEntry, Contents]":
    from vmexit.boot import firmware_items, multiboot

    files = multiboot.module_files(config.initrd) if config.initrd is not None else []
    room = multiboot.room_for_modules(memory, kernel)
    modules = []
    for file, string in files:
        data = read_image(file, limit=room, what="module")
        modules.append(multiboot.Module(data, string))
        room -= len(data)
    # The first word is the program, as kernels with an argv expect it.
    cmdline = f"{os.fsdecode(path)} {config.append}".rstrip()
    entry = multiboot.load(memory, kernel, modules, cmdline)
    # Multiboot does not tell how many processors there are: kvm-unit-tests ask fw_cfg.
    return entry, firmware_items.machine(memory.regions, config.smp, serial=False)


def _read_kernel(config: MachineConfig, path: _Path) -> bytes:
    return read_image(path, limit=max(config.memory, _KERNEL_MAX_SIZE), what="kernel")


def _read_initrd(config: MachineConfig) -> bytes | None:
    if config.initrd is None:
        return None
    return read_image(config.initrd, limit=config.memory, what="initrd")


def _require_flat(path: str, kind: ImageKind, entry: int, at: int) -> None:
    """Raises ImageError for what cannot run as it is, or not from there."""
    remedy = {
        "elf": f"`vmexit inspect {shown(path)}` shows how to run it",
        "gzip": "unpack it with gunzip",
        "xz": "unpack it with unxz",
        "lz4": "unpack it with unlz4",
        "zstd": "unpack it with unzstd",
        "bzimage": f"use --kernel {shown(path)}",
    }.get(kind.name, "")
    if kind.name == "boot-sector" and not at <= entry < at + 512:
        remedy = "use --load-address 0x7c00 --entry 0:0x7c00"
    if remedy:
        raise ImageError(f"{shown(path)} is {kind.description}, not a flat image; {remedy}")
