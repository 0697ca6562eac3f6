"""Errors: one root; each class says what went wrong and which exit status the command gives it.

A message is one line that names the thing and, after a semicolon, the remedy.
"""


class VmexitError(Exception):
    """Root of everything that vmexit raises on purpose."""

    exit_status = 1


class ConfigError(VmexitError):
    """The configuration cannot be: a bad size, two devices at one address, …"""

    exit_status = 2


class ImageError(VmexitError):
    """The guest image is missing, unreadable, or does not fit its place."""

    exit_status = 2


class GuestCrash(VmexitError):
    """The guest did something that ends it; the message carries registers and instruction."""

    exit_status = 3


class HostError(VmexitError):
    """This host cannot do it: no accelerator, a failing system call, a file that cannot be used."""

    exit_status = 4


class GuestAddressError(VmexitError, IndexError):
    """A guest physical address (or a part of the range asked for) has no memory behind it."""

    exit_status = 2


def shown(path: str) -> str:
    """`path` as it is put into a message: quoted where it has line breaks and the like."""
    return path if path and path.isprintable() else repr(path)


_LONGEST = 64


def quoted(value: object) -> str:
    """`value` as a message repeats it: quoted, and only the beginning if it is long."""
    if isinstance(value, str) and len(value) > _LONGEST:
        return repr(value[:_LONGEST] + "...")
    text = repr(value)
    return text if len(text) <= 2 * _LONGEST else text[: 2 * _LONGEST] + "..."
