"""The virtio devices of a machine: registers, an interrupt and notifications for each."""

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vmexit.abi import virtio as v
from vmexit.accel.base import Notifier
from vmexit.arch.x86 import layout
from vmexit.core.bus import Bus, State
from vmexit.core.errors import ConfigError, HostError, shown
from vmexit.core.irq import EdgeLine, EventfdLine, IrqChip, IrqLine
from vmexit.core.loop import EventLoop
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.mmio import MmioTransport
from vmexit.machine.config import MachineConfig
from vmexit.machine.counters import DeviceCounters, FlowCounters

if TYPE_CHECKING:
    import socket

    from vmexit.backends.chardev import Chardev
    from vmexit.backends.overlay import Overlay
    from vmexit.backends.vhost_user import VhostUser
    from vmexit.core.rate import Limit
    from vmexit.devices.virtio.balloon import Balloon
    from vmexit.devices.virtio.blk import DiskBackend
    from vmexit.devices.virtio.console import Console
    from vmexit.machine.drive import Drive
    from vmexit.machine.share import Share


class VirtioSlots:
    """Where virtio devices are attached.

    With a `notifier` (KVM) the guest's notifications are eventfds that an event loop waits for, so
    that vCPUs go on meanwhile. Without, the vCPU that notifies does what there is to do.
    """

    def __init__(
        self,
        mmio: Bus,
        chip: IrqChip,
        memory: GuestMemory,
        loop: EventLoop,
        notifier: Notifier | None,
        on_close: Callable[[Callable[[], None]], object],
    ) -> None:
        """`on_close` takes what is to be called at the end, last first."""
        self._mmio = mmio
        self._chip = chip
        self._memory = memory
        self._loop = loop
        self._notifier = notifier
        self._on_close = on_close
        self._transports: dict[str, MmioTransport] = {}

    def attach(self, name: str, device: VirtioDevice) -> MmioTransport:
        """Give `device` the next place. Raises HostError."""
        gpa, gsi = layout.virtio_place(len(self._transports))
        loop = self._loop
        if self._notifier is not None and device.waits:
            loop = loop.another()
            self._on_close(loop.close)
        transport = MmioTransport(device, self._memory, self._irq(gsi), loop)
        transport.hold(True)
        title = f"{v.NAMES.get(device.device_id, 'virtio')} {name}"
        self._mmio.attach(gpa, layout.VIRTIO_MMIO_SIZE, transport, name=title)
        if self._notifier is not None:
            for index in range(len(device.queue_sizes)):
                eventfd = self._eventfd()
                self._notifier.assign_ioeventfd(gpa + v.MMIO_QUEUE_NOTIFY, 4, index, eventfd)
                _Kick(loop, eventfd, transport, index).watch()
            self._on_close(loop.close)  # before the eventfds
        self._on_close(transport.close)
        self._transports[name] = transport
        return transport

    def _irq(self, gsi: int) -> EdgeLine:
        if self._notifier is None:
            return IrqLine(self._chip, gsi)
        eventfd = self._eventfd()
        self._notifier.assign_irqfd(gsi, eventfd)
        return EventfdLine(eventfd)

    def _eventfd(self) -> int:
        try:
            eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as error:
            raise HostError(
                f"cannot make an eventfd: {error.strerror}; raise the limit (ulimit -n)"
            ) from error
        self._on_close(partial(os.close, eventfd))
        return eventfd

    def require_fit(self, states: Mapping[str, State]) -> None:
        """Raises ConfigError that names a device with something else behind it."""
        for name, transport in self._transports.items():
            try:
                transport.require_fits(states[name])
            except ConfigError as error:
                raise ConfigError(f"{name} cannot be restored: {error}") from error

    def undriven(self) -> list[str]:
        """The names of devices that no driver has ever made ready."""
        return [name for name, transport in self._transports.items() if not transport.driven]

    def counters(self) -> tuple[DeviceCounters, ...]:
        """What has gone through each device; from any thread."""
        return tuple(
            DeviceCounters(
                name,
                v.NAMES.get(transport.device.device_id, "virtio"),
                tuple(FlowCounters(f.name, f.operations, f.size) for f in transport.flows),
                transport.waited_ns,
            )
            for name, transport in self._transports.items()
        )

    def hold(self, held: bool) -> None:
        """While `held`, between runs for example, no device does anything to the guest."""
        for transport in self._transports.values():
            transport.hold(held)


