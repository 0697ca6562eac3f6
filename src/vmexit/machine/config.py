"""The configuration of a machine: frozen data, valid once it exists."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from vmexit.arch.x86.cpu_model import CpuModel
from vmexit.arch.x86.layout import (
    COM1_PORT,
    FLAT_ENTRY,
    FLAT_LOAD_ADDRESS,
    MMIO_HOLE_END,
    PHYSICAL_END,
    VIRTIO_GSIS,
)
from vmexit.boot.flat import MODES
from vmexit.core.errors import ConfigError, quoted
from vmexit.core.memory import PAGE_SIZE

ACCELERATORS = ("auto", "kvm", "soft")
MACHINES = ("bare", "microvm")
PROTOCOLS = ("auto", "pvh", "elf", "64", "32", "16")

DEVICES = ("testdev", "pvpanic", "vmgenid")

MAX_CPUS = 64

DEFAULT_MEMORY = 128 << 20
DEFAULT_DEBUG_EXIT = 0xF4

# Any size that there can be is shorter, and Python refuses to print far longer numbers.
_MAX_DIGITS = 64

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes from `134217728`, `0x8000000`, `128M` or `1G`. Raises ConfigError."""
    if isinstance(text, int):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"{text!r} is no size; use bytes, or 512K, 128M, 1G")
    digits = text.strip().upper()
    unit = ""
    if not digits.startswith("0X"):  # there B is a digit
        digits = digits.removesuffix("IB").removesuffix("B")
        unit = digits[-1:] if digits[-1:] in _UNITS else ""
    try:
        if len(digits) <= _MAX_DIGITS:
            return int(digits.removesuffix(unit), 0) * _UNITS[unit]
    except ValueError:
        pass
    raise ConfigError(f"{quoted(text)} is no size; use bytes, or 512K, 128M, 1G")


_REQUIRED = ("memory", "load_address", "entry", "smp", "dirty_ring")
# Entries of 16 bytes; KVM keeps up to 576 of them free.
_LEAST_RING, _MOST_RING = 1024, 65536


class _Options(NamedTuple):
    memory: int = DEFAULT_MEMORY
    accel: str = "auto"
    image: str | os.PathLike[str] | None = None
    load_address: int = FLAT_LOAD_ADDRESS
    entry: int = FLAT_ENTRY
    mode: str = "real"
    firmware: str | os.PathLike[str] | None = None
    serial: str | None = None
    debugcon: tuple[int, str] | None = None
    debug_exit: int | None = DEFAULT_DEBUG_EXIT
    segment: int | None = None
    machine: str = "bare"
    smp: int = 1
    kernel: str | os.PathLike[str] | None = None
    initrd: str | os.PathLike[str] | None = None
    append: str = ""
    protocol: str = "auto"
    cpu: str = "host"
    devices: tuple[str, ...] = ()
    drives: tuple[str, ...] = ()
    nets: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    rng: bool = False
    balloon: int | None = None
    vsock: str | None = None
    consoles: tuple[str, ...] = ()
    symbols: str | os.PathLike[str] | None = None
    dirty_ring: int = 0

    @property
    def cpu_model(self) -> CpuModel:
        """What `cpu` asks for. Raises ConfigError."""
        return CpuModel.parse(self.cpu)


