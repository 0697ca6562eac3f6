"""What a user says of a disk: `--drive file=P[,…]`, `--drive vhost-user:SOCKET[,…]`."""

from typing import NamedTuple

from vmexit.core.errors import ConfigError, quoted, shown
from vmexit.devices.virtio.blk import MOST_QUEUES
from vmexit.machine.options import Options

_VHOST_USER = "vhost-user:"
_KEYS = (
    "file", "readonly", "serial", "format", "snapshot", "overlay", "direct", "queues", "iops", "bps"
)  # fmt: skip
_MOST_OPERATIONS = 1 << 40  # a second
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
    snapshot: bool = False
    """What the guest writes is gone in the end."""
    overlay: str = ""
    """A file for what the guest writes."""
    direct: bool = False
    """Past the host's page cache."""
    queues: int = 1
    iops: int = 0
    """Requests a second at most; 0 is no limit."""
    bps: int = 0
    """Bytes a second at most; 0 is no limit."""

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
        drive = cls(
            file,
            options.flag("readonly"),
            options.text("serial"),
            kind,
            snapshot=options.flag("snapshot"),
            overlay=options.text("overlay"),
            direct=options.flag("direct"),
            queues=options.number("queues", 1, 1, MOST_QUEUES),
            iops=options.number("iops", 0, 0, _MOST_OPERATIONS),
            bps=options.size("bps"),
        )
        if not drive.serial.isprintable():
            raise ConfigError(f"{options.what} has a serial number that is no text; use serial=S1")
        if options.all("overlay") and not drive.overlay:
            raise ConfigError(f"{options.what} names no overlay; use overlay=PATH")
        if why := drive._conflict():
            raise ConfigError(f"{options.what}: {why}")
        return drive

    def _conflict(self) -> str:
        """Which of the options do not go together."""
        aside = "overlay=" if self.overlay else "snapshot=on" if self.snapshot else ""
        if self.format in FORMATS:
            if self.serial:
                return f"a {self.format} image has no serial=; leave it out"
            if aside:
                return (
                    f"a {self.format} image has no {aside}; make an overlay of its own: qemu-img "
                    f"create -f qcow2 -b {shown(self.file)} -F {self.format} OVERLAY.qcow2, and "
                    "use file=OVERLAY.qcow2"
                )
        if self.snapshot and self.overlay:
            return "snapshot=on forgets what overlay= keeps; leave one out"
        if aside and self.readonly:
            return f"readonly=on leaves nothing to write to {aside}; leave one out"
        if aside and self.direct:
            return f"direct=on is not possible with {aside}; leave one out"
        return ""


def _by_name(file: str) -> str:
    """The format that the file's name tells. Its content may be the guest's, and tells nothing."""
    return next((kind for kind in _SUFFIXES if file.lower().endswith(f".{kind}")), "")
