"""The console device (virtio 5.3): consoles and plain ports, each with a backend of its own.

A driver without MULTIPORT has the first port only.
"""

import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from vmexit.abi import virtio as v
from vmexit.core.bus import State
from vmexit.core.clock import Clock
from vmexit.core.errors import ConfigError
from vmexit.core.saved import Saved
from vmexit.devices.virtio.console_port import Port
from vmexit.devices.virtio.device import VirtioDevice
from vmexit.devices.virtio.queue import Chain, Queue, QueueError

QUEUE_SIZE = 64
MOST_PORTS = 16

_CONFIG = struct.Struct("<HHII")  # columns, rows, greatest number of ports, emergency write (5.3.4)
_EMERGENCY = 8
_CONTROL = struct.Struct("<IHH")  # port, event, value (5.3.6.2)
_SIZE = struct.Struct("<HH")  # columns, rows
_TO_DRIVER = (
    v.CONSOLE_DEVICE_ADD,
    v.CONSOLE_CONSOLE_PORT,
    v.CONSOLE_RESIZE,
    v.CONSOLE_PORT_OPEN,
    v.CONSOLE_PORT_NAME,
)

_MOST_INPUT = 64 << 10  # bytes for one buffer; a driver offers more of them
_MOST_OUTPUT = 1 << 20  # bytes of one buffer that count: Linux makes none of more than 64 KiB

# How often the size of a terminal is looked at, in nanoseconds.
_LOOK = 250_000_000


