"""Commands that tell of commands and events."""

from typing import NamedTuple

from vmexit.control.qmp import schema
from vmexit.control.qmp.commands import all_commands, all_events, command
from vmexit.control.qmp.schema import SchemaInfo
from vmexit.control.qmp.session import Session


class CommandInfo(NamedTuple):
    name: str


class EventInfo(NamedTuple):
    name: str


@command("query-commands")
def query_commands(session: Session) -> list[CommandInfo]:
    return [CommandInfo(one.name) for one in all_commands()]


@command("query-events")
def query_events(session: Session) -> list[EventInfo]:
    return [EventInfo(name) for name, _ in all_events()]


@command("query-qmp-schema")
def query_qmp_schema(session: Session) -> list[SchemaInfo]:
    return schema.build(all_commands(), all_events())
