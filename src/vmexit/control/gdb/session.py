"""One debugger's session: what it asks, and what the machine does meanwhile."""

import os
import select
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmexit.accel.base import Point, PointKind
from vmexit.control.gdb.packet import MOST, PacketReader, Signal, packet
from vmexit.control.gdb.target import Target
from vmexit.control.steering import resume
from vmexit.core.errors import ConfigError, GuestAddressError, VmexitError
from vmexit.machine.debug import check_point
from vmexit.machine.events import Event, EventKind, RunState
from vmexit.machine.lifecycle import After
from vmexit.machine.stop import Stop, StopReason

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine

# Signals as gdb numbers them (GDB manual, E.3; gdb's include/gdb/signals.def).
_SIGINT, _SIGTRAP, _SIGSEGV = 2, 5, 11

_KINDS = {
    "0": PointKind.EXECUTE,
    "1": PointKind.EXECUTE,
    "2": PointKind.WRITE,
    "3": PointKind.READ,
    "4": PointKind.ACCESS,
}
_WATCHES = {PointKind.WRITE: "watch", PointKind.READ: "rwatch", PointKind.ACCESS: "awatch"}

_MOST_POINTS = 1024

_OK, _UNKNOWN = b"OK", b""


class Ended(Exception):
    """The session is over: detached, killed, or the machine has gone."""