class Console(VirtioDevice):
    """A pair of queues for each port, and one for control messages behind that of port 0.

    A lone console does without MULTIPORT. Then its size is in the configuration, which every driver
    reads as it is meant; of the message RESIZE (5.3.6.2), Linux up to 6.14 and some versions since
    take the columns for the rows (drivers/char/virtio_console.c).

    Input is taken from a backend only when the guest has a buffer for it, and with MULTIPORT only
    while a program of the guest has the port open: else Linux would throw it away.

    The size of a terminal is looked at from time to time. A signal tells of it (SIGWINCH), but only
    the one process that has the terminal, and never who holds the master of a pseudo-terminal.
    """

    device_id = v.CONSOLE

    def __init__(self, ports: Sequence[Port], clock: Clock) -> None:
        """At least one port and at most MOST_PORTS; the first one should be a console."""
        self.ports = ports
        several = len(ports) > 1 or bool(ports[0].name)
        self.features = 1 << v.CONSOLE_F_SIZE | 1 << v.CONSOLE_F_EMERG_WRITE
        self.features |= several << v.CONSOLE_F_MULTIPORT
        self.queue_sizes = [QUEUE_SIZE] * (2 * len(ports) + 2 if several else 2)
        self._clock = clock
        self._timer = clock.timer(self._look)
        self._runs = False
        self._multiport = False
        # A lone console does not tell when it is open, and Linux drops what comes before that. Its
        # first output does.
        self._spoken = False
        # Messages for the driver, each once, as (port, event): what a hostile one asks for again
        # and again takes no room. What they say is looked up when they go.
        self._messages: dict[tuple[int, int], None] = {}
        # Each is one object, as what waits for the transport waits only once.
        inputs = [partial(self._receive, number) for number in range(len(ports))]
        self._readable = [partial(self._enter, function) for function in inputs]
        for number, port in enumerate(ports):
            port.outlet.when_room = partial(self._enter, partial(self._transmit, number))

    def _enter(self, function: Callable[[], None]) -> None:
        self.transport.enter(function)

    def resize(self, columns: int, rows: int, number: int = 0) -> None:
        """Tell the guest how large console `number` is; from any thread. Raises ConfigError."""
        consoles = [port for port in self.ports if not port.name]
        if not 0 <= number < len(consoles):
            raise ConfigError(f"there is no console {number}; the first one is 0")
        consoles[number].set_size(columns, rows)
        self._resized()

    def running(self, runs: bool) -> None:
        """A run begins, or has ended: then all output is written. Raises HostError."""
        self._runs = runs
        if runs:
            for port in self.ports:
                port.backend.running(True)
            self._look()
            return
        self._timer.set(None)
        with ExitStack() as stack:  # all of them, whatever one raises
            for port in self.ports:
                stack.callback(port.backend.running, False)
                stack.callback(port.outlet.flush)

    def config(self) -> bytes:
        columns, rows = self.ports[0].size or (0, 0)
        return _CONFIG.pack(columns, rows, len(self.ports), 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """The emergency write, which a driver may use before anything else (5.3.4)."""
        outlet = self.ports[0].outlet
        if offset == _EMERGENCY and outlet.has_room():
            outlet.put(data[:1])

    def activate(self, queues: Sequence[Queue], features: int) -> None:
        super().activate(queues, features)
        self._multiport = bool(features >> v.CONSOLE_F_MULTIPORT & 1)
        if not self._multiport:
            self.ports[0].open = True

    def reset(self) -> None:
        super().reset()
        self._spoken = False
        self._messages.clear()
        for port in self.ports:
            port.forget()

    def notify(self, index: int) -> None:
        if index in (v.CONSOLE_CONTROL_RX, v.CONSOLE_CONTROL_TX):
            if self._multiport:
                if index == v.CONSOLE_CONTROL_TX:
                    self.queues[index].serve(self._command)
                self._tell()
            return
        port = index // 2 - 1 if index > v.CONSOLE_CONTROL_TX else 0
        if not self._multiport:
            if port:
                return
            self._tell_sizes()  # at first: Linux looks at the configuration only when told
        if index % 2:
            self._transmit(port)
        else:
            self._receive(port)

    def _queue(self, port: int, transmit: bool) -> Queue:
        return self.queues[(2 * port + 2 if port else 0) + transmit]

    # Data.

    def _transmit(self, port: int) -> None:
        outlet = self.ports[port].outlet

        def send(chain: Chain) -> int:
            self._spoken = True
            outlet.put(chain.read(_MOST_OUTPUT))
            return 0

        silent = not self._spoken
        self._queue(port, True).serve(send, outlet.has_room)
        if silent and self._spoken:
            self._receive(port)

    def _receive(self, port: int) -> None:
        """Give the guest what has come, as far as it has room; no more at a time than a queue."""
        if not self.ports[port].open or not (self._multiport or self._spoken):
            return
        backend, queue = self.ports[port].backend, self._queue(port, False)
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break  # until the guest notifies of new buffers
            if not chain.writable:
                raise QueueError("a buffer for input cannot be written")
            data = backend.read(min(chain.writable_size(), _MOST_INPUT))
            if not data:
                queue.give_back(1)
                backend.when_readable(self._readable[port])
                break
            queue.push(chain, chain.write(data))
        else:
            backend.when_readable(self._readable[port])
        queue.tell()

    # Control messages.

    def _command(self, chain: Chain) -> int:
        data = chain.read(_CONTROL.size)
        if len(data) == _CONTROL.size:
            number, event, value = _CONTROL.unpack(data)
            if event == v.CONSOLE_DEVICE_READY:
                self._device_ready(value == 1)
            elif number < len(self.ports):
                self._port_command(number, event, value)
        return 0

    def _device_ready(self, is_ready: bool) -> None:
        self._messages.clear()
        for number, port in enumerate(self.ports):
            port.forget()
            if is_ready:
                self._messages[number, v.CONSOLE_DEVICE_ADD] = None

    def _port_command(self, number: int, event: int, value: int) -> None:
        port = self.ports[number]
        if event == v.CONSOLE_PORT_READY and value == 1:
            events = [v.CONSOLE_PORT_NAME if port.name else v.CONSOLE_CONSOLE_PORT]
            if port.size is not None and not port.name:
                events.append(v.CONSOLE_RESIZE)
            for one in (*events, v.CONSOLE_PORT_OPEN):
                self._messages[number, one] = None
        elif event == v.CONSOLE_PORT_OPEN:
            port.open = value == 1
            self._tell_sizes()
            self._receive(number)

    def _tell(self) -> None:
        self.queues[v.CONSOLE_CONTROL_RX].serve(self._send, lambda: bool(self._messages))

    def _send(self, chain: Chain) -> int:
        number, event = next(iter(self._messages))
        port = self.ports[number]
        data = _CONTROL.pack(number, event, event != v.CONSOLE_RESIZE)
        if event == v.CONSOLE_PORT_NAME:
            data += port.name.encode()
        elif event == v.CONSOLE_RESIZE:
            port.told = port.size or (0, 0)
            data += _SIZE.pack(*port.told)
        if chain.writable_size() < len(data):
            raise QueueError("a buffer for control messages is too small")
        del self._messages[number, event]
        return chain.write(data)

    # Sizes.

    def _look(self) -> None:
        if any([port.look() for port in self.ports]):  # all of them
            self._resized()
        if self._runs and any(port.backend.size() is not None for port in self.ports):
            self._timer.set(self._clock.now() + _LOOK)

    def _resized(self) -> None:
        self.transport.enter(self._tell_sizes)

    def _tell_sizes(self) -> None:
        changed = [
            number
            for number, port in enumerate(self.ports)
            if port.open and not port.name and port.size != port.told
        ]
        if self._multiport:
            self._messages.update(((number, v.CONSOLE_RESIZE), None) for number in changed)
            self._tell()
        elif changed:
            self.ports[0].told = self.ports[0].size
            self.transport.config_changed()

    # State.

    def state(self) -> State:
        return {
            "version": 1,
            "names": [port.name for port in self.ports],
            "open": [int(port.open) for port in self.ports],
            "sizes": [n for port in self.ports for n in port.size or (0, 0)],
            "told": [n for port in self.ports for n in port.told or (0, 0)],
            "spoken": int(self._spoken),
            "messages": len(self._messages),
            "ports": [number for number, _ in self._messages],
            "events": [event for _, event in self._messages],
        }

    def restore(self, state: State) -> None:
        """Raises ConfigError for what is no state of this, with these ports."""
        saved = Saved(state, "a console device with other ports", 1)
        count = len(self.ports)
        if state.get("names") != [port.name for port in self.ports]:
            raise saved.error()
        is_open = saved.numbers("open", 1, count)
        sizes = saved.numbers("sizes", 0xFFFF, 2 * count)
        told = saved.numbers("told", 0xFFFF, 2 * count)
        spoken = saved.flag("spoken")
        messages = saved.number("messages", count * len(_TO_DRIVER))
        numbers = saved.numbers("ports", count - 1, messages)
        events = saved.numbers("events", v.CONSOLE_PORT_NAME, messages)
        if any(event not in _TO_DRIVER for event in events):
            raise saved.error()
        for number, port in enumerate(self.ports):
            port.open = bool(is_open[number])
            port.size = _pair(sizes, number)
            port.told = _pair(told, number)
            port.look_anew()
        self._spoken = spoken
        self._messages = dict.fromkeys(zip(numbers, events, strict=True))


def _pair(numbers: list[int], index: int) -> tuple[int, int] | None:
    columns, rows = numbers[2 * index : 2 * index + 2]
    return (columns, rows) if columns or rows else None
