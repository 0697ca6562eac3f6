"""What a user says of a disk: `--drive file=P[,…]`, `--drive vhost-user:SOCKET[,…]`."""

from typing import NamedTuple

from vmexit.core.errors import ConfigError, quoted
from vmexit.machine.options import Options

_VHOST_USER = "vhost-user:"
_KEYS = ("file", "readonly", "serial", "format")
# Formats that another program serves; by the end of a file's name, too.
FORMATS = ("qcow2", "vmdk", "vhdx", "vpc", "vdi", "qed", "luks")
_SUFFIXES = ("qcow2", "vmdk", "vhdx", "vdi", "qed")


class Drive(NamedTuple):
    """One disk."""

    file: str
    readonly: bool = False
    serial: str = ""
    format: str = ""
    """Empty: raw, but not if the file looks like another one."""
    socket: str = ""
    """In place of a file: where a vhost-user back end listens."""
    reconnect: int = 0
    """How many seconds it may be away."""

    @classmethod
    def parse(cls, text: str) -> "Drive":
        """`file=P,readonly=on`, where a comma in a value is written twice. Raises ConfigError."""
        if text.startswith(_VHOST_USER):
            options = Options("the drive", text, ("reconnect",), named=True)
            # What comes first may have a `=`, too.
            path = options.first.removeprefix(_VHOST_USER)
            if not path:
                raise ConfigError(f"{options.what} names no socket; use vhost-user:PATH")
            return cls("", socket=path, reconnect=options.number("reconnect", 0, 0, 86400))
        options = Options("the drive", text, _KEYS)
        file = options.required("file", "file=PATH")
        kind = options.text("format") or _by_name(file)
        if kind not in ("", "raw", *FORMATS):
            raise ConfigError(
                f"{options.what} cannot be {quoted(kind)}; use raw, {', '.join(FORMATS)}"
            )
        if kind in FORMATS and options.text("serial"):
            raise ConfigError(f"{options.what}: a {kind} image has no serial=; leave it out")
        return cls(file, options.flag("readonly"), options.text("serial"), kind)


def _by_name(file: str) -> str:
    """The format that the file's name tells. Its content may be the guest's, and tells nothing."""
    return next((kind for kind in _SUFFIXES if file.lower().endswith(f".{kind}")), "")