class Session:
    """Serves one client until it goes. Its thread answers; the machine's events wake it."""

    def __init__(
        self,
        machine: "Machine",
        target: Target,
        client: socket.socket,
        ending: Callable[[], bool],
    ) -> None:
        """`ending()` tells that all is about to be closed: nothing should wait any more."""
        self._machine = machine
        self._ending = ending
        self._target = target
        self._client = client
        self._reader = PacketReader()
        self._acknowledges = True
        self._last = b""  # what was sent last
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._wake = -1
        self._runs = False  # the debugger waits for a stop
        self._vcpu = 0  # that registers and memory are read of
        self._points: dict[tuple[str, int, int], Point] = {}
        self._physical = False
        self._crashed = False
        self._told_ways: set[str] = set()
        self._queries: dict[str, Callable[[str], bytes]] = {
            "qSupported": self._supported,
            "qXfer": self._transfer,
            "qfThreadInfo": lambda _: b"m" + ",".join(map(_thread, self._numbers)).encode(),
            "qsThreadInfo": lambda _: b"l",
            "qThreadExtraInfo": self._thread_extra,
            "qC": lambda _: b"QC" + _thread(self._vcpu).encode(),
            "qAttached": lambda _: b"1",
            "qRcmd": self._monitor,
            "QStartNoAckMode": self._no_acknowledgements,
            "qqemu.PhyMemMode": lambda _: b"1" if self._physical else b"0",
            "Qqemu.PhyMemMode": self._set_physical,
        }
        self._requests: dict[str, Callable[[str], bytes | None]] = {
            "?": lambda _: self._stop_reply(_SIGTRAP),
            "g": lambda _: b"".join(r.hex().encode() for r in self._read_registers()),
            "G": self._write_registers,
            "p": lambda n: self._read_registers()[int(n, 16)].hex().encode(),
            "P": self._write_register,
            "m": self._read_memory,
            "M": self._write_memory,
            "X": self._write_binary,
            "H": self._select,
            "T": lambda n: _OK if self._number(n) in self._numbers else b"E22",
            "Z": self._insert,
            "z": self._remove,
            "c": lambda at: self._go(at, None),
            "C": lambda at: self._go(at.partition(";")[2], None),
            "s": lambda at: self._go(at, self._vcpu),
            "S": lambda at: self._go(at.partition(";")[2], self._vcpu),
            "D": lambda _: self._detach(),
            "k": lambda _: self._kill(),
            "!": lambda _: _OK,
        }

    @property
    def _numbers(self) -> range:
        return range(len(self._machine.vcpus))

    # The stream.

    def serve(self) -> None:
        """Until the client goes. What it has set is gone then, and the machine runs."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stop_telling = self._machine.subscribe(self._on_event)
        stop_deciding = self._machine.decide(self._decide)
        try:
            self._machine.pause()
            self._loop()
        except (Ended, OSError, VmexitError):  # it has gone, or the machine has
            return
        finally:
            stop_telling()
            with self._lock:  # an event may be on its way still
                os.close(self._wake)
                self._wake = -1
            self._leave(stop_deciding)

    def _loop(self) -> None:
        poll = select.poll()
        for fd in (self._client.fileno(), self._wake):
            poll.register(fd, select.POLLIN)
        while True:
            client = self._client.fileno()
            ready = {fd for fd, _ in poll.poll()}
            if self._wake in ready:
                os.eventfd_read(self._wake)
                self._report_events()
            if client in ready:
                received = self._client.recv(1 << 16)
                if not received:
                    raise Ended
                for one in self._reader.feed(received):
                    self._take(one)

    def _take(self, one: bytes | Signal) -> None:
        if one is Signal.INTERRUPT:
            if self._runs:
                self._machine.pause()
        elif one is Signal.AGAIN:
            self._client.sendall(self._last)
        elif one is Signal.GARBLED:
            self._client.sendall(b"-" if self._acknowledges else packet(b"E01"))
        elif isinstance(one, bytes):
            if self._acknowledges:
                self._client.sendall(b"+")
            answer = self._answer(one)
            if answer is not None:
                self._send(answer)

    def _send(self, data: bytes) -> None:
        self._last = packet(data)
        self._client.sendall(self._last)

    def _say(self, text: str) -> None:
        """Text for the user, while gdb waits for the guest to stop."""
        self._send(b"O" + text.encode().hex().encode())

    # The machine.

    def _on_event(self, event: Event) -> None:
        """Called on whatever thread the event is on."""
        with self._lock:
            if self._wake >= 0:
                self._events.append(event)
                os.eventfd_write(self._wake, 1)

    def _decide(self, stop: Stop) -> After:
        """A stop at a breakpoint is for us; so is a crash, once, to be looked at."""
        if stop.reason is StopReason.DEBUG:
            return After.HOLD
        if stop.crashed and not self._crashed:
            self._crashed = True
            return After.HOLD
        return After.END

    def _report_events(self) -> None:
        with self._lock:
            events, self._events = self._events, []
        for event in events:
            if event.kind is EventKind.RESET:
                self._crashed = False
            if not self._runs:
                continue  # gdb does not wait for anything
            if event.kind is EventKind.PAUSED:
                self._stopped(_SIGINT)
            elif event.kind is EventKind.DEBUG and event.stop is not None:
                self._vcpu = event.stop.vcpu
                self._stopped(_SIGTRAP, event.stop.point)
            elif event.kind is EventKind.CRASHED and event.stop is not None:
                self._vcpu = event.stop.vcpu
                if not event.held:
                    self._send(f"X{_SIGSEGV:02x}".encode())
                    raise Ended
                self._say(f"{event.stop.summary()}\n")
                self._stopped(_SIGSEGV)
            elif event.kind is EventKind.SHUTDOWN and event.stop is not None:
                if event.held:  # it is to be looked at
                    self._stopped(_SIGTRAP)
                    continue
                self._send(f"W{event.stop.status & 0xFF:02x}".encode())
                raise Ended

    def _stopped(self, signal: int, point: Point | None = None) -> None:
        self._runs = False
        self._send(self._stop_reply(signal, point))

    def _stop_reply(self, signal: int, point: Point | None = None) -> bytes:
        reason = ""
        if point is not None and point.kind is not PointKind.EXECUTE:
            reason = f"{_WATCHES[point.kind]}:{point.gva:x};"
        elif point is not None:
            hard = any(p == point and key[0] == "1" for key, p in self._points.items())
            reason = "hwbreak:;" if hard else "swbreak:;"
        return f"T{signal:02x}{reason}thread:{_thread(self._vcpu)};".encode()

    def _leave(self, stop_deciding: Callable[[], None]) -> None:
        """Take away what this debugger has set, and let the machine go on."""
        try:
            # Within: a step that is under way would go on behind it, and be nobody's.
            with self._machine.paused():
                for point in self._points.values():
                    self._machine.remove_breakpoint(point)
                stop_deciding()
                self._let_go()
        except VmexitError:
            return  # closed, at its end, or nothing to resume
        finally:
            stop_deciding()

    def _let_go(self, *, step: int | None = None, only: int | None = None) -> None:
        """Let the guest run on. A crash that was held for us, and comes again, ends the run."""
        if self._crashed and self._machine.state is RunState.CRASHED:
            self._machine.resume(step=step, only=only)
        else:
            resume(self._machine, step=step, only=only)

    # Requests (GDB manual, E.2).

    def _answer(self, request: bytes) -> bytes | None:
        """The answer to one packet; None if it comes later."""
        text = request.decode("latin-1")  # a character for each byte, of binary data, too
        try:
            # What the monitor does takes its time, and it pauses the machine by itself.
            alone = self._runs or text.startswith("qRcmd,")
            with _anyway() if alone else self._machine.paused():
                return self._dispatch(text)
        except GuestAddressError:
            return b"E14"  # EFAULT, as QEMU says
        except (AttributeError, TypeError, VmexitError) as error:
            return f"E.{error}".encode()
        except (IndexError, KeyError, ValueError):
            return b"E22"  # EINVAL

    def _dispatch(self, text: str) -> bytes | None:
        kind, rest = text[:1], text[1:]
        if kind in ("q", "Q"):
            for separator in (":", ",", ";", ""):
                name, _, argument = text.partition(separator) if separator else (text, "", "")
                if name in self._queries:
                    return self._queries[name](argument)
            return _UNKNOWN
        if kind == "v":
            return self._verbose(text)
        return self._requests[kind](rest) if kind in self._requests else _UNKNOWN

    def _supported(self, theirs: str) -> bytes:
        return (
            f"PacketSize={MOST:x};QStartNoAckMode+;qXfer:features:read+;vContSupported+;"
            "swbreak+;hwbreak+"
        ).encode()

    def _no_acknowledgements(self, _: str) -> bytes:
        self._acknowledges = False
        return _OK

    def _transfer(self, argument: str) -> bytes:
        what, _, rest = argument.partition(":")
        verb, name, place = rest.split(":")
        if (what, verb) != ("features", "read"):
            return _UNKNOWN
        if name != "target.xml":
            return b"E00"
        offset, length = (int(part, 16) for part in place.split(","))
        data = self._target.description().encode()
        piece = data[offset : offset + min(length, MOST // 2)]
        return (b"m" if offset + len(piece) < len(data) else b"l") + piece

    # vCPUs, which are threads to gdb, numbered from 1.

    def _number(self, thread: str) -> int:
        return int(thread, 16) - 1

    def _select(self, argument: str) -> bytes:
        if argument[0] in "gcs":
            number = 0 if argument[1:] in ("0", "-1") else self._number(argument[1:])
            if number not in self._numbers:
                return b"E22"
            if argument[0] == "g" and argument[1:] not in ("0", "-1"):
                self._vcpu = number
            return _OK
        return _UNKNOWN

    def _thread_extra(self, thread: str) -> bytes:
        number = self._number(thread)
        if number not in self._numbers:
            return b"E22"
        frame = self._machine.backtrace(number, limit=1)[:1]
        text = f"vCPU {number}" + "".join(f" {one.name}" for one in frame if one.name)
        return text.encode().hex().encode()

    def _verbose(self, text: str) -> bytes | None:
        if text == "vCont?":
            return b"vCont;c;C;s;S"
        if text.startswith("vCont;"):
            return self._continue(text.split(";")[1:])
        if text.startswith("vKill"):
            self._send(_OK)
            self._kill()
        return _UNKNOWN

    def _continue(self, actions: list[str]) -> bytes | None:
        """vCont: the first action that names a vCPU, or names none, is its own."""
        step: int | None = None
        running: set[int] = set()
        done: set[int] = set()
        for action in actions:
            verb, _, thread = action.partition(":")
            everyone = thread in ("", "-1", "0")
            numbers = set(self._numbers) if everyone else {self._number(thread)}
            for number in sorted(numbers - done):
                if number not in self._numbers or verb[:1] not in ("c", "C", "s", "S"):
                    return b"E22"
                running.add(number)
                if verb[0] in "sS" and step is None:
                    step = number
            done |= numbers
        if not running:
            return b"E22"
        only = next(iter(running)) if len(running) == 1 and len(self._numbers) > 1 else None
        return self._resume(step, only)

    def _go(self, at: str, step: int | None) -> bytes | None:
        if at:
            self._machine.vcpus[self._vcpu].regs.rip = int(at, 16)
        return self._resume(step, None)

    def _resume(self, step: int | None, only: int | None) -> bytes | None:
        for point, way in self._machine.breakpoints.items():
            text = _explain(point, way.value) if way is not None else ""
            if text and text not in self._told_ways:
                self._told_ways.add(text)
                self._say(text)
        self._runs = True
        try:
            self._let_go(step=step, only=only)
        except BaseException:
            self._runs = False
            raise
        return None

    def _detach(self) -> None:
        self._send(_OK)
        raise Ended

    def _kill(self) -> None:
        self._machine.stop()
        raise Ended

    # Registers.

    def _read_registers(self) -> list[bytes]:
        return self._target.read(self._machine.vcpus[self._vcpu])

    def _write_registers(self, text: str) -> bytes:
        data, values, at = bytes.fromhex(text), {}, 0
        for number, register in enumerate(self._target.registers):
            size = register.bits // 8
            if at + size > len(data):
                break
            values[number] = data[at : at + size]
            at += size
        self._target.write(self._machine.vcpus[self._vcpu], values)
        return _OK

    def _write_register(self, text: str) -> bytes:
        number, _, value = text.partition("=")
        self._target.registers[int(number, 16)]
        self._target.write(self._machine.vcpus[self._vcpu], {int(number, 16): bytes.fromhex(value)})
        return _OK

    # Memory.

    def _read_memory(self, text: str) -> bytes:
        place, _, length = text.partition(",")
        address, size = int(place, 16), min(int(length, 16), MOST // 2 - 16)
        if self._physical:
            data = self._read_physical(address, size)
        else:
            data = self._machine.read_virtual(address, size, self._vcpu)
        if not data and size:
            raise GuestAddressError("nothing is there")
        return data.hex().encode()

    def _read_physical(self, gpa: int, size: int) -> bytes:
        region = self._machine.memory.region(gpa)
        return self._machine.memory.read(gpa, min(size, region.end - gpa))

    def _write_memory(self, text: str) -> bytes:
        place, _, data = text.partition(":")
        address, _, _length = place.partition(",")
        return self._write(int(address, 16), bytes.fromhex(data))

    def _write_binary(self, text: str) -> bytes:
        place, _, data = text.partition(":")
        address, _, _length = place.partition(",")
        return self._write(int(address, 16), data.encode("latin-1"))

    def _write(self, address: int, data: bytes) -> bytes:
        if self._physical:
            self._machine.memory.write(address, data)
        else:
            self._machine.write_virtual(address, data, self._vcpu)
        return _OK

    def _set_physical(self, value: str) -> bytes:
        self._physical = value != "0"
        return _OK

    # Breakpoints and watchpoints.

    def _insert(self, text: str) -> bytes:
        key, point = self._point(text)
        if point is None:
            return _UNKNOWN
        if key not in self._points:
            if len(self._points) >= _MOST_POINTS:
                raise ConfigError(f"there are {_MOST_POINTS} breakpoints; delete some")
            self._machine.add_breakpoint(point)
            self._points[key] = point
        return _OK

    def _remove(self, text: str) -> bytes:
        key, point = self._point(text)
        if point is None:
            return _UNKNOWN
        if self._points.pop(key, None) is not None:
            self._machine.remove_breakpoint(point)
        return _OK

    def _point(self, text: str) -> tuple[tuple[str, int, int], Point | None]:
        kind, place, size = text.partition(";")[0].split(",")
        address, length = int(place, 16) & (1 << 64) - 1, int(size, 16)
        key = kind, address, length
        if kind not in _KINDS:
            return key, None
        point = Point(address, _KINDS[kind], 1 if _KINDS[kind] is PointKind.EXECUTE else length)
        check_point(point)
        return key, point

    # `monitor`.

    def _monitor(self, text: str) -> bytes:
        """What the monitor for people says, and a few words more."""
        from vmexit.control.monitor import execute

        line = bytes.fromhex(text).decode("utf-8", "replace").strip()
        try:
            said = self._own_command(line) or execute(self._machine, line, self._vcpu, self._ending)
        except VmexitError as error:
            said = str(error)
        for start in range(0, len(said), 1000):
            self._say(said[start : start + 1000])
        if said and not said.endswith("\n"):
            self._say("\n")
        return _OK

    def _own_command(self, line: str) -> str:
        if line in ("reset", "system_reset"):
            self._machine.reset()
            return "the machine is at its beginning; maintenance flush register-cache shows it"
        if line == "info breakpoints":
            lines = [
                f"{point.gva:#x} {point.kind.value} {point.length} "
                f"{way.value if way is not None else 'new'}"
                for point, way in self._machine.breakpoints.items()
            ]
            return "\n".join(lines) or "none is set now; gdb takes its own out at each stop"
        return ""


class _anyway:
    """In place of `Machine.paused()`, while the guest runs and gdb asks what needs no pause."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None


def _thread(number: int) -> str:
    return f"{number + 1:x}"


def _explain(point: Point, way: str) -> str:
    return {
        "single-stepping": (
            f"vmexit: the breakpoint at {point.gva:#x} is looked for by single-stepping, "
            "thousands of times as slow: this KVM does not tell of INT3 there, and its debug "
            "registers are used up or do not work\n"
        ),
        "hardware": (
            f"vmexit: the {'break' if point.kind is PointKind.EXECUTE else 'watch'}point at "
            f"{point.gva:#x} is a debug register of the processor, of which there are four\n"
        ),
        "port": (
            f"vmexit: the breakpoint at {point.gva:#x} is a port access in its place, for ring 0 "
            "only: this processor tells its KVM of no better one\n"
        ),
    }.get(way, "")
