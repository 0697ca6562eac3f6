"""What a command answers when it fails, in the words and classes of QEMU (qapi/error.json)."""

from vmexit.core.errors import VmexitError


class QmpError(VmexitError):
    """A command cannot be done. `error_class` is what a client may tell it by."""

    error_class = "GenericError"


class CommandNotFound(QmpError):
    """There is no such command, or not now."""

    error_class = "CommandNotFound"


class DeviceNotActive(QmpError):
    """What the command is for is not there."""

    error_class = "DeviceNotActive"


def invalid_type(name: str, expected: str) -> QmpError:
    """A parameter is of another type."""
    return QmpError(f"Invalid parameter type for '{name}', expected: {expected}")


def missing(name: str) -> QmpError:
    """A parameter that has to be there is not."""
    return QmpError(f"Parameter '{name}' is missing")


def unexpected(name: str) -> QmpError:
    """There is no such parameter."""
    return QmpError(f"Parameter '{name}' is unexpected")


def expects(name: str, what: str) -> QmpError:
    """A parameter has a value that cannot be."""
    return QmpError(f"Parameter '{name}' expects {what}")
