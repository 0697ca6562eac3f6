"""User-mode networking: `passt` makes sockets of the host of what the guest sends, unprivileged.

Frames go through a stream socket, each behind its length in 4 bytes, the highest first (passt(1)).
"""

import os
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from shutil import which

from vmexit.backends.program import Complaints
from vmexit.core.errors import ConfigError, HostError
from vmexit.core.loop import EventLoop

# What the guest gets by DHCP: the addresses that QEMU's user-mode networking has. The host itself
# answers at the gateway's.
ADDRESS, NETMASK, GATEWAY = "10.0.2.15", "255.255.255.0", "10.0.2.2"
MTU = 65520  # passt's largest, and its default

_LENGTH = struct.Struct(">I")
_LARGEST = 65535  # of a frame, as passt has it
_BUFFER = 4 * (_LENGTH.size + _LARGEST)
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_PATIENCE = 10.0  # seconds for passt to start, or to end


class Passt:
    """`vmexit.devices.virtio.net.NetBackend`, and the process behind it."""

    offloads = False

    def __init__(
        self, loop: EventLoop, mac: bytes, *, mtu: int = MTU, forwards: Sequence[str] = ()
    ) -> None:
        """`forwards` are passt's options for ports of the host. Raises HostError, ConfigError."""
        program = which("passt")
        if program is None:
            raise HostError("user-mode networking needs passt: apt-get install passt; or use tap=")
        self.mtu = mtu
        self.gone = False
        self._loop = loop
        self._unsent = b""
        self._buffer = bytearray(_BUFFER)
        self._start = self._end = 0
        command = [program, "--foreground", "--quiet"]
        command += ["--address", ADDRESS, "--netmask", NETMASK, "--gateway", GATEWAY]
        command += ["--mtu", str(mtu), *forwards]
        self._start_process(command)
        try:
            self._await_start(mac)
        except BaseException:
            self.close()
            raise

    def _start_process(self, command: list[str]) -> None:
        """With a socket between us. Raises HostError."""
        with ExitStack() as stack:
            try:
                self._complaints = Complaints()
                stack.callback(self._complaints.close)
                self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                stack.enter_context(self._socket)
                with theirs:
                    self._writer = stack.enter_context(self._socket.dup())
                    fd = theirs.fileno()
                    self._process = subprocess.Popen(  # noqa: S603 - found in PATH
                        [*command, "--fd", str(fd)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=self._complaints.fd,
                        pass_fds=[fd],
                        process_group=0,  # a Ctrl-C is for us, who end it
                    )
            except OSError as error:
                raise HostError(
                    f"cannot start passt: {error.strerror}; see {command[0]}, and ulimit -n"
                ) from error
            stack.pop_all()
        self._socket.setblocking(False)

    def _await_start(self, mac: bytes) -> None:
        """Ask who the gateway is: passt answers when it is ready. Raises ConfigError."""
        addresses = [mac, socket.inet_aton(ADDRESS), bytes(6), socket.inet_aton(GATEWAY)]
        # An ARP request (RFC 826): Ethernet, IPv4, their lengths, opcode.
        request = struct.pack("!6s6sHHHBBH", b"\xff" * 6, mac, 0x0806, 1, 0x0800, 6, 4, 1)
        self.send([memoryview(request + b"".join(addresses))])
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while poll.poll(_PATIENCE * 1000):
            if self.receive() is not None:
                return
            if self.gone:
                break
        self._process.kill()
        self._process.wait()
        said = [line for line in self._complaints.lines() if "to syslog" not in line]
        why = said[-1] if said else f"status {self._process.returncode}"
        remedy = "see passt(1)"
        if "bind" in why:
            remedy = "is a port of hostfwd= in use?"
        elif "interface" in why:
            remedy = "it needs an interface with a default route"
        raise ConfigError(f"passt does not run: {why}; {remedy}, or use tap=")

    def set_offloads(self, features: int) -> None:
        """There are none."""

    def has_room(self) -> bool:
        if self._unsent:
            self._send([self._unsent])
        return not self._unsent

    def send(self, frame: Sequence[memoryview]) -> None:
        size = sum(map(len, frame))
        if size > _LARGEST:
            return  # lost: passt would end
        parts = frame if len(frame) < _IOV_MAX else [b"".join(frame)]
        self._send([_LENGTH.pack(size), *parts])

    def _send(self, parts: Sequence[bytes | memoryview]) -> None:
        sent = 0
        try:
            sent = self._socket.sendmsg(parts, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = b""  # nobody is there any more, which receive() will tell
            return
        self._unsent = b"".join(parts)[sent:] if sent < sum(map(len, parts)) else b""

    def receive(self) -> memoryview | None:
        view = memoryview(self._buffer)
        while True:
            have = self._end - self._start
            if have >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(view, self._start)
                if size > _LARGEST:
                    self.gone = True  # it is no passt
                    return None
                if have >= _LENGTH.size + size:
                    begin = self._start + _LENGTH.size
                    self._start = begin + size
                    return view[begin : begin + size]
            # What is left of the last frame moves to the beginning: there is room for a whole one.
            self._buffer[:have] = self._buffer[self._start : self._end]
            self._start, self._end = 0, have
            try:
                got = self._socket.recv_into(view[have:])
            except BlockingIOError:
                return None
            except OSError:
                got = 0
            if not got:
                self.gone = True
                return None
            self._end += got

    def when_readable(self, function: Callable[[], None]) -> None:
        self._loop.watch(self._socket.fileno(), function)

    def when_room(self, function: Callable[[], None]) -> None:
        self._loop.watch_writable(self._writer.fileno(), function)

    def _close_sockets(self) -> None:
        for one in (self._socket, self._writer):
            if one.fileno() >= 0:
                self._loop.unwatch(one.fileno())
                one.close()

    def close(self) -> None:
        """passt ends with its socket."""
        self._close_sockets()
        with self._process:
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._complaints.close()