class _Kick:
    """The notifications of one queue."""

    def __init__(self, loop: EventLoop, eventfd: int, transport: MmioTransport, index: int) -> None:
        self._loop = loop
        self._eventfd = eventfd
        self._transport = transport
        self._index = index

    def watch(self) -> None:
        self._loop.watch(self._eventfd, self._arrived)

    def _arrived(self) -> None:
        os.eventfd_read(self._eventfd)
        self.watch()
        self._transport.kick(self._index)


class VirtioParts:
    """Makes the devices that a machine is to have, with what is behind them."""

    def __init__(
        self,
        config: MachineConfig,
        memory: GuestMemory,
        loop: EventLoop,
        fail: Callable[[BaseException], None],
        on_close: Callable[[Callable[[], None]], object],
        chardev: "Callable[[str], Chardev]",
    ) -> None:
        """`fail` takes what goes wrong while the machine runs; for `on_close` see VirtioSlots.

        `chardev` opens what a console leads to.
        """
        self._config = config
        self._memory = memory
        self._loop = loop
        self._fail = fail
        self._on_close = on_close
        self._chardev = chardev
        self.balloon: Balloon | None = None
        self.overlays: dict[str, Overlay] = {}
        """What is written to disks with snapshot=on, by the name of the disk."""
        self.console: Console | None = None
        self.console_where: list[str] = []

    def devices(self) -> Iterator[tuple[str, VirtioDevice]]:
        """Each with its name, in the order of their places. Raises ConfigError, HostError."""
        config = self._config
        for number, text in enumerate(config.drives):
            name = f"disk{number}"
            yield name, self._disk(name, text)
        for number, text in enumerate(config.nets):
            yield f"net{number}", self._net(text, number)
        for number, text in enumerate(config.shares):
            yield f"share{number}", self._share(text)
        if config.rng:
            from vmexit.devices.virtio.rng import Rng

            yield "rng", Rng()
        if config.balloon is not None:
            from vmexit.devices.virtio.balloon import Balloon

            self.balloon = Balloon(self._memory, config.balloon)
            yield "balloon", self.balloon
        if config.vsock is not None:
            yield "vsock", self._vsock(config.vsock)
        if config.consoles:
            self.console = self._console(config.consoles)
            yield "console", self.console

    def _disk(self, name: str, text: str) -> VirtioDevice:
        from vmexit.core.rate import Limit
        from vmexit.machine.drive import FORMATS, Drive

        drive = Drive.parse(text)
        limit = Limit(self._loop, drive.iops, drive.bps)
        if drive.socket:
            from vmexit.backends.program import connect_to

            return self._vhost_disk(
                f"the vhost-user back end at {shown(drive.socket)}",
                lambda: connect_to(drive.socket),
                drive,
                limit,
            )
        if drive.format in FORMATS:
            from vmexit.backends.storage_daemon import serve_image

            program = serve_image(
                drive.file,
                drive.format,
                readonly=drive.readonly,
                direct=drive.direct,
                queues=drive.queues,
            )
            self._on_close(program.close)
            try:
                return self._vhost_disk(program.name, program.connect, drive, limit)
            except HostError as error:
                why = program.complaint()
                remedy = f"is it a {drive.format} image? qemu-img info tells"
                if "lock" in why or "using the image" in why:
                    remedy = "end the other machine that uses it, or give both readonly=on"
                elif "ermission" in why or "ead-only" in why:
                    remedy = "use another path, or readonly=on"
                raise ConfigError(
                    f"cannot use the disk {shown(drive.file)}: {why.rstrip('?')}; {remedy}"
                ) from error
        from vmexit.devices.virtio.blk import Blk

        return Blk(self._raw_disk(name, drive), drive.serial, drive.queues, limit)

    def _raw_disk(self, name: str, drive: "Drive") -> "DiskBackend":
        from vmexit.backends.disk import Disk

        probe = not drive.format
        if drive.direct:
            from vmexit.backends.direct import DirectDisk

            direct = DirectDisk(drive.file, readonly=drive.readonly, probe=probe)
            self._on_close(direct.close)
            return direct
        aside = drive.snapshot or bool(drive.overlay)
        disk = Disk(drive.file, readonly=drive.readonly or aside, probe=probe)
        self._on_close(disk.close)
        if not aside:
            return disk
        from vmexit.backends.overlay import Overlay

        overlay = Overlay(disk, drive.overlay)
        self._on_close(overlay.close)
        if drive.snapshot:
            self.overlays[name] = overlay
        return overlay

    def _vhost_disk(
        self, name: str, connect: "Callable[[], socket.socket]", drive: "Drive", limit: "Limit"
    ) -> VirtioDevice:
        from vmexit.devices.virtio.blk import CONFIG_SIZE, PASSED_ON, QUEUE_SIZE, DiskFlows
        from vmexit.devices.virtio.vhost import Vhost

        backend = self._vhost(name, connect, drive.queues)
        return Vhost(
            v.BLOCK,
            backend,
            PASSED_ON,
            backend.config(CONFIG_SIZE),
            [QUEUE_SIZE] * drive.queues,
            self._loop,
            self._fail,
            drive.reconnect,
            limit,
            DiskFlows(),
        )

    def _vhost(self, name: str, connect: "Callable[[], socket.socket]", queues: int) -> "VhostUser":
        from vmexit.backends.vhost_user import Shared, VhostUser

        memory = [
            Shared(region.gpa, region.size, region.hva, self._memory.fd, offset)
            for region, offset in self._memory.shared()
        ]
        backend = VhostUser(name, connect, self._loop, memory, queues, layout.VHOST_RINGS)
        self._on_close(backend.close)
        return backend

    def _share(self, text: str) -> VirtioDevice:
        from vmexit.machine.share import Share, descriptors_for_each

        share, each = Share.parse(text), descriptors_for_each(len(self._config.shares))
        if share.virtiofsd:
            return self._fs(share)
        from vmexit.backends.p9.server import Server
        from vmexit.devices.virtio.p9 import P9

        server = Server(share.folder, readonly=share.readonly, descriptors=each)
        self._on_close(server.close)
        return P9(server, share.tag)

    def _fs(self, share: "Share") -> VirtioDevice:
        from vmexit.backends.virtiofsd import serve_folder
        from vmexit.devices.virtio.vhost import Vhost

        program = serve_folder(share.virtiofsd, share.folder)
        self._on_close(program.close)
        # The tag, and one queue for requests besides the one for urgent ones (virtio 5.11).
        config = struct.pack("<36sI", share.tag.encode(), 1)
        sizes = [v.FS_QUEUE_SIZE, v.FS_QUEUE_SIZE]
        try:
            backend = self._vhost(program.name, program.connect, len(sizes))
        except HostError as error:
            raise HostError(
                f"cannot share {shown(share.folder)}: {program.complaint()}; see "
                "virtiofsd's own options"
            ) from error
        return Vhost(v.FS, backend, 0, config, sizes, self._loop, self._fail)

    def _net(self, text: str, number: int) -> VirtioDevice:
        from vmexit.core.rate import Limit
        from vmexit.devices.virtio.net import Net
        from vmexit.machine.net import NetOptions

        options = NetOptions.parse(text, number)
        limits = [Limit(self._loop, options.pps, options.bps) for _ in range(2)]
        if options.tap:
            from vmexit.backends.tap import Tap

            tap = Tap(
                options.tap,
                self._loop,
                mtu=options.mtu,
                address=options.address,
                bridge=options.bridge,
            )
            self._on_close(tap.close)
            return Net(tap, options.mac, *limits)
        from vmexit.backends.passt import MTU, Passt

        forwards = [word for forward in options.forwards for word in forward.for_passt()]
        passt = Passt(self._loop, options.mac, mtu=options.mtu or MTU, forwards=forwards)
        self._on_close(passt.close)
        return Net(passt, options.mac, *limits)

    def _vsock(self, text: str) -> VirtioDevice:
        from vmexit.backends.vsock import VsockSockets
        from vmexit.devices.virtio.vsock import Vsock
        from vmexit.machine.vsock import VsockOptions

        options = VsockOptions.parse(text)
        sockets = VsockSockets(options.path, self._loop)
        self._on_close(sockets.close)
        return Vsock(options.cid, sockets)

    def _console(self, texts: Sequence[str]) -> "Console":
        from vmexit.devices.virtio.console import Console
        from vmexit.devices.virtio.console_port import Port
        from vmexit.machine.console import ConsoleOptions

        options = ConsoleOptions.parse_all(texts, self._config.serial)
        ports = []
        for one in options:
            backend = self._chardev(one.where)
            self.console_where.append(backend.where)
            output = self._loop.another()  # a backend may keep it waiting
            self._on_close(output.close)
            ports.append(Port(backend, output, one.name))
        # A driver that knows of one port only has the first.
        return Console(sorted(ports, key=lambda port: bool(port.name)), self._loop)
