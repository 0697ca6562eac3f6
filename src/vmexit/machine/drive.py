"""What a user says of a disk: `--drive file=P[,readonly=on][,serial=S][,format=raw]`."""

from typing import NamedTuple

from vmexit.core.errors import ConfigError
from vmexit.machine.options import Options


class Drive(NamedTuple):
    """One disk."""

    file: str
    readonly: bool = False
    serial: str = ""
    format: str = ""
    """Empty: raw, but not if the file looks like another one."""

    @classmethod
    def parse(cls, text: str) -> "Drive":
        """`file=P,readonly=on`, where a comma in a value is written twice. Raises ConfigError."""
        options = Options("the drive", text, cls._fields)
        file = options.required("file", "file=PATH")
        if (kind := options.text("format")) not in ("", "raw"):
            raise ConfigError(
                f"a drive cannot be {kind!r} yet; make it raw: qemu-img convert -O raw"
            )
        return cls(file, options.flag("readonly"), options.text("serial"), kind)
