"""The devices of a machine: which there are, and where the guest finds them."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from vmexit.arch.x86 import layout
from vmexit.core.bus import Bus, Device, State, Stateful
from vmexit.core.irq import IrqChip, IrqLine
from vmexit.core.loop import EventLoop
from vmexit.machine.balloon import MemoryBalloon
from vmexit.machine.config import MachineConfig
from vmexit.machine.console import GuestConsole
from vmexit.machine.counters import DeviceCounters
from vmexit.machine.events import EventKind
from vmexit.machine.runner import StopRequest
from vmexit.machine.stop import Stop, StopReason

if TYPE_CHECKING:
    from vmexit.accel.base import Notifier
    from vmexit.backends.chardev import Chardev
    from vmexit.backends.console_tap import ConsoleTap
    from vmexit.backends.overlay import Overlay
    from vmexit.boot.firmware_items import Contents
    from vmexit.core.memory import GuestMemory
    from vmexit.devices.irqchip import PcIrqChip


OnClose = Callable[[Callable[[], None]], object]


class Tell(Protocol):
    """Tells of an event; for devices, in any thread."""

    def __call__(self, kind: EventKind, /, *, value: int = 0) -> None: ...


class StatefulIrqChip(IrqChip, Stateful, Protocol):
    """Interrupt controllers, in this process or in the kernel."""


class Board:
    """Attaches devices to the buses; `devices` are those attached, by name."""

    def __init__(
        self,
        config: MachineConfig,
        pio: Bus,
        mmio: Bus,
        request: StopRequest,
        loop: EventLoop,
        on_close: OnClose,
        tell: Tell,
    ) -> None:
        """`on_close` takes what is to be called at the end, last first."""
        self._config = config
        self._pio = pio
        self._mmio = mmio
        self._request = request
        self._loop = loop
        self._on_close = on_close
        self._tell = tell
        self.devices: dict[str, Stateful] = {}
        self.serial_where = ""
        self.taps: list[ConsoleTap] = []
        """Of the serial port, and of virtio consoles, in this order."""
        self.balloon: MemoryBalloon | None = None
        self.require_fit: Callable[[Mapping[str, State]], None] = lambda states: None
        """Raises ConfigError if these are states of devices with something else behind them."""
        self.hold: Callable[[bool], None] = lambda held: None
        """Has virtio devices leave the guest alone, and then do what they had to put off."""
        self.undriven: Callable[[], list[str]] = list
        """The names of the virtio devices that no driver has ever made ready."""
        self.virtio_counters: Callable[[], tuple[DeviceCounters, ...]] = tuple
        self.console: GuestConsole | None = None
        self.console_where: list[str] = []
        self.overlays: dict[str, Overlay] = {}
        self.power_button: Callable[[], None] | None = None
        self.renew_generation: Callable[[], None] | None = None
        self._when_running: list[Callable[[bool], None]] = []

    def running(self, runs: bool) -> None:
        """To be called when a run begins, and when it has ended.

        At the end all are told, whatever one of them raises.
        """
        if runs:
            for function in self._when_running:
                function(True)
            return
        with ExitStack() as stack:
            for function in reversed(self._when_running):  # the stack turns it round
                stack.callback(function, False)

    def _port(
        self, name: str, port: int, size: int, device: Device, title: str, *, wide: bool = False
    ) -> None:
        """`name` is that of its state, `title` what traces call it."""
        self._pio.attach(port, size, device, overhang=wide, name=title)
        self.devices[name] = device

    def _stop(self, reason: StopReason, detail: str) -> Callable[[], None]:
        def stop() -> None:
            self._request(Stop(reason, detail=detail))

        return stop

    def _chardev(self, where: str) -> "Chardev":
        from vmexit.backends.chardev import open_chardev
        from vmexit.backends.console_tap import ConsoleTap

        place = open_chardev(where, self._loop, self._request.pending, self._request.leave)
        self._on_close(place.close)
        tap = ConsoleTap(place, self._loop)
        self.taps.append(tap)
        return tap

    def attach_common(self, chip: IrqChip | None) -> None:
        """What every machine has: serial port, debug console, debug-exit port."""
        config = self._config
        if config.serial is not None:
            from vmexit.devices.serial import Serial

            backend = self._chardev(config.serial)
            self.serial_where = backend.where
            self._when_running.append(backend.running)
            irq = IrqLine(chip, layout.COM1_GSI) if chip is not None else None
            self._port("serial", layout.COM1_PORT, 8, Serial(backend, irq, self._loop), "UART")
        if config.debugcon is not None:
            from vmexit.backends.chardev import File, Stdout
            from vmexit.devices.debugcon import Debugcon

            port, path = config.debugcon
            pending = self._request.pending
            log = File(path, pending) if path else Stdout(pending)
            self._on_close(log.close)
            self._port("debugcon", port, 1, Debugcon(log.write), "debug console")
        if config.debug_exit is not None:
            from vmexit.devices.debug_exit import DebugExit

            def end(value: int) -> None:
                detail = f"the guest wrote {value:#x}"
                self._request(Stop(StopReason.DEBUG_EXIT, value=value, detail=detail))

            self._port("debug-exit", config.debug_exit, 1, DebugExit(end), "debug exit", wide=True)

    def attach_irqchip(self, chip: "PcIrqChip", current: Callable[[], int]) -> None:
        """The interrupt controllers and the timer, where the accelerator has none.

        `current()` is the vCPU that makes an access.
        """
        from vmexit.devices.pit import Pit

        for gpa, size, page, title in (
            (layout.LAPIC_ADDRESS, layout.LAPIC_SIZE, chip.lapic_page(current), "LAPIC"),
            (layout.IOAPIC_ADDRESS, layout.IOAPIC_SIZE, chip.ioapic_page(), "IOAPIC"),
        ):
            self._mmio.attach(gpa, size, page, name=title)
        self._pio.attach(layout.PIC_MASTER_PORT, 2, chip.pic.master, name="PIC")
        self._pio.attach(layout.PIC_SLAVE_PORT, 2, chip.pic.slave, name="PIC")
        self._pio.attach(layout.ELCR_PORT, 2, chip.pic.elcr, name="PIC")
        pit = Pit(self._loop, IrqLine(chip, layout.PIT_GSI))
        self._port("pit", layout.PIT_PORT, 4, pit, "PIT")
        self._pio.attach(layout.PORT61, 1, pit.port61, name="PIT")

    def attach_pc(self, chip: StatefulIrqChip) -> None:
        """What else a kernel expects of a PC."""
        from vmexit.devices.cmos import Cmos
        from vmexit.devices.i8042 import I8042
        from vmexit.devices.system_ports import AcpiPm, Port92, ResetControl

        def irq(gsi: int) -> IrqLine:
            return IrqLine(chip, gsi)

        reset = self._stop(StopReason.RESET, "the guest asked for a reset")
        power_off = self._stop(StopReason.POWEROFF, "the guest switched the power off")
        self.devices["irqchip"] = chip
        low, *high = (size for _, size in layout.ram_ranges(self._config.memory))
        cmos = Cmos(self._loop, irq(layout.RTC_GSI), low_memory=low, high_memory=sum(high))
        self._port("cmos", layout.RTC_PORT, 2, cmos, "RTC and CMOS")
        i8042 = I8042(irq(layout.KEYBOARD_GSI), irq(layout.MOUSE_GSI), reset)
        self.devices["i8042"] = i8042
        self._pio.attach(layout.I8042_DATA_PORT, 1, i8042.data, name="i8042")
        self._pio.attach(layout.I8042_COMMAND_PORT, 1, i8042.command, name="i8042")
        self._port("port92", layout.PORT92, 1, Port92(reset), "port 92")
        control = ResetControl(reset)
        self._port("reset-control", layout.RESET_CONTROL_PORTS, 4, control, "reset control")
        pm = AcpiPm(self._loop, irq(layout.SCI_IRQ), power_off)
        self._port("acpi-pm", layout.ACPI_PM_PORT, layout.ACPI_PM_SIZE, pm, "ACPI PM")
        self.power_button = pm.press_power_button

    def attach_virtio(
        self, chip: IrqChip, memory: "GuestMemory", notifier: "Notifier | None"
    ) -> None:
        """Disks and whatever else is virtio."""
        from vmexit.machine.virtio import VirtioParts, VirtioSlots

        slots = VirtioSlots(self._mmio, chip, memory, self._loop, notifier, self._on_close)
        parts = VirtioParts(
            self._config, memory, self._loop, self._request.fail, self._on_close, self._chardev
        )
        for name, device in parts.devices():
            self.devices[name] = slots.attach(name, device)
        self.overlays = parts.overlays
        self._when_running.append(lambda runs: slots.hold(not runs))
        self.require_fit = slots.require_fit
        self.hold = slots.hold
        self.undriven = slots.undriven
        self.virtio_counters = slots.counters
        if parts.balloon is not None:
            self.balloon = parts.balloon
            self.balloon.on_change(lambda size: self._tell(EventKind.BALLOON, value=size))
        if parts.console is not None:
            self.console, self.console_where = parts.console, parts.console_where
            self._when_running.append(parts.console.running)

    def attach_fw_cfg(self, memory: "GuestMemory", contents: "Contents") -> None:
        """What firmware asks of the machine."""
        from vmexit.devices.fw_cfg import SIZE, FwCfg

        device = FwCfg(memory, contents.items, contents.files)
        self._port("fw-cfg", layout.FW_CFG_PORT, SIZE, device, "fw_cfg")

    def attach_pvpanic(self) -> None:
        """What a guest tells by that it panics."""
        from vmexit.devices.pvpanic import PvPanic

        panicked = self._stop(StopReason.GUEST_CRASH, "the guest tells that it has panicked")
        off = self._stop(StopReason.POWEROFF, "the guest tells that it has shut down")
        device = PvPanic(panicked, lambda: self._tell(EventKind.CRASH_KERNEL), off)
        self._port("pvpanic", layout.PVPANIC_PORT, 1, device, "pvpanic")

    def attach_vmgenid(self, chip: IrqChip) -> None:
        """What tells a guest that it is a copy."""
        from vmexit.devices.vmgenid import SIZE, VmGenId

        device = VmGenId(IrqLine(chip, layout.VMGENID_GSI))
        self._mmio.attach(layout.VMGENID, SIZE, device, name="vmgenid")
        self.devices["vmgenid"] = device
        self.renew_generation = device.renew

    def attach_testdev(self, chip: IrqChip | None) -> None:
        """What kvm-unit-tests have for a counterpart."""
        from vmexit.devices.testdev import ECHO_SIZE, LINES, MEMORY_SIZE, TestDev

        device = TestDev(chip)
        for bus, address, size, part in (
            (self._pio, layout.TESTDEV_ECHO_PORT, ECHO_SIZE, device.echo),
            (self._pio, layout.TESTDEV_FLUSH_PORT, 4, device.flush),
            (self._pio, layout.TESTDEV_ECHO_BYTES_PORT, ECHO_SIZE, device.echo_bytes),
            (self._pio, layout.TESTDEV_LINES_PORT, LINES, device.lines),
            (self._mmio, layout.TESTDEV_MEMORY, MEMORY_SIZE, device.memory),
        ):
            bus.attach(address, size, part, name="testdev")
        self.devices["testdev"] = device
