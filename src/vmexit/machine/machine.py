"""`Machine`: a virtual machine that a Python program holds."""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from vmexit.accel.base import Point, Vcpu, Way
from vmexit.arch.x86.layout import FLAT_ENTRY, FLAT_LOAD_ADDRESS, PHYSICAL_END
from vmexit.boot import flat
from vmexit.boot.image import read_image
from vmexit.core.errors import ConfigError, ImageError, VmexitError
from vmexit.core.memory import GuestMemory
from vmexit.core.threads import Workers
from vmexit.core.trace import ExitObserver
from vmexit.machine import builder
from vmexit.machine.background import Background
from vmexit.machine.balloon import MemoryBalloon
from vmexit.machine.config import (
    DEFAULT_DEBUG_EXIT,
    DEFAULT_MEMORY,
    MachineConfig,
    parse_size,
)
from vmexit.machine.counters import CounterReader, MachineCounters
from vmexit.machine.debug import ALL, DebuggedRunner, Turn, check_point
from vmexit.machine.events import EventKind, RunState, Subscriber, Subscribers
from vmexit.machine.hooks import Hook, ReadHook, Within, WriteHook
from vmexit.machine.inspection import Inspection
from vmexit.machine.lifecycle import Decision, Lifecycle
from vmexit.machine.loaded import Loaded, Start
from vmexit.machine.registers import MachineVcpu
from vmexit.machine.runner import Runner, StopRequest
from vmexit.machine.stop import Stop, StopReason
from vmexit.machine.terminal import Terminal
from vmexit.machine.until import Until, run_until

if TYPE_CHECKING:
    from vmexit.core.chrome_trace import ChromeTrace
    from vmexit.machine.snapshot import Snapshot


