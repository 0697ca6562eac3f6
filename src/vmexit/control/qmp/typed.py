"""Python's types as QMP's: what a value must be, and how it goes over the wire.

`bool`, `int`, `float`, `str` and `object` (any value) are built in; an `Enum` of strings is an
enumeration, a `list` an array, and a `NamedTuple` an object, whose members may be None if they are
optional. Names of members have dashes for underscores, but those that are `underscored()`.
"""

import types
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from vmexit.control.qmp import errors
from vmexit.control.qmp.wire import Json

# Whatever a value may be of: a class, or what an annotation with brackets makes.
Hint = object

_INT64_MIN, _UINT64_MAX = -(1 << 63), (1 << 64) - 1


class Member(NamedTuple):
    """A member of an object, or a parameter of a command."""

    name: str
    field: str
    """Its name in Python."""
    hint: Hint
    optional: bool


_underscored: dict[object, frozenset[str]] = {}
_cases: dict[type, Enum] = {}
_T = TypeVar("_T", bound=type)


def underscored(*names: str) -> Callable[[_T], _T]:
    """The NamedTuple decorated has these members as they are spelled."""

    def register(owner: _T) -> _T:
        _underscored[owner] = frozenset(names)
        return owner

    return register


def case(value: Enum) -> Callable[[_T], _T]:
    """The NamedTuple decorated has the members that there are where the tag has `value`."""

    def register(owner: _T) -> _T:
        _cases[owner] = value
        return owner

    return register


def case_of(owner: type) -> Enum:
    """What `case()` was given."""
    return _cases[owner]


class Null(Enum):
    """A member that is there, and null."""

    NULL = None


@cache
def members(owner: object) -> tuple[Member, ...]:
    """Of a NamedTuple, or the parameters of a function but the first, by their annotations."""
    hints = get_type_hints(owner)
    hints.pop("return", None)
    spelled = _underscored.get(owner, frozenset())
    if isinstance(owner, type):
        optional = frozenset(getattr(owner, "_field_defaults", {}))
        fields = [name for name in hints if name != "variant"]
    else:
        optional = frozenset(getattr(owner, "__kwdefaults__", None) or {})
        fields = list(hints)[1:]
    return tuple(
        Member(
            name if name in spelled else name.replace("_", "-"),
            name,
            _without_none(hints[name]),
            name in optional,
        )
        for name in fields
    )


def variants(owner: type) -> tuple[str, dict[str, type]] | None:
    """Of an object with variants: the member that tells which it is, and the classes by that.

    It has a field `variant`, one of several NamedTuples, each with its `case()`.
    """
    hint = get_type_hints(owner).get("variant")
    if hint is None:
        return None
    classes = {_cases[one]: one for one in get_args(hint)}
    kind = type(next(iter(classes)))
    tag = next(member.name for member in members(owner) if member.hint is kind)
    return tag, {str(value.value): one for value, one in classes.items()}


def _without_none(hint: Hint) -> Hint:
    if get_origin(hint) in (types.UnionType, Union):
        others = [one for one in get_args(hint) if one is not type(None)]
        if len(others) == 1:
            return cast(Hint, others[0])
    return hint


def is_object(hint: Hint) -> bool:
    """Whether it is a NamedTuple."""
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def is_enum(hint: Hint) -> bool:
    """Whether it is an enumeration."""
    return isinstance(hint, type) and issubclass(hint, Enum) and hint is not Null


def element(hint: Hint) -> Hint | None:
    """What an array is of; None for what is no array."""
    return cast(Hint, get_args(hint)[0]) if get_origin(hint) is list else None


def arguments(function: Callable[..., object], given: Mapping[str, Json]) -> dict[str, object]:
    """What to call `function` with, by name. Raises QmpError, in QEMU's words and order."""
    return _checked_members(function, given, "")


def _checked_members(owner: object, given: Mapping[str, Json], where: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for member in members(owner):
        if member.name in given:
            found[member.field] = _checked(given[member.name], member.hint, where + member.name)
        elif not member.optional:
            raise errors.missing(where + member.name)
    known = {member.name for member in members(owner)}
    for name in given:
        if name not in known:
            raise errors.unexpected(where + name)
    return found


def _checked(value: Json, hint: Hint, name: str) -> object:
    if hint is object:
        return value
    if isinstance(hint, type) and is_enum(hint):
        if not isinstance(value, str):
            raise errors.invalid_type(name, "string")
        try:
            return hint(value)
        except ValueError:
            raise errors.QmpError(
                f"Parameter '{name}' does not accept value '{value[:64]}'"
            ) from None
    if (inner := element(hint)) is not None:
        if not isinstance(value, list):
            raise errors.invalid_type(name, "array")
        return [_checked(one, inner, f"{name}[{i}]") for i, one in enumerate(value)]
    if isinstance(hint, type) and is_object(hint):
        if not isinstance(value, dict):
            raise errors.invalid_type(name, "object")
        return hint(**_checked_members(hint, value, f"{name}."))
    return _checked_builtin(value, hint, name)


def _checked_builtin(value: Json, hint: Hint, name: str) -> object:
    if hint is bool:
        if not isinstance(value, bool):
            raise errors.invalid_type(name, "boolean")
    elif hint is int:
        # Addresses are beyond what QEMU takes: kernels have those above 2^63.
        if type(value) is not int or not _INT64_MIN <= value <= _UINT64_MAX:
            raise errors.invalid_type(name, "integer")
    elif hint is float:
        if type(value) not in (int, float):
            raise errors.invalid_type(name, "number")
    elif not isinstance(value, str):
        raise errors.invalid_type(name, "string")
    return value


def to_wire(value: object) -> Json:
    """A value that a command returns, as JSON."""
    if value is None:
        return {}  # of a command that returns nothing
    if isinstance(value, Enum):
        return cast(Json, value.value)
    if isinstance(value, tuple):
        wire: dict[str, Json] = {
            member.name: to_wire(field)
            for member in members(type(value))
            if (field := getattr(value, member.field)) is not None
        }
        if (variant := getattr(value, "variant", None)) is not None:
            wire.update(cast(dict[str, Json], to_wire(variant)))
        return wire
    if isinstance(value, list):
        return [to_wire(one) for one in value]
    assert isinstance(value, bool | int | float | str), value
    return value
