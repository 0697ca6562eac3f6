"""What `query-qmp-schema` tells (qapi/introspect.json), derived from the table of commands."""

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple, cast

from vmexit.control.qmp.commands import Command
from vmexit.control.qmp.typed import (
    Hint,
    Null,
    case,
    case_of,
    element,
    is_enum,
    is_object,
    members,
    variants,
)


class SchemaMetaType(Enum):
    BUILTIN = "builtin"
    ENUM = "enum"
    ARRAY = "array"
    OBJECT = "object"
    COMMAND = "command"
    EVENT = "event"


class JSONType(Enum):
    STRING = "string"
    NUMBER = "number"
    INT = "int"
    BOOLEAN = "boolean"
    NULL = "null"
    OBJECT = "object"
    ARRAY = "array"
    VALUE = "value"


@case(SchemaMetaType.BUILTIN)
class SchemaInfoBuiltin(NamedTuple):
    json_type: JSONType


class SchemaInfoEnumMember(NamedTuple):
    name: str


@case(SchemaMetaType.ENUM)
class SchemaInfoEnum(NamedTuple):
    members: list[SchemaInfoEnumMember]
    values: list[str]


@case(SchemaMetaType.ARRAY)
class SchemaInfoArray(NamedTuple):
    element_type: str


class SchemaInfoObjectMember(NamedTuple):
    name: str
    type: str
    default: object = None
    """There, and null, if the member is optional."""


class SchemaInfoObjectVariant(NamedTuple):
    case: str
    type: str


@case(SchemaMetaType.OBJECT)
class SchemaInfoObject(NamedTuple):
    members: list[SchemaInfoObjectMember]
    tag: str | None = None
    variants: list[SchemaInfoObjectVariant] | None = None


@case(SchemaMetaType.COMMAND)
class SchemaInfoCommand(NamedTuple):
    arg_type: str
    ret_type: str


@case(SchemaMetaType.EVENT)
class SchemaInfoEvent(NamedTuple):
    arg_type: str


Variant = (
    SchemaInfoBuiltin
    | SchemaInfoEnum
    | SchemaInfoArray
    | SchemaInfoObject
    | SchemaInfoCommand
    | SchemaInfoEvent
)


class SchemaInfo(NamedTuple):
    name: str
    meta_type: SchemaMetaType
    variant: Variant


_BUILTIN: dict[Hint, tuple[str, JSONType]] = {
    bool: ("bool", JSONType.BOOLEAN),
    int: ("int", JSONType.INT),
    float: ("number", JSONType.NUMBER),
    str: ("str", JSONType.STRING),
    object: ("any", JSONType.VALUE),
}
_EMPTY = "q_empty"


class _Schema:
    """Collects entities; each is named once."""

    def __init__(self) -> None:
        self.entities: dict[str, SchemaInfo] = {}

    def add(self, name: str, variant: Variant) -> str:
        self.entities[name] = SchemaInfo(name, SchemaMetaType(case_of(type(variant))), variant)
        return name

    def type(self, hint: Hint) -> str:
        """The name of a type, which is added with all that it is made of."""
        if hint is None:
            return self.add(_EMPTY, SchemaInfoObject([]))
        if hint in _BUILTIN:
            name, json_type = _BUILTIN[hint]
            return self.add(name, SchemaInfoBuiltin(json_type))
        if (inner := element(hint)) is not None:
            of = self.type(inner)
            return self.add(f"[{of}]", SchemaInfoArray(of))
        assert isinstance(hint, type), hint
        if hint.__name__ in self.entities:
            return hint.__name__
        if is_enum(hint):
            values = [str(one.value) for one in cast(Iterable[Enum], hint)]
            enum = SchemaInfoEnum([SchemaInfoEnumMember(value) for value in values], values)
            return self.add(hint.__name__, enum)
        assert is_object(hint), hint
        if not members(hint) and variants(hint) is None:
            return self.type(None)
        return self.object(hint.__name__, hint)

    def object(self, name: str, owner: object) -> str:
        """An object with the members of `owner`, which is a NamedTuple or a function."""
        self.add(name, SchemaInfoObject([]))  # in case it is made of itself
        found = [
            SchemaInfoObjectMember(m.name, self.type(m.hint), Null.NULL if m.optional else None)
            for m in members(owner)
        ]
        several = variants(owner) if isinstance(owner, type) else None
        if several is None:
            return self.add(name, SchemaInfoObject(found))
        tag, classes = several
        cases = [SchemaInfoObjectVariant(case, self.type(one)) for case, one in classes.items()]
        return self.add(name, SchemaInfoObject(found, tag, cases))

    def command(self, command: Command) -> None:
        if members(command.function):
            parameters = self.object(f"q_obj_{command.name}-arg", command.function)
        else:
            parameters = self.type(None)
        self.add(command.name, SchemaInfoCommand(parameters, self.type(command.returns)))


def build(commands: Iterable[Command], events: Iterable[tuple[str, type]]) -> list[SchemaInfo]:
    """All commands and events with the types that they are made of."""
    schema = _Schema()
    for command in commands:
        schema.command(command)
    for name, data in events:
        schema.add(name, SchemaInfoEvent(schema.type(data)))
    return list(schema.entities.values())
