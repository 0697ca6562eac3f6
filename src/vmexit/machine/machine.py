"""`Machine`: a virtual machine that a Python program holds."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmexit.accel.base import Vcpu
from vmexit.arch.x86.code import dump, next_instruction
from vmexit.arch.x86.layout import FLAT_ENTRY, FLAT_LOAD_ADDRESS, PHYSICAL_END
from vmexit.arch.x86.paging import translate
from vmexit.arch.x86.registers import (
    GENERAL,
    SEGMENTS,
    TABLES,
    Segment,
    SystemRegisters,
    Table,
)
from vmexit.boot import flat
from vmexit.boot.image import read_image
from vmexit.core.errors import ConfigError, ImageError, VmexitError
from vmexit.core.memory import GuestMemory
from vmexit.core.trace import ExitObserver
from vmexit.machine import builder
from vmexit.machine.balloon import MemoryBalloon
from vmexit.machine.config import (
    DEFAULT_DEBUG_EXIT,
    DEFAULT_MEMORY,
    MachineConfig,
    parse_size,
)
from vmexit.machine.console import GuestConsole
from vmexit.machine.hooks import Hook, ReadHook, Within, WriteHook
from vmexit.machine.runner import Runner, StopRequest
from vmexit.machine.stop import Stop, StopReason

if TYPE_CHECKING:
    from vmexit.core.chrome_trace import ChromeTrace


class RegisterView:
    """The registers of a vCPU by name: read and write `rax`, `rip`, `cr3`, `cs`, `gdt`, …

    64-bit values; a segment is a `Segment`, a descriptor table a `Table`. Only while the vCPU
    does not run, or from within one of its own accesses; VmexitError otherwise. Within an access,
    RIP is that of its instruction or of the next one; within a write, general registers may be
    written, and within a read none, nor RIP, RFLAGS or system registers ever.
    """

    __slots__ = ("_machine", "_vcpu")
    _machine: "Machine"
    _vcpu: Vcpu

    if TYPE_CHECKING:
        rax: int
        rbx: int
        rcx: int
        rdx: int
        rsi: int
        rdi: int
        rsp: int
        rbp: int
        r8: int
        r9: int
        r10: int
        r11: int
        r12: int
        r13: int
        r14: int
        r15: int
        rip: int
        rflags: int
        cs: Segment
        ds: Segment
        es: Segment
        fs: Segment
        gs: Segment
        ss: Segment
        tr: Segment
        ldt: Segment
        gdt: Table
        idt: Table
        cr0: int
        cr2: int
        cr3: int
        cr4: int
        cr8: int
        efer: int

    def __init__(self, machine: "Machine", vcpu: Vcpu) -> None:
        object.__setattr__(self, "_machine", machine)
        object.__setattr__(self, "_vcpu", vcpu)

    def __getattr__(self, name: str) -> int | Segment | Table:
        if name.startswith("_"):  # copy, pickle and the like ask for these
            raise AttributeError(name)
        self._machine._require_still(self._vcpu.index)
        if name in GENERAL:
            return self._vcpu.registers()[name]
        if name in SystemRegisters._fields:
            value: int | Segment | Table = getattr(self._vcpu.system_registers(), name)
            return value
        raise AttributeError(f"there is no register {name!r}")

    def __setattr__(self, name: str, value: int | Segment | Table) -> None:
        self.update(**{name: value})

    def update(self, **values: int | Segment | Table) -> None:
        """Write several registers at once: `update(cr0=…, efer=…)`, where none alone is valid.

        Raises AttributeError for a name that is no register, TypeError or ValueError for a value
        that it cannot have, HostError if the accelerator refuses it.
        """
        self._machine._require_still(self._vcpu.index)
        general: dict[str, int] = {}
        system: dict[str, int | Segment | Table] = {}
        for name, value in values.items():
            if name in GENERAL:
                general[name] = _number(name, value) & _MASK
            elif name in SystemRegisters._fields:
                kind = Segment if name in SEGMENTS else Table if name in TABLES else int
                if kind is int:
                    value = _number(name, value) & _MASK
                elif isinstance(value, Segment | Table) and isinstance(value, kind):
                    _check_fields(name, value)
                else:
                    raise TypeError(f"{name} takes a {kind.__name__}, not {value!r}")
                system[name] = value
            else:
                raise AttributeError(f"there is no register {name!r}")
        if self._machine.running and (
            self._machine._within.read or system or general.keys() & {"rip", "rflags"}
        ):
            names = ", ".join(values)
            raise VmexitError(f"{names} cannot be written within this access; stop() first")
        if system:
            fields = self._vcpu.system_registers()._asdict()
            self._vcpu.set_system_registers(SystemRegisters(**(fields | system)))
        if general:
            self._vcpu.set_registers(self._vcpu.registers() | general)

    def __repr__(self) -> str:
        return self._machine.dump(self._vcpu.index)

    def __dir__(self) -> list[str]:
        return [*GENERAL, *SystemRegisters._fields]

    def as_dict(self) -> dict[str, int | Segment | Table]:
        """All registers by name."""
        self._machine._require_still(self._vcpu.index)
        return {**self._vcpu.registers(), **self._vcpu.system_registers()._asdict()}


_MASK = 0xFFFF_FFFF_FFFF_FFFF


def _number(name: str, value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{name} takes a number, not {value!r}")
    if not -(1 << 63) <= value <= _MASK:
        raise ValueError(f"{name} has 64 bits; {value:#x} has more")
    return value


# Bits of the fields of a segment and of a table.
_WIDTHS = {"selector": 16, "base": 64, "type": 4, "dpl": 2}


def _check_fields(name: str, value: Segment | Table) -> None:
    limit = 32 if isinstance(value, Segment) else 16
    for field, number in value._asdict().items():
        bits = limit if field == "limit" else _WIDTHS.get(field, 1)
        if not isinstance(number, int) or not 0 <= number < 1 << bits:
            raise ValueError(f"{name}: {field} has {bits} bits; {number!r} does not fit")


class MachineVcpu:
    """One vCPU of a machine: its number, and its registers in `regs`."""

    def __init__(self, machine: "Machine", vcpu: Vcpu) -> None:
        self.index = vcpu.index
        self.regs = RegisterView(machine, vcpu)

    def __repr__(self) -> str:
        return f"<vCPU {self.index}>"


class Machine:
    """A virtual machine: guest memory, vCPUs, devices. Paused until `run()`.

    It holds descriptors, memory and a thread until `close()`, which `with` calls.

    >>> with Machine(memory="1M", accel="auto") as vm:
    ...     vm.load_bytes(b"\\xb0\\x2a\\xe6\\x10\\xf4", at=0x1000)  # mov al, 42; out 0x10, al; hlt
    ...     vm.on_pio(0x10, write=lambda a: print(a.value))
    ...     vm.run(timeout=5).reason
    42
    <StopReason.HALT: 'halt'>
    """

    def __init__(
        self,
        memory: int | str = DEFAULT_MEMORY,
        accel: str = "auto",
        *,
        image: str | os.PathLike[str] | None = None,
        load_address: int = FLAT_LOAD_ADDRESS,
        entry: int | None = None,
        mode: str = "real",
        firmware: str | os.PathLike[str] | None = None,
        serial: str | None = None,
        debugcon: tuple[int, str] | None = None,
        debug_exit: int | None = DEFAULT_DEBUG_EXIT,
        segment: int | None = None,
        machine: str | None = None,
        smp: int = 1,
        kernel: str | os.PathLike[str] | None = None,
        initrd: str | os.PathLike[str] | None = None,
        append: str = "",
        protocol: str = "auto",
        cpu: str = "host",
        devices: tuple[str, ...] = (),
        drives: tuple[str, ...] | list[str] = (),
        nets: tuple[str, ...] | list[str] = (),
        shares: tuple[str, ...] | list[str] = (),
        rng: bool = False,
        balloon: int | str | None = None,
        vsock: str | None = None,
        consoles: tuple[str, ...] | list[str] = (),
        observer: ExitObserver | None = None,
    ) -> None:
        """Build it; nothing runs yet.

        `memory` is a size (`"128M"`, bytes); `accel` is `auto`, `kvm` or `soft`. A flat `image`
        is loaded at `load_address`, and vCPU 0 starts at `entry` (default 0x1000) in CPU mode
        `mode` (`real`, `protected`, `long`); in real mode CS is `segment`, or such that IP is 0;
        `firmware` is a ROM that starts at the reset vector instead.
        `serial` puts a UART at port 0x3f8 (`stdio`, `null`, `file:PATH`, `unix:PATH`,
        `tcp:HOST:PORT`, `pty`), `debugcon` a debug console (port, and the path of a file or ""
        for standard output); `debug_exit` is the port that ends a run, None for no such port.
        A Linux `kernel` starts with its `initrd` and the command line `append`, by boot `protocol`
        (`auto`, `pvh`, `elf`, `64`, `32`, `16`), on `machine` `microvm`: a PC without PCI, with
        `smp` vCPUs. The other machine is `bare`, which has no interrupts. `cpu` is `host`, all that
        the accelerator has, with features left out: `host,-avx`. `devices` are more of them, by
        name: `testdev`, the test device of QEMU that test suites for KVM look for.
        `drives` are disks, `file=PATH[,readonly=on][,serial=S]`, `nets` network interfaces,
        `user[,hostfwd=tcp:127.0.0.1:8080-:80]` or `tap=NAME`, and `rng` is a source of entropy.
        `balloon` is how much memory to take back from the guest at first, None for no balloon.
        `vsock` is `path=PATH[,cid=N]`: Unix sockets of the host that lead to sockets of the guest.
        `consoles` are virtio consoles and, with a name, plain ports: `WHERE[,name=NAME]`, WHERE as
        for `serial`.
        `shares` are folders that the guest mounts by 9P, `TAG=PATH[,readonly=on]`.
        `observer` is told of every exit.

        Raises ConfigError, ImageError, or HostError where no accelerator is usable.
        """
        config = MachineConfig(
            memory=parse_size(memory),
            accel=accel,
            image=image,
            load_address=load_address,
            entry=FLAT_ENTRY if entry is None else entry,
            mode=mode,
            firmware=firmware,
            serial=serial,
            debugcon=debugcon,
            debug_exit=debug_exit,
            segment=segment,
            machine=machine or ("bare" if kernel is None else "microvm"),
            smp=smp,
            kernel=kernel,
            initrd=initrd,
            append=append,
            protocol=protocol,
            cpu=cpu,
            devices=devices,
            drives=_tuple(drives),
            nets=_tuple(nets),
            shares=_tuple(shares),
            rng=rng,
            balloon=None if balloon is None else parse_size(balloon),
            vsock=vsock,
            consoles=_tuple(consoles),
        )
        self._build(config, observer)
        self._entry = entry  # None: not asked for

    @classmethod
    def from_config(cls, config: MachineConfig, observer: ExitObserver | None = None) -> "Machine":
        """A machine as `config` describes it; raises what the constructor raises."""
        machine = cls.__new__(cls)
        machine._build(config, observer)
        return machine

    def _build(self, config: MachineConfig, observer: ExitObserver | None) -> None:
        self.config = config
        self._entry = config.entry if config.image is not None else None
        self._closed = False
        self._within = Within()
        self._loaded = any(x is not None for x in (config.image, config.firmware, config.kernel))
        self._request = StopRequest()
        self._parts = parts = builder.build(config, self._request, observer)
        self._runner = Runner(parts.executors, self._request, parts.running)
        self.vcpus: Sequence[MachineVcpu] = [MachineVcpu(self, vcpu) for vcpu in parts.vcpus]

    @property
    def accel(self) -> str:
        """The accelerator in use, `kvm` or `soft`."""
        return self._parts.accel

    @property
    def accel_reason(self) -> str:
        """Why it is that one."""
        return self._parts.why

    @property
    def serial_where(self) -> str:
        """How to reach the serial port, for a pseudo-terminal or a socket; else empty."""
        return self._parts.serial

    @property
    def without_driver(self) -> list[str]:
        """Virtio devices for which the guest had no driver so far: `disk0`, `net0`, …"""
        return self._parts.undriven()

    @property
    def balloon(self) -> MemoryBalloon:
        """The memory balloon: `vm.balloon.set_target(bytes)`, `.actual`, `.statistics`.

        Raises ConfigError for a machine without one.
        """
        if self._parts.balloon is None:
            raise ConfigError("this machine has no memory balloon; make it with balloon=0")
        return self._parts.balloon

    @property
    def console(self) -> GuestConsole:
        """The virtio consoles: `vm.console.resize(columns, rows)`.

        Raises ConfigError for a machine without one.
        """
        if self._parts.console is None:
            raise ConfigError('this machine has no virtio console; make it with consoles=["pty"]')
        return self._parts.console

    @property
    def console_where(self) -> Sequence[str]:
        """How to reach each of `consoles`, in their order; empty where that is plain."""
        return self._parts.console_where

    @property
    def memory(self) -> GuestMemory:
        """Guest physical memory: `vm.memory[gpa:end]`, `vm.memory.read_u32(gpa)`, …"""
        return self._parts.memory

    @property
    def running(self) -> bool:
        """Whether a `run()` is under way."""
        return self._runner.busy

    @property
    def unclaimed(self) -> int:
        """How many accesses no device answered: reads gave all ones, writes went nowhere."""
        buses = (self._parts.pio, self._parts.mmio)
        return sum(bus.unclaimed_reads + bus.unclaimed_writes for bus in buses)

    def load(
        self,
        path: str | os.PathLike[str],
        at: int = FLAT_ENTRY,
        *,
        entry: int | None = None,
        mode: str | None = None,
    ) -> None:
        """Put the file at `path` into memory at GPA `at`; see `load_bytes`."""
        self.load_bytes(read_image(path, limit=self.config.memory), at, entry=entry, mode=mode)

    def load_bytes(
        self,
        data: bytes | bytearray | memoryview,
        at: int = FLAT_ENTRY,
        *,
        entry: int | None = None,
        mode: str | None = None,
    ) -> None:
        """Put `data` into memory at GPA `at`.

        vCPU 0 starts at the first thing loaded: where the machine was told to, else at its first
        byte. `entry` or `mode` say otherwise, then or later. Raises ImageError if it does not fit.
        """
        self._require_still()
        raw = bytes(data)
        if not raw:
            raise ImageError("there is nothing to load: 0 bytes; give some")
        flat.load(self.memory, raw, at)
        if self._loaded and entry is None and mode is None:
            return
        mode = self.config.mode if mode is None else mode
        if mode not in flat.MODES:
            raise ConfigError(f"there is no CPU mode {mode!r}; use real, protected or long")
        if entry is None:
            entry = at if self._entry is None or self._loaded else self._entry
        if not 0 <= entry < PHYSICAL_END:
            raise ConfigError(f"entry {entry:#x} is no guest physical address; use a valid one")
        segment = self.config.segment if mode == "real" else None
        first = flat.start(self.memory, entry, mode, range(at, at + len(raw)), segment)
        vcpu = self._parts.vcpus[0]
        vcpu.set_system_registers(first.system)
        vcpu.set_registers(first.registers)
        self._loaded = True

    def on_pio(
        self,
        port: int,
        *,
        read: ReadHook | None = None,
        write: WriteHook | None = None,
        count: int = 1,
    ) -> None:
        """Call back when the guest accesses one of `count` ports from `port` on.

        `write` gets an `Access` with the value; `read` gets one, too, and returns what the guest
        reads. Raises ConfigError where another device has the port.
        """
        self._require_still()
        _check_hooks(read, write)
        if not 0 <= port <= port + count - 1 <= 0xFFFF:
            raise ConfigError(f"ports {port:#x}+{count} are not within 0 to 0xffff")
        hook = Hook(port, read, write, self._within)
        self._parts.pio.attach(port, count, hook, overhang=True, name=f"on_pio {port:#x}")

    def on_mmio(
        self,
        gpa: int,
        size: int,
        *,
        read: ReadHook | None = None,
        write: WriteHook | None = None,
    ) -> None:
        """Call back when the guest accesses `[gpa, gpa + size)`, where there is no RAM."""
        self._require_still()
        _check_hooks(read, write)
        if not 0 <= gpa < gpa + size <= PHYSICAL_END:
            raise ConfigError(
                f"MMIO {gpa:#x}+{size:#x} is not within 0 to {PHYSICAL_END - 1:#x}; use another"
            )
        for region in self.memory.regions:
            if gpa < region.end and region.gpa < gpa + size and not region.readonly:
                raise ConfigError(
                    f"MMIO {gpa:#x}..{gpa + size - 1:#x} lies in RAM, which answers first; use an "
                    f"address from {region.end:#x} on, or less memory"
                )
        hook = Hook(gpa, read, write, self._within)
        self._parts.mmio.attach(gpa, size, hook, overhang=True, name=f"on_mmio {gpa:#x}")

    def run(self, timeout: float | None = None) -> Stop:
        """Run the guest until it stops, `stop()` is called, or `timeout` seconds have passed.

        Returns why. What a callback raises is raised here; so is KeyboardInterrupt. In every case
        the machine is paused afterwards, at the end of an instruction, and can go on.
        """
        self._require_open()
        if timeout is not None and not timeout >= 0:
            raise ConfigError(f"a timeout of {timeout} s cannot be; use 0 or more, or None")
        stop = self._runner.run(timeout)
        if stop.crashed:
            stop = stop._replace(dump=self.dump(stop.vcpu))
        return stop

    def begin_trace(self, trace: "ChromeTrace") -> None:
        """Tell `trace` what this machine is, and from now on which of its memory was written.

        Before the first run, once; `trace` is one of the observers.
        """
        self._require_still()
        from vmexit.machine.tracing import begin

        begin(trace, self._parts, self._request.fail)

    @property
    def stopping(self) -> bool:
        """Whether a run under way is to end: what writes for it should not wait any more."""
        return self._request.pending()

    def stop(self) -> bool:
        """Make the `run()` under way return, from any thread or callback; False without one."""
        return self._request(Stop(StopReason.STOPPED))

    def translate(self, gva: int, vcpu: int = 0) -> int | None:
        """The GPA of guest virtual address `gva` by the page tables of `vcpu`; None if unmapped.

        From a GPA, `memory.hva(gpa)` leads on to the host virtual address.
        """
        self._require_still(vcpu)
        return translate(self.memory, self._parts.vcpus[vcpu].system_registers(), gva)

    def dump(self, vcpu: int = 0) -> str:
        """All registers and the next instruction, as text."""
        self._require_still(vcpu)
        registers = self._parts.vcpus[vcpu].registers()
        system = self._parts.vcpus[vcpu].system_registers()
        return dump(registers, system, next_instruction(self.memory, registers, system)[1])

    def close(self) -> None:
        """Stop it and free everything; the machine is of no use afterwards."""
        if not self._closed:
            self._runner.close()
            self._closed = True
            self._parts.closer.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "running" if self.running else "paused"
        return f"<Machine on {self.accel}, {self.config.memory >> 20} MiB, {state}>"

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise VmexitError("this machine is closed; make a new one")

    def _require_still(self, vcpu: int | None = None) -> None:
        """No vCPU runs, or the caller is within an access: of `vcpu`, if that is given."""
        self._require_open()
        if not self._runner.busy:
            return
        if not self._runner.in_vcpu_thread():
            raise VmexitError("this machine runs; stop() it first, or do it in a callback")
        if vcpu is not None and not self._runner.holds(vcpu):
            raise VmexitError(
                f"vCPU {vcpu} runs, and this is an access of another one; stop() it first"
            )


def _tuple(texts: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return tuple(texts) if isinstance(texts, list) else texts


def _check_hooks(read: ReadHook | None, write: WriteHook | None) -> None:
    for name, function in (("read", read), ("write", write)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} takes a function, not {function!r}")