class MachineConfig(_Options):
    """What to build, by name. Sizes and addresses in bytes. Raises ConfigError for what cannot be.

    A named tuple: `dataclasses` alone would take a tenth of the time that a command needs to start.
    """

    __slots__ = ()

    if not TYPE_CHECKING:  # where the inherited signature is the better one

        def __new__(cls, **options: object) -> "MachineConfig":
            config = super().__new__(cls, **options)
            config._check()
            return config

        def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, object]]:
            return (), self._asdict()  # copies and pickles are made by name, too

        @classmethod
        def _make(cls, values: Iterable[object]) -> "MachineConfig":
            return cls(**dict(zip(cls._fields, values, strict=True)))

        def _replace(self, **options: object) -> "MachineConfig":
            return MachineConfig(**{**self._asdict(), **options})

    def _check(self) -> None:
        for name in (*_REQUIRED, "segment", "debug_exit", "balloon"):
            value = getattr(self, name)
            if not isinstance(value, int) and (value is not None or name in _REQUIRED):
                raise ConfigError(f"{name} takes a number, not {value!r}")
        self._check_types()
        if self.debugcon is not None and not isinstance(self.debugcon, tuple):
            raise ConfigError(f'debugcon takes (port, path), not {self.debugcon!r}; path may be ""')
        if self.accel not in ACCELERATORS:
            raise ConfigError(
                f"there is no accelerator {quoted(self.accel)}; use auto, kvm or soft"
            )
        if self.mode not in MODES:
            raise ConfigError(
                f"there is no CPU mode {quoted(self.mode)}; use real, protected or long"
            )
        if self.machine not in MACHINES:
            raise ConfigError(f"there is no machine {quoted(self.machine)}; use bare or microvm")
        _ = self.cpu_model
        for name in self.devices:
            if name not in DEVICES:
                raise ConfigError(f"there is no device {quoted(name)}; use {' or '.join(DEVICES)}")
            if self.devices.count(name) > 1:
                raise ConfigError(f"--device {name} is given twice; one is all there can be")
        if "vmgenid" in self.devices and self.machine == "bare":
            raise ConfigError("the bare machine has no interrupts for vmgenid; use microvm")
        self._check_virtio()
        self._check_start()
        if not 1 <= self.smp <= MAX_CPUS:
            raise ConfigError(f"{self.smp} vCPUs cannot be; use --smp 1 to {MAX_CPUS}")
        if self.machine == "bare" and self.smp > 1:
            raise ConfigError("the bare machine has one vCPU; use --machine microvm")
        self._check_memory()
        ring = self.dirty_ring
        if ring and (not _LEAST_RING <= ring <= _MOST_RING or ring & ring - 1):
            raise ConfigError(
                f"a dirty ring of {ring} entries cannot be; use a power of two from "
                f"{_LEAST_RING} to {_MOST_RING}, or 0 for the dirty log"
            )
        for name, address in (("load address", self.load_address), ("entry", self.entry)):
            if not 0 <= address < PHYSICAL_END:
                raise ConfigError(
                    f"{name} {address:#x} is no guest physical address; use one from 0x0 to "
                    f"{PHYSICAL_END - 1:#x}"
                )
        if self.segment is not None and not 0 <= self.segment <= 0xFFFF:
            raise ConfigError(f"segment {self.segment:#x} has more than 16 bits; use 0 to 0xffff")
        if self.segment is not None and self.mode != "real":
            raise ConfigError(f"{self.mode} mode has no segment {self.segment:#x}; use --mode real")
        ports = [("serial", COM1_PORT)] if self.serial is not None else []
        if self.debugcon is not None:
            ports.append(("--debugcon", self.debugcon[0]))
        if self.debug_exit is not None:
            ports.append(("--debug-exit", self.debug_exit))
        for name, port in ports:
            if not 0 <= port <= 0xFFFF:
                raise ConfigError(f"{name}: {port:#x} is no port; use 0 to 0xffff")

    def _check_types(self) -> None:
        if not isinstance(self.cpu, str):
            raise ConfigError(
                f"cpu takes a text, not {quoted(self.cpu)}; use host, max or host,-avx"
            )
        for name in ("devices", "drives", "nets", "shares", "consoles"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(v, str) for v in values):
                raise ConfigError(
                    f"{name} takes a tuple of texts, not {quoted(values)}; one of them is ('...',)"
                )
        if not isinstance(self.rng, bool):
            raise ConfigError(
                f"rng takes True or False, not {quoted(self.rng)}; leave it out for no"
            )
        if self.balloon is not None and not isinstance(self.balloon, int):
            raise ConfigError(
                f"balloon takes a number of bytes, not {quoted(self.balloon)}; use parse_size()"
            )
        if self.symbols is not None and not isinstance(self.symbols, str | os.PathLike):
            raise ConfigError(
                f"symbols takes the path of a file, not {quoted(self.symbols)}; use a text"
            )
        if self.vsock is not None and not isinstance(self.vsock, str):
            raise ConfigError(f"vsock takes a text, not {quoted(self.vsock)}; use path=PATH,cid=3")

    def _check_virtio(self) -> None:
        if not self.virtio_devices:
            return
        if not 0 <= (self.balloon or 0) <= self.memory:
            raise ConfigError(
                f"a balloon of {self.balloon} bytes cannot be; use 0 to {self.memory}, the memory"
            )
        if 0 < (self.balloon or 0) < PAGE_SIZE:
            raise ConfigError(
                f"a balloon of {self.balloon} bytes is no page; use --balloon {self.balloon}M"
            )
        self._check_options()
        if self.machine == "bare":
            raise ConfigError("the bare machine has no virtio devices; use --machine microvm")
        if self.virtio_devices > len(VIRTIO_GSIS):
            raise ConfigError(
                f"{self.virtio_devices} virtio devices are too many; use {len(VIRTIO_GSIS)} at most"
            )

    def _check_options(self) -> None:
        """Those with options of their own. Only what is asked for is loaded."""
        if self.drives:
            from vmexit.machine.drive import Drive

            for text in self.drives:
                Drive.parse(text)
        if self.nets:
            from vmexit.machine.net import NetOptions

            for text in self.nets:
                NetOptions.parse(text)
        if self.vsock is not None:
            from vmexit.machine.vsock import VsockOptions

            VsockOptions.parse(self.vsock)
        if self.shares:
            from vmexit.machine.share import Share

            Share.parse_all(self.shares)
        if self.consoles:
            from vmexit.machine.console import ConsoleOptions

            ConsoleOptions.parse_all(self.consoles, self.serial)

    @property
    def virtio_devices(self) -> int:
        """How many there are."""
        several = len(self.drives) + len(self.nets) + len(self.shares)
        single = (self.rng, self.balloon is not None, self.vsock is not None, bool(self.consoles))
        return several + sum(single)

    def _check_start(self) -> None:
        """What is to run is one thing, and what belongs to a kernel has one."""
        if self.image is not None:
            for name, value in (("--firmware", self.firmware), ("--kernel", self.kernel)):
                if value is not None:
                    raise ConfigError(f"an image and {name} both want to start; give one of them")
        if self.firmware is not None and self.kernel is not None:  # which boots it by itself
            if self.machine == "bare":
                raise ConfigError(
                    "the bare machine cannot tell firmware of a kernel; use --machine microvm"
                )
            if self.protocol != "auto":
                raise ConfigError("firmware boots a kernel its own way; leave out --protocol")
        if self.kernel is None:
            for name, value in (("--initrd", self.initrd), ("--append", self.append or None)):
                if value is not None:
                    raise ConfigError(f"{name} is for a kernel; give --kernel, too")
        if self.protocol not in PROTOCOLS:
            raise ConfigError(
                f"there is no boot protocol {quoted(self.protocol)}; use {', '.join(PROTOCOLS)}"
            )

    def _check_memory(self) -> None:
        size = self.memory
        if size <= 0:
            raise ConfigError(f"memory of {size} bytes cannot hold a guest; use --memory 128M")
        if size % PAGE_SIZE:
            raise ConfigError(
                f"memory of {size} bytes is not made of whole {PAGE_SIZE}-byte pages; "
                "use --memory "
                + (f"{size}M" if size < PAGE_SIZE else f"{round(size / PAGE_SIZE) * PAGE_SIZE}")
            )
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > host:
            raise ConfigError(
                f"memory of {size} bytes is more than this host has ({host} bytes); "
                "use a smaller --memory"
            )
        if size > PHYSICAL_END - MMIO_HOLE_END:
            raise ConfigError(
                f"memory of {size} bytes does not fit below {PHYSICAL_END:#x}; "
                "use a smaller --memory"
            )
