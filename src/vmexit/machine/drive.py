"""What a user says of a disk: `--drive file=P[,readonly=on][,serial=S][,format=raw]`."""

from typing import NamedTuple

from vmexit.core.errors import ConfigError

_ON_OFF = {"on": True, "off": False}


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
        values = {}
        for option in text.replace(",,", "\0").split(","):
            key, equals, value = option.replace("\0", ",").partition("=")
            if not equals or key not in cls._fields:
                raise ConfigError(
                    f"{option!r} of the drive {text!r} is unknown; "
                    f"use file=PATH, with {', '.join(f'{k}=' for k in cls._fields[1:])}"
                )
            if key in values:
                raise ConfigError(f"the drive {text!r} has {key}= twice; leave one out")
            values[key] = value
        if not values.get("file"):
            raise ConfigError(f"the drive {text!r} names no file; use file=PATH")
        readonly = values.get("readonly", "off")
        if readonly not in _ON_OFF:
            raise ConfigError(f"readonly={readonly} of the drive {text!r} is neither on nor off")
        if (kind := values.get("format", "")) not in ("", "raw"):
            raise ConfigError(
                f"a drive cannot be {kind!r} yet; make it raw: qemu-img convert -O raw"
            )
        return cls(values["file"], _ON_OFF[readonly], values.get("serial", ""), kind)