class Machine(Inspection):
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
        symbols: str | os.PathLike[str] | None = None,
        dirty_ring: int = 0,
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
        name: `testdev`, the test device of QEMU that test suites for KVM look for, `pvpanic`, by
        which a guest tells that it panics, and `vmgenid`, which tells it that it is a copy.
        `drives` are disks, `file=PATH[,readonly=on][,serial=S]`, `nets` network interfaces,
        `user[,hostfwd=tcp:127.0.0.1:8080-:80]` or `tap=NAME`, and `rng` is a source of entropy.
        `balloon` is how much memory to take back from the guest at first, None for no balloon.
        `vsock` is `path=PATH[,cid=N]`: Unix sockets of the host that lead to sockets of the guest.
        `consoles` are virtio consoles and, with a name, plain ports: `WHERE[,name=NAME]`, WHERE as
        for `serial`.
        `shares` are folders that the guest mounts by 9P, `TAG=PATH[,readonly=on]`.
        `symbols` is a file with names for addresses: see the property.
        `dirty_ring` is how many entries KVM's ring of written pages has for each vCPU, a power of
        two from 1024 on: `reset_to()` reads that in the place of a log with a bit for each page of
        memory, which is faster for few pages of much memory. 0 is the log.
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
            symbols=symbols,
            dirty_ring=dirty_ring,
        )
        self._build(config, observer)
        self._entry = entry  # None: not asked for

    @classmethod
    def from_config(cls, config: MachineConfig, observer: ExitObserver | None = None) -> "Machine":
        """A machine as `config` describes it; raises what the constructor raises."""
        machine = cls.__new__(cls)
        machine._build(config, observer)
        return machine

    @classmethod
    def from_snapshot(
        cls,
        snapshot: "Snapshot",
        config: MachineConfig,
        observer: ExitObserver | None = None,
        ago: int = 0,
    ) -> "Machine":
        """A machine as `config` describes it, where `snapshot` is; see `Snapshot.clone()`.

        For the guest that was so many nanoseconds `ago`.
        Raises ConfigError if the two do not fit together, and what the constructor raises.
        """
        machine = cls.__new__(cls)
        machine._build(config, observer, snapshot.restored, snapshot.workers)
        try:
            snapshot.require_such(machine._parts)
            machine._take_over(snapshot, ago)
        except BaseException:
            machine.close()
            raise
        return machine

    def _build(
        self,
        config: MachineConfig,
        observer: ExitObserver | None,
        restored: builder.Restored | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.config = config
        self._entry = config.entry if config.image is not None else None
        self._closed = False
        self._half = False  # a reset has failed after it began
        self._fits: Snapshot | None = None  # one that it can go back to
        self.within = Within()
        self._loaded = any(x is not None for x in (config.image, config.firmware, config.kernel))
        self._request = StopRequest()
        subscribers = Subscribers(self._request.fail)
        workers = workers or Workers(keep=False)
        self._parts = parts = builder.build(
            config, self._request, observer, subscribers.tell, workers, restored
        )
        self._runner = Runner(parts.vm.executors, self._request, parts.running, workers)
        self._debug = DebuggedRunner(self._runner, parts.vm, parts.vcpus, parts.linked)
        self._life = Lifecycle(
            self._debug, self._request, self._begin_again, self._describe, subscribers
        )
        self._reader = CounterReader(
            config.memory, parts.memory, parts.pio, parts.mmio, parts.balloon, parts.virtio_counters
        )
        self._terminal = Terminal(self, parts.taps[0], parts.console) if parts.taps else None
        self._loads: list[tuple[int, bytes]] = []  # what load_bytes() did, for a reset
        self._start: Start | None = None
        self._background: Background | None = None
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
    def console(self) -> Terminal:
        """The guest's console: `vm.console.expect("login:")`, `vm.console.send("root\\n")`.

        Raises ConfigError for a machine that has neither serial port nor virtio console.
        """
        if self._terminal is None:
            raise ConfigError('this machine has no console; make it with serial="null"')
        return self._terminal

    def shell(self, command: str, timeout: float = 60) -> str:
        """What `command` prints in the guest's shell: `vm.console.shell(command)`."""
        return self.console.shell(command, timeout)

    @property
    def console_where(self) -> Sequence[str]:
        """How to reach each of `consoles`, in their order; empty where that is plain."""
        return self._parts.console_where

    @property
    def memory(self) -> GuestMemory:
        """Guest physical memory: `vm.memory[gpa:end]`, `vm.memory.read_u32(gpa)`, …"""
        return self._parts.memory

    def _vcpus(self) -> Sequence[Vcpu]:
        return self._parts.vcpus

    @property
    def running(self) -> bool:
        """Whether vCPUs run: a `run()` is under way, and not paused."""
        return self._runner.busy

    @property
    def active(self) -> bool:
        """Whether a `run()` is under way, paused or not."""
        return self._life.active

    @property
    def state(self) -> RunState:
        """What it is doing: created, running, paused, shutdown, crashed, closed."""
        return self._life.state

    @property
    def unclaimed(self) -> int:
        """How many accesses no device answered: reads gave all ones, writes went nowhere."""
        buses = (self._parts.pio, self._parts.mmio)
        return sum(bus.unclaimed_reads + bus.unclaimed_writes for bus in buses)

    def counters(self) -> MachineCounters:
        """How much has happened so far; from any thread, also while vCPUs run, and never waits.

        Exits are counted by an observer: `ExitStats`, whose `snapshot()` is such numbers, too.
        """
        return self._reader.read(self.state)

    def device_at(self, address: int, *, mmio: bool) -> str:
        """The name of the device at a port, or at a GPA; empty where there is none."""
        return (self._parts.mmio if mmio else self._parts.pio).name_at(address)

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
        self.require_still()
        raw = bytes(data)
        if not raw:
            raise ImageError("there is nothing to load: 0 bytes; give some")
        flat.load(self.memory, raw, at)
        if not (self._loaded and entry is None and mode is None):
            mode = self.config.mode if mode is None else mode
            if mode not in flat.MODES:
                raise ConfigError(f"there is no CPU mode {mode!r}; use real, protected or long")
            if entry is None:
                entry = at if self._entry is None or self._loaded else self._entry
            if not 0 <= entry < PHYSICAL_END:
                raise ConfigError(f"entry {entry:#x} is no guest physical address; use a valid one")
            start = Start(entry, mode, range(at, at + len(raw)))
            self._go_to(start)
            self._start = start
            self._loaded = True
        self._loads.append((at, raw))

    def _go_to(self, start: Start) -> None:
        segment = self.config.segment if start.mode == "real" else None
        first = flat.start(self.memory, start.entry, start.mode, start.image, segment)
        builder.start_at(self._parts.vcpus[0], first)

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
        self.require_still()
        _check_hooks(read, write)
        if not 0 <= port <= port + count - 1 <= 0xFFFF:
            raise ConfigError(f"ports {port:#x}+{count} are not within 0 to 0xffff")
        hook = Hook(port, read, write, self.within)
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
        self.require_still()
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
        hook = Hook(gpa, read, write, self.within)
        self._parts.mmio.attach(gpa, size, hook, overhang=True, name=f"on_mmio {gpa:#x}")

    def run(self, timeout: float | None = None) -> Stop:
        """Run the guest until it stops, `stop()` is called, or `timeout` seconds have passed.

        Returns why. What a callback raises is raised here; so is KeyboardInterrupt. In every case
        the machine is paused afterwards, at the end of an instruction, and can go on.
        Other threads may `pause()` and `resume()` it meanwhile, which does not end this.
        """
        return self._run(timeout, ALL)

    def run_until(
        self,
        *,
        pio: int | None = None,
        mmio: int | None = None,
        address: int | None = None,
        symbol: str | None = None,
        text: str | None = None,
        timeout: float | None = None,
    ) -> Stop:
        """As `run()`, and the reason is UNTIL once one thing has happened.

        That is an access to the port `pio` or to the GPA `mmio`, which is completed first; that a
        vCPU is about to execute what is at the linear `address`, or at a `symbol`; or that the
        guest has written `text` to its console from now on. Accesses that the kernel answers (its
        interrupt controllers, notifications of virtio) are not seen.
        """
        buses = self._parts.pio, self._parts.mmio
        until = Until(pio, mmio, address, symbol, text)
        return run_until(self, until, timeout, buses, self._happened)

    def _happened(self) -> None:
        self._request(Stop(StopReason.UNTIL, self._runner.vcpu_here()))

    def step(self, vcpu: int = 0, timeout: float | None = None) -> Stop:
        """Execute one instruction of `vcpu`, while the others stand still.

        The reason is DEBUG; another one if the guest, `stop()` or the timeout came between.
        """
        self._vcpu(vcpu)
        return self._run(timeout, Turn(vcpu, vcpu))

    def _run(self, timeout: float | None, turn: Turn) -> Stop:
        self._require_open()
        if self._half:
            raise VmexitError("going back failed half-way; reset() this machine, or close it")
        return self._life.run(_checked(timeout), turn)

    def _describe(self, stop: Stop) -> Stop:
        return stop._replace(dump=self.dump(stop.vcpu)) if stop.crashed else stop

    def start(self, timeout: float | None = None) -> None:
        """Begin a `run()` in a thread of its own; `wait()` has what it returns."""
        self._require_open()
        if self._background is not None and self._background.alive:
            raise VmexitError("this machine was started already; wait() for it, or stop() it first")
        self._background = Background(lambda: self.run(timeout))

    def wait(self, timeout: float | None = None) -> Stop | None:
        """What the run that `start()` began has returned, or raised; None if it still goes on."""
        if self._background is None:
            raise VmexitError("nothing has started this machine; start() it")
        return self._background.wait(_checked(timeout))

    def pause(self) -> None:
        """Hold all vCPUs. Returns once none runs, and `run()` waits until somebody resumes it.

        From any thread but that of `run()`. Before a run, it is the next one that begins paused.
        """
        self._require_outside()
        self._life.pause()

    def resume(self, *, step: int | None = None, only: int | None = None) -> None:
        """Let a paused run go on; with `step`, for one instruction of that vCPU.

        All vCPUs run until then, or `only` one. Raises VmexitError if no `run()` is under way.
        """
        self._require_open()
        for vcpu in (step, only):
            self._vcpu(vcpu or 0)
        if self._runner.in_vcpu_thread():
            return  # it runs; and who is about to pause it waits for this thread
        self._life.resume(Turn(step, only))

    def paused(self) -> AbstractContextManager[None]:
        """`with vm.paused():` no vCPU runs within, and nobody else resumes it."""
        self._require_outside()
        return self._life.paused()

    def reset(self) -> None:
        """As the reset button: devices, vCPUs and memory as at the start, images read again.

        From any thread but that of `run()`; what ran goes on from the beginning. Raises what
        making a machine raises if an image is not as it was; the machine stays paused then.
        """
        self._require_outside()
        self._life.reset()

    def _begin_again(self) -> None:
        self._go_back(self._parts.reset)
        for at, data in self._loads:
            flat.load(self.memory, data, at)
        if self._start is not None:
            self._go_to(self._start)

    def _go_back(self, back: Callable[[], None]) -> None:
        self._half = True
        back()
        self._half = False
        self._debug.forget()

    def snapshot(self) -> "Snapshot":
        """All of it as it is now: to go back to, to clone, to save. See `Snapshot`.

        From any thread but that of `run()`; what ran goes on. Raises ConfigError naming a device
        whose state cannot be saved, HostError without memory for it.
        """
        self._require_outside()
        from vmexit.machine.snapshot import Snapshot

        with self._life.paused():
            loaded = Loaded(self._loads.copy(), self._start)
            return Snapshot.capture(self.config, self._parts, loaded)

    def reset_to(self, snapshot: "Snapshot") -> None:
        """Put it back where `snapshot` is; it runs on from there if it ran before.

        What is outside of it stays as it is: callbacks, files, connections. From any thread but
        that of `run()`; or from a callback of `on_pio` or `on_mmio`, and then it happens once that
        access is over, and the run goes on from there: the fastest way to go back again and again.
        Raises ConfigError if the snapshot is of a machine with other parts, or if a disk cannot go
        back; VmexitError in a callback if there are breakpoints, or other vCPUs on KVM.
        """
        if self._runner.in_vcpu_thread():
            self._require_open()
            if self._debug.armed:
                raise VmexitError(
                    "with breakpoints, and in steps, a callback cannot go back; stop() the "
                    "machine, and do it then"
                )
            self._require_such(snapshot)
            self._runner.detour(partial(self._go_back_within, snapshot))
            return
        self._require_outside()
        self._require_such(snapshot)
        self._life.reset(partial(self._take_over, snapshot))

    def _require_such(self, snapshot: "Snapshot") -> None:
        """Raises ConfigError unless it can go back there."""
        if snapshot is self._fits:
            snapshot.require_still_such(self._parts)
            return
        from vmexit.machine.machine_state import require_own_disks

        require_own_disks(self.config)
        snapshot.require_such(self._parts)
        self._fits = snapshot

    def _go_back_within(self, snapshot: "Snapshot") -> None:
        self._parts.hold(True)
        try:
            self._take_over(snapshot)
        finally:
            self._parts.hold(False)
        self._life.has_gone_back()

    def _take_over(self, snapshot: "Snapshot", ago: int = 0) -> None:
        snapshot.require_open()
        self._go_back(partial(snapshot.put_into, self._parts, ago))
        loads, self._start = snapshot.loaded
        self._loads, self._loaded = loads.copy(), True

    def press_power_button(self) -> None:
        """Ask the guest to shut down, by ACPI's power button. Raises ConfigError without one."""
        self._require_open()
        if self._parts.power_button is None:
            raise ConfigError("this machine has no power button; use --machine microvm")
        self._parts.power_button()
        self._life.subscribers.tell(EventKind.POWERDOWN)

    def renew_generation(self) -> None:
        """Tell the guest that it is a copy, by another generation ID: it renews its entropy.

        Raises ConfigError for a machine without the device: `devices=("vmgenid",)`.
        """
        self._require_open()
        if self._parts.renew_generation is None:
            raise ConfigError(
                "this machine has no generation ID; make it with --device vmgenid, and --machine "
                "microvm"
            )
        self._parts.renew_generation()

    def inject_nmi(self) -> None:
        """A non-maskable interrupt for each vCPU, as QEMU's `nmi` does. Raises ConfigError."""
        self._require_open()
        if self.config.machine == "bare":
            raise ConfigError("this machine has no interrupts; use --machine microvm")
        with self.paused():
            self._parts.vm.inject_nmi()

    def subscribe(self, function: Subscriber) -> Callable[[], None]:
        """Have `function` told of each `Event`, in the thread where it happens.

        It must not wait for the machine; what it raises comes out of `run()`. Returns what ends it.
        """
        return self._life.subscribers.add(function)

    def decide(self, decision: Decision) -> Callable[[], None]:
        """Ask `decision(stop)` whether a stop of the guest ends `run()`. Returns what ends that.

        It says `After.END`, `After.HOLD` for a paused machine, or `After.RESET`.
        """
        return self._life.decide(decision)

    def add_breakpoint(self, point: Point) -> None:
        """Stop at `point` from the next run on; each wants its `remove_breakpoint()`.

        Raises HostError if the accelerator cannot, with those that there are already.
        """
        self._require_outside()
        check_point(point)
        with self._life.paused():
            self._debug.add(point)
            try:
                self._debug.try_out()
            except BaseException:
                self._debug.remove(point)
                raise

    def remove_breakpoint(self, point: Point) -> None:
        """Undo one `add_breakpoint()`."""
        with self.paused():
            self._debug.remove(point)

    @property
    def breakpoints(self) -> dict[Point, Way | None]:
        """Breakpoints and watchpoints, and how the last run stopped at each."""
        return self._debug.points()

    @property
    def last_stop(self) -> Stop | None:
        """How the guest has stopped the last time, if it did."""
        return self._life.last

    def begin_trace(self, trace: "ChromeTrace") -> None:
        """Tell `trace` what this machine is, and from now on which of its memory was written.

        Before the first run, once; `trace` is one of the observers.
        """
        self.require_still()
        from vmexit.machine.tracing import begin

        begin(trace, self._parts, self._request.fail)

    @property
    def stopping(self) -> bool:
        """Whether a run under way is to end: what writes for it should not wait any more."""
        return self._request.pending()

    def stop(self, reason: StopReason = StopReason.STOPPED) -> bool:
        """Make the `run()` under way return, from any thread or callback; False without one.

        `reason` is what it returns: STOPPED, or QUIT, whose exit status is 0. QUIT ends the next
        run if none is under way.
        """
        if reason not in (StopReason.STOPPED, StopReason.QUIT):
            raise ConfigError(f"stop() cannot be for {reason}; use STOPPED or QUIT")
        return self._life.stop(reason)

    def thread_id(self, vcpu: int) -> int:
        """The system's number of the thread that runs `vcpu`; 0 before the first run."""
        return self._runner.native_id(vcpu)

    def close(self) -> None:
        """Stop it and free everything; the machine is of no use afterwards.

        Waits for `run()` in another thread, and for who is within `paused()`. What the kernel takes
        long for in a clone goes on behind that; `Snapshot.close()` waits for it. Raises VmexitError
        from within a callback or a device.
        """
        if self._closed:
            return
        if self._runner.forked:  # all of it is the parent's, and locks may be held for ever
            self._life.close()
            self._closed = True
            return
        self._runner.require_closable()
        self._life.end()
        self._runner.close()
        with self._life.control:  # whoever looks into it meanwhile has soon done
            if not self._closed:
                self._life.close()
                self._closed = True
                self._parts.closer.close()

    @property
    def in_access(self) -> bool:
        """Whether the caller is a device or a callback, on a vCPU's thread."""
        return self._runner.in_vcpu_thread()

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

    def _require_outside(self) -> None:
        self._require_open()
        if self._runner.forked:
            raise VmexitError("a fork has no threads of this machine; make a new one in it")
        if self._runner.in_vcpu_thread():
            raise VmexitError("a machine cannot be paused from within its own access; stop() it")

    def require_still(self, vcpu: int | None = None) -> None:
        """Raises VmexitError unless no vCPU runs, or the caller is within an access of `vcpu`."""
        self._require_open()
        if not self._runner.busy:
            return
        if not self._runner.in_vcpu_thread():
            raise VmexitError(
                "this machine runs; pause() or stop() it first, or do it in a callback"
            )
        if vcpu is not None and not self._runner.holds(vcpu):
            raise VmexitError(
                f"vCPU {vcpu} runs, and this is an access of another one; stop() it first"
            )


def _checked(timeout: float | None) -> float | None:
    """No longer than threads can wait, which is centuries. Raises ConfigError."""
    if timeout is None:
        return None
    if not timeout >= 0:
        raise ConfigError(f"a timeout of {timeout} s cannot be; use 0 or more, or None")
    return min(timeout, threading.TIMEOUT_MAX)


def _tuple(texts: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return tuple(texts) if isinstance(texts, list) else texts


def _check_hooks(read: ReadHook | None, write: WriteHook | None) -> None:
    for name, function in (("read", read), ("write", write)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} takes a function, not {function!r}")
