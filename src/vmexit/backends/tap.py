"""A tap interface of the host: frames come out of it, and go into it, by a file descriptor."""

import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from fcntl import ioctl

from vmexit.abi import tun
from vmexit.abi import virtio as v
from vmexit.core.errors import ConfigError, HostError, quoted
from vmexit.core.loop import EventLoop

_TUN = "/dev/net/tun"
_LARGEST = v.NET_HEADER_SIZE + 14 + (1 << 16)
_IOV_MAX = os.sysconf("SC_IOV_MAX")

_NOT = frozenset(" /:%")  # what the kernel has in no name, or in a pattern of one

_OFFLOADS = {
    v.NET_F_GUEST_CSUM: tun.TUN_F_CSUM,
    v.NET_F_GUEST_TSO4: tun.TUN_F_TSO4,
    v.NET_F_GUEST_TSO6: tun.TUN_F_TSO6,
    v.NET_F_GUEST_ECN: tun.TUN_F_TSO_ECN,
}


class Tap:
    """`vmexit.devices.virtio.net.NetBackend`. Frames have a virtio header of 12 bytes.

    One that is there is used as it is, which needs no privilege if it belongs to the user. Another
    is made, and goes away in the end.
    """

    offloads = True

    def __init__(
        self,
        name: str,
        loop: EventLoop,
        *,
        mtu: int = 0,
        address: str = "",
        bridge: str = "",
    ) -> None:
        """`address` (`10.0.0.1/24`), `bridge` and `mtu` are given to the interface; empty: not.

        Raises ConfigError, HostError.
        """
        # The kernel would make a number of %d, and tell only by its answer.
        if not name.isprintable() or not 0 < len(name.encode()) < tun.IFNAMSIZ or set(name) & _NOT:
            raise ConfigError(f"{quoted(name)} is no name of an interface; use tap=tap0")
        self._loop = loop
        self.gone = False
        self._buffer = bytearray(_LARGEST)
        there = name in [found for _, found in socket.if_nameindex()]
        self._fd = self._write_fd = -1
        try:
            self._fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            flags = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR
            ioctl(self._fd, tun.TUNSETIFF, tun.ifreq.pack(name.encode(), flags))
            ioctl(self._fd, tun.TUNSETVNETHDRSZ, struct.pack("i", v.NET_HEADER_SIZE))
            self._write_fd = os.dup(self._fd)
            self._set_offloads(0)
            if not there or mtu or address or bridge:
                _configure(name, mtu, address, bridge)
            self.mtu = _mtu(name)
        except (OSError, ValueError) as error:
            self.close()
            raise HostError(_why(name, error)) from error
        except (ConfigError, HostError):
            self.close()
            raise

    def set_offloads(self, features: int) -> None:
        with suppress(OSError):  # the interface was deleted, which receive() tells
            self._set_offloads(features)

    def _set_offloads(self, features: int) -> None:
        flags = sum(flag for bit, flag in _OFFLOADS.items() if features >> bit & 1)
        if not flags & tun.TUN_F_CSUM:  # without which the others make no sense
            flags = 0
        ioctl(self._fd, tun.TUNSETOFFLOAD, flags)

    def has_room(self) -> bool:
        """Always: the interface drops what it has no room for."""
        return True

    def send(self, frame: Sequence[memoryview]) -> None:
        parts = frame if len(frame) <= _IOV_MAX else [b"".join(frame)]
        try:
            os.writev(self._fd, parts)
        except OSError:
            return  # it is down, or does not like the header: the frame is lost

    def receive(self) -> memoryview | None:
        try:
            size = os.readv(self._fd, [self._buffer])
        except BlockingIOError:
            return None
        except OSError as error:
            self.gone = error.errno == errno.EBADFD  # the interface was deleted
            return None
        return memoryview(self._buffer)[:size]

    def when_readable(self, function: Callable[[], None]) -> None:
        self._loop.watch(self._fd, function)

    def when_room(self, function: Callable[[], None]) -> None:
        self._loop.watch_writable(self._write_fd, function)

    def close(self) -> None:
        """The interface goes away, unless somebody has made it persistent."""
        for fd in (self._fd, self._write_fd):
            if fd >= 0:
                self._loop.unwatch(fd)
                os.close(fd)
        self._fd = self._write_fd = -1


def _mtu(name: str) -> int:
    """Of an interface in this network namespace, which sysfs may not show. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
        answer = ioctl(asks, tun.SIOCGIFMTU, tun.ifreq_mtu.pack(name.encode(), 0))
    mtu: int = tun.ifreq_mtu.unpack(answer)[1]
    return mtu


def _why(name: str, error: OSError | ValueError) -> str:
    number = error.errno if isinstance(error, OSError) else None
    remedy = {
        errno.EPERM: "run as root, or have root make it for you: ip tuntap add mode tap user YOU",
        errno.EACCES: f"ask for access to {_TUN}",
        errno.ENOENT: "load the module tun",
        errno.EBUSY: "another program has it: use another name",
        errno.EINVAL: "it is no tap interface: use another name",
    }.get(number or 0, "use --net user")
    why = error.strerror if isinstance(error, OSError) else str(error)
    return f"cannot use the tap interface {name}: {why}; {remedy}"


def _configure(name: str, mtu: int, address: str, bridge: str) -> None:
    """Bring the interface up. Raises OSError, ConfigError."""
    from pyroute2 import IPRoute, NetlinkError  # slow to load

    with IPRoute() as route:
        try:
            (index,) = route.link_lookup(ifname=name)
            if mtu:
                route.link("set", index=index, mtu=mtu)
            if address:
                place, _, bits = address.partition("/")
                route.addr("replace", index=index, address=place, prefixlen=int(bits))
            if bridge:
                found = route.link_lookup(ifname=bridge)
                if not found:
                    raise ConfigError(f"there is no bridge {quoted(bridge)}; ip link shows some")
                route.link("set", index=index, master=found[0])
            route.link("set", index=index, state="up")
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from error
