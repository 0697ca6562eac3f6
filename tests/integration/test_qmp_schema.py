"""The schema that QMP tells: complete, true of what is answered, and what QEMU's clients expect."""

import json
import shutil
import subprocess

import pytest
from qmp_client import Raw

from vmexit import Machine
from vmexit.control.qmp import QmpServer

# Ours alone, and one that QEMU had until 6.0.
OURS = {"x-query-exits", "x-query-counters", "x-snapshot-save", "query-events"}
OUR_EVENTS = {"X_SNAPSHOT_PROGRESS"}
# What QEMU has given up since (9.0): nobody can rely on it.
GONE = {("query-status", "singlestep")}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The schema, and what commands without arguments return, by name."""
    folder = tmp_path_factory.mktemp("schema")
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    options = {
        "machine": "microvm",
        "smp": 2,
        "drives": (f"file={folder / 'disk.img'}",),
        "serial": "null",
        "balloon": "0",
    }
    with (
        Machine("16M", "soft", **options) as vm,
        QmpServer(vm, f"unix:{folder / 'qmp.sock'}", name="x"),
        Raw(str(folder / "qmp.sock")) as client,
    ):
        client.negotiated()
        commands = client.say(b'{"execute":"query-commands"}')["return"]
        found = {}
        for name in (command["name"] for command in commands):
            if name.startswith("query-") or name == "x-query-counters":
                found[name] = client.say(b'{"execute":"%s"}' % name.encode())["return"]
        return found


class Schema:
    def __init__(self, entities):
        self.by_name = {entity["name"]: entity for entity in entities}
        assert len(self.by_name) == len(entities)

    def members(self, name):
        return {member["name"]: member for member in self.by_name[name]["members"]}

    def named(self, meta_type):
        return {n: e for n, e in self.by_name.items() if e["meta-type"] == meta_type}

    def conforms(self, value, name, where=""):
        """Fails if `value` is not of the type `name`."""
        entity = self.by_name[name]
        match entity["meta-type"]:
            case "builtin":
                kinds = {
                    "string": str, "int": int, "boolean": bool, "number": float, "value": object
                }  # fmt: skip
                assert isinstance(value, kinds[entity["json-type"]]), (where, value)
            case "enum":
                assert value in entity["values"], (where, value)
            case "array":
                for number, one in enumerate(value):
                    self.conforms(one, entity["element-type"], f"{where}[{number}]")
            case "object":
                members = self.members(name)
                for variant in entity.get("variants", []):
                    if variant["case"] == value[entity["tag"]]:
                        members |= self.members(variant["type"])
                assert value.keys() <= members.keys(), (where, value)
                for key, member in members.items():
                    if key in value and value[key] is not None:
                        self.conforms(value[key], member["type"], f"{where}.{key}")
                    elif key not in value:
                        assert "default" in member, (where, key)

    def kind(self, name):
        """What a value of the type is, as far as JSON can tell."""
        entity = self.by_name[name]
        meta_type = entity["meta-type"]
        if meta_type == "builtin":
            return entity["json-type"]
        if meta_type == "array":
            return ["array of", self.kind(entity["element-type"])]
        return "string" if meta_type == "enum" else meta_type


@pytest.fixture(scope="module")
def schema(answers):
    return Schema(answers["query-qmp-schema"])


def test_it_is_complete(answers, schema):
    assert set(schema.named("command")) == {c["name"] for c in answers["query-commands"]}
    assert set(schema.named("event")) == {e["name"] for e in answers["query-events"]}
    for entity in schema.by_name.values():
        names = [entity[key] for key in ("arg-type", "ret-type", "element-type") if key in entity]
        if entity["meta-type"] == "object":
            names += [member["type"] for member in entity["members"]]
            names += [variant["type"] for variant in entity.get("variants", [])]
            assert all(member.get("default") is None for member in entity["members"])
        assert all(name in schema.by_name for name in names), entity


def test_what_is_answered_is_as_it_tells(answers, schema):
    assert len(answers) > 12
    for name, value in answers.items():
        schema.conforms(value, schema.by_name[name]["ret-type"], name)


@pytest.fixture(scope="module")
def peer():
    """That of QEMU."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("no qemu-system-x86_64 to compare with")
    lines = ["qmp_capabilities", "query-qmp-schema", "quit"]
    done = subprocess.run(
        [program, "-M", "none", "-display", "none", "-S", "-qmp", "stdio"],
        input="\n".join(json.dumps({"execute": line}) for line in lines),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    (schema,) = [line for line in done.stdout.splitlines() if line.startswith('{"return": [')]
    return Schema(json.loads(schema)["return"])


def compare(schema, peer, ours, theirs, where):
    """What we give is all that QEMU's clients rely on, and of the same types."""
    if schema.by_name[ours]["meta-type"] == "array":
        ours, theirs = (s.by_name[n]["element-type"] for s, n in ((schema, ours), (peer, theirs)))
    if schema.by_name[ours]["meta-type"] != "object":
        return
    mine, other = schema.members(ours), peer.members(theirs)
    tag = peer.by_name[theirs].get("tag")
    for key, member in other.items():
        if key in mine:
            here, there = mine[key]["type"], member["type"]
            assert schema.kind(here) == peer.kind(there), (where, key)
            compare(schema, peer, here, there, f"{where}.{key}")
            if "default" not in member:
                assert "default" not in mine[key], (where, key)
        else:
            assert "default" in member or (where, key) in GONE, (where, key)
    assert tag is None or tag in mine
    if tag is None:
        assert mine.keys() <= other.keys() | {"variant"}, where


def test_the_clients_of_qemu_find_what_they_know(schema, peer):
    for name, command in schema.named("command").items():
        if name in OURS:
            assert name not in peer.by_name
            continue
        other = peer.by_name[name]
        mine, theirs = (s.members(e["arg-type"]) for s, e in ((schema, command), (peer, other)))
        assert mine.keys() <= theirs.keys(), name
        for key, member in theirs.items():
            if key in mine:
                assert ("default" in mine[key]) == ("default" in member), (name, key)
                assert schema.kind(mine[key]["type"]) == peer.kind(member["type"]), (name, key)
            else:
                assert "default" in member, (name, key)
        if name != "query-qmp-schema":
            compare(schema, peer, command["ret-type"], other["ret-type"], name)
    for name, event in schema.named("event").items():
        if name in OUR_EVENTS:
            assert name not in peer.by_name
            continue
        compare(schema, peer, event["arg-type"], peer.by_name[name]["arg-type"], name)
