"""Options with values of their own, as `file=P,readonly=on`."""

from collections.abc import Sequence

from vmexit.core.errors import ConfigError, quoted, shown
from vmexit.machine.config import parse_size

_MAX_SIZE = 1 << 48
_ON_OFF = {"on": True, "off": False}


class Options:
    """`key=value,…` of `what`, where a comma in a value is written twice. Raises ConfigError."""

    def __init__(self, what: str, text: str, keys: Sequence[str], *, named: bool = False) -> None:
        """`keys` are those there are; with `named`, what comes first is a name or a kind."""
        self.what = f"{what} {quoted(text)}"
        self.first = self.name = self.value = ""
        self._values: dict[str, list[str]] = {}
        for number, option in enumerate(text.replace(",,", "\0").split(",")):
            key, equals, value = option.replace("\0", ",").partition("=")
            if named and number == 0:
                self.first = option.replace("\0", ",")
                self.name, self.value = key, value
            elif equals and key in keys:
                self._values.setdefault(key, []).append(value)
            else:
                raise ConfigError(
                    f"{quoted(option)} of {self.what} is unknown; {_hint(option, keys)}"
                )

    def all(self, key: str) -> list[str]:
        """The values of `key`, which may be there any number of times."""
        return self._values.get(key, [])

    def text(self, key: str, default: str = "") -> str:
        """The value of `key`."""
        values = self.all(key)
        if len(values) > 1:
            raise ConfigError(f"{self.what} has {key}= twice; leave one out")
        return values[0] if values else default

    def required(self, key: str, use: str) -> str:
        """Likewise, which must be there; `use` shows how."""
        value = self.text(key)
        if not value:
            raise ConfigError(f"{self.what} has no {key}; use {use}")
        return value

    def flag(self, key: str) -> bool:
        """Whether `key` is on; it is not where nothing is said."""
        value = self.text(key, "off")
        if value not in _ON_OFF:
            raise ConfigError(
                f"{key}={shown(value[:40])} of {self.what} is neither on nor off; use one of these"
            )
        return _ON_OFF[value]

    def number(self, key: str, default: int, least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        value = self.text(key, str(default))
        if value.isdecimal() and len(value) < 20 and least <= int(value) <= most:
            return int(value)
        raise ConfigError(
            f"{key}={shown(value[:40])} of {self.what} cannot be; use a number from {least} to "
            f"{most}"
        )

    def size(self, key: str) -> int:
        """A number of bytes, as `512K`; 0 where nothing is said."""
        value = parse_size(self.text(key, "0"))
        if 0 < value < 1024:
            raise ConfigError(f"{key}={value} of {self.what} is only {value} bytes; use {value}M")
        if 0 <= value < _MAX_SIZE:
            return value
        raise ConfigError(f"{key}={self.text(key)[:40]} of {self.what} cannot be; use 1M, 1G")


def _hint(option: str, keys: Sequence[str]) -> str:
    import difflib  # slow to load

    key, equals, _ = option.partition("=")
    if close := difflib.get_close_matches(key.replace("-", ""), keys, 1):
        return f"did you mean {close[0]}=?"
    if not equals and keys[0] == "file":
        return "a file is file=PATH, and a comma in it is written twice"
    more = "" if equals else ", and a comma in a value is written twice"
    return f"use {_list(keys)} with a value{more}"


def _list(keys: Sequence[str]) -> str:
    names = [f"{key}=" for key in keys]
    return " or ".join([*[", ".join(names[:-1])] * (len(names) > 1), names[-1]])
