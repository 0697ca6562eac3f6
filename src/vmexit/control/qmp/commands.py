"""The table of commands and events: typed functions and tuples, from which all else is derived."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import NamedTuple, TypeVar, get_type_hints

from vmexit.control.qmp.typed import Hint

# A command: it gets the session, and its arguments by name; it returns a value of its annotation.
Function = Callable[..., object]

_F = TypeVar("_F", bound=Function)
_T = TypeVar("_T", bound=type)


class Command(NamedTuple):
    """A command and the function that does it."""

    name: str
    function: Function

    @property
    def returns(self) -> Hint:
        """What it returns; None for nothing."""
        hint: Hint = get_type_hints(self.function)["return"]
        return None if hint is type(None) else hint


_commands: dict[str, Command] = {}
_events: dict[str, type] = {}

# Who adds to the table.
_MODULES = (
    "negotiation", "query", "counters", "lifecycle", "memory", "snapshots", "hardware",
    "introspection", "events",
)  # fmt: skip


def command(name: str) -> Callable[[_F], _F]:
    """The function decorated is the command `name`.

    Its keyword-only parameters are the command's, optional with a default; annotations and all are
    what `query-qmp-schema` tells.
    """

    def register(function: _F) -> _F:
        _commands[name] = Command(name, function)
        return function

    return register


def event(name: str) -> Callable[[_T], _T]:
    """The NamedTuple decorated is the data of the event `name`."""

    def register(data: _T) -> _T:
        _events[name] = data
        return data

    return register


def event_name(data: type) -> str:
    """The name of the event whose data are a `data`."""
    return next(name for name, one in _events.items() if one is data)


def _load() -> None:
    for module in _MODULES:
        import_module(f"vmexit.control.qmp.{module}")


def find(name: str) -> Command | None:
    """The command `name`, if there is one."""
    _load()
    return _commands.get(name)


def all_commands() -> Iterator[Command]:
    """All of them, by name."""
    _load()
    return iter([_commands[name] for name in sorted(_commands)])


def all_events() -> Iterator[tuple[str, type]]:
    """All events with their data, by name."""
    _load()
    return iter(sorted(_events.items()))
