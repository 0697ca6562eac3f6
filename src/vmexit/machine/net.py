"""What a user says of a network interface: `--net user[,…]` or `--net tap=NAME[,…]`."""

import hashlib
import ipaddress
import re
from typing import NamedTuple

from vmexit.core.errors import ConfigError, quoted, shown
from vmexit.machine.options import Options

_KEYS = ("hostfwd", "address", "bridge", "mac", "mtu", "bps", "pps")
_USER, _TAP = ("hostfwd",), ("address", "bridge")
# 52:54:00 is what QEMU and others use for virtual machines.
_PREFIX = bytes((0x52, 0x54, 0x00))
_LEAST_MTU, _MOST_MTU = 68, 65520
_FORWARD = re.compile(r"(tcp|udp):([^/]*):(\d{1,5})-:(\d{1,5})")


class Forward(NamedTuple):
    """A port of the host that leads to one of the guest."""

    udp: bool
    address: str
    """The host's, on which it listens; empty: all."""
    port: int
    guest_port: int

    @classmethod
    def parse(cls, text: str) -> "Forward":
        """`tcp:127.0.0.1:8080-:80`. Raises ConfigError."""
        found = _FORWARD.fullmatch(text)
        if found is None or not all(0 < int(found[n]) < 1 << 16 for n in (3, 4)):
            raise ConfigError(
                f"hostfwd={shown(text[:60])} cannot be; use hostfwd=tcp:127.0.0.1:8080-:80"
            )
        address = found[2].removeprefix("[").removesuffix("]")
        try:
            address = str(ipaddress.ip_address(address)) if address else ""
        except ValueError as error:
            raise ConfigError(
                f"hostfwd={shown(text[:60])}: {quoted(address)} is no address; use one of this "
                "host, as 127.0.0.1"
            ) from error
        return cls(found[1] == "udp", address, int(found[3]), int(found[4]))

    def for_passt(self) -> list[str]:
        """The option of passt(1) for it."""
        where = f"{self.address}/" if self.address else ""
        option = "--udp-ports" if self.udp else "--tcp-ports"
        return [option, f"{where}{self.port}:{self.guest_port}"]


class NetOptions(NamedTuple):
    """One network interface."""

    tap: str
    """The host's interface; empty: user-mode networking."""
    mac: bytes
    mtu: int = 0
    """0: what the backend has."""
    forwards: tuple[Forward, ...] = ()
    address: str = ""
    bridge: str = ""
    bps: int = 0
    pps: int = 0

    @classmethod
    def parse(cls, text: str, number: int = 0) -> "NetOptions":
        """The interface with this `number` of a machine. Raises ConfigError."""
        options = Options("the network interface", text, _KEYS, named=True)
        kind, tap = options.name, options.value
        if kind not in ("user", "tap") or (kind == "tap") != bool(tap):
            raise ConfigError(
                f"{options.what} is neither user nor a tap; use --net user or --net tap=tap0"
            )
        if not tap.isprintable():
            raise ConfigError(f"{options.what} is no name of an interface; use --net tap=tap0")
        for key in _USER if kind == "tap" else _TAP:
            if options.all(key):
                raise ConfigError(f"{options.what}: {key}= is not for {kind}; leave it out")
        mtu = options.number("mtu", 0, 0, _MOST_MTU)
        if 0 < mtu < _LEAST_MTU:
            raise ConfigError(f"{options.what}: mtu={mtu} is too small; use {_LEAST_MTU} or more")
        return cls(
            tap,
            _mac(options, f"{kind}{tap or number}"),
            mtu,
            tuple(map(Forward.parse, options.all("hostfwd"))),
            _address(options),
            options.text("bridge"),
            options.size("bps"),
            options.number("pps", 0, 0, 1 << 40),
        )


def _mac(options: Options, name: str) -> bytes:
    """What is asked for, or an address that is always the same for this name."""
    text = options.text("mac")
    if not text:
        return _PREFIX + hashlib.sha256(name.encode()).digest()[:3]
    parts = re.fullmatch(r"([0-9a-fA-F]{2})" + r"[:-]([0-9a-fA-F]{2})" * 5, text)
    mac = bytes(int(part, 16) for part in parts.groups()) if parts is not None else b""
    if not any(mac) or mac[0] & 1:
        raise ConfigError(
            f"mac={shown(text[:40])} is no address of one host; use mac=52:54:00:12:34:56"
        )
    return mac


def _address(options: Options) -> str:
    text = options.text("address")
    if not text:
        return ""
    try:
        found = ipaddress.ip_interface(text if "/" in text else "")
    except ValueError as error:
        raise ConfigError(
            f"address={shown(text[:40])} is no address with a length; use address=10.0.0.1/24"
        ) from error
    return f"{found.ip}/{found.network.prefixlen}"
