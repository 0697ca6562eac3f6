"""What a user says of a console: `--console WHERE[,name=NAME]`; and what a program has of it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from vmexit.core.errors import ConfigError, quoted
from vmexit.machine.options import Options

# Linux shows it in a page of sysfs, and udev makes a file of it.
_LONGEST_NAME = 255


class GuestConsole(Protocol):
    """The consoles of a machine. Any thread may use it."""

    def resize(self, columns: int, rows: int, number: int = 0) -> None:
        """Tell the guest how large console `number` (hvc0 is 0) is. Raises ConfigError.

        Of a console at a terminal this holds until that has another size.
        """
        ...


class ConsoleOptions(NamedTuple):
    """One port: a console, or with a name a plain port."""

    where: str
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> "ConsoleOptions":
        """`WHERE,name=NAME`, where a comma in a value is written twice. Raises ConfigError."""
        options = Options("the console", text, ("name",), named=True)
        if not options.first:
            raise ConfigError(f"{options.what} leads nowhere; use stdio, pty or unix:PATH")
        name = options.text("name")
        if options.all("name") and (
            not name or not name.isprintable() or "/" in name or len(name.encode()) > _LONGEST_NAME
        ):
            raise ConfigError(
                f"{options.what} has a name that cannot be; use at most {_LONGEST_NAME} bytes of "
                "text without a slash"
            )
        return cls(options.first, name)

    @classmethod
    def parse_all(cls, texts: Sequence[str], serial: str | None) -> list["ConsoleOptions"]:
        """All of a machine. Raises ConfigError, also where two, or `serial`, want the same."""
        from vmexit.devices.virtio.console import MOST_PORTS

        found = [cls.parse(text) for text in texts]
        if len(found) > MOST_PORTS:
            raise ConfigError(f"{len(found)} consoles are too many; use {MOST_PORTS} at most")
        names = [one.name for one in found if one.name]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two ports have the name {quoted(name)}; give one another name")
        if [serial, *(one.where for one in found)].count("stdio") > 1:
            raise ConfigError(
                "standard input can go to one place only; use stdio for one of the serial port and "
                "the consoles, and pty or unix:PATH for the others"
            )
        return found
