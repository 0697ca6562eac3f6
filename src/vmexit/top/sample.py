"""What is known of a machine at one moment, out of what it answers."""

from typing import NamedTuple

from vmexit.control.qmp_client import Json, QmpClient, RefusedError
from vmexit.core.errors import ConfigError

# What no number is above, nor below its negative: with these, floats can reckon.
_MOST = (1 << 64) - 1


class Exits(NamedTuple):
    """Exits of one reason at one place so far, and their time on the host."""

    exits: int
    host_ns: int


class Place(NamedTuple):
    """Which exits: reason, address and size as they are shown, and who answers there."""

    reason: str
    where: str
    device: str


class Spent(NamedTuple):
    """Nanoseconds of a vCPU."""

    guest: int
    host: int
    elsewhere: int


class Flow(NamedTuple):
    """Operations so far, and their bytes."""

    operations: int
    size: int


class FlowName(NamedTuple):
    """Which flow: of this device, of this type, by this operation."""

    device: str
    kind: str
    operation: str


class Sample(NamedTuple):
    """One moment; `exits` and `vcpus` are None of a machine that does not count them."""

    time_ns: int
    state: str
    accelerator: str
    machine: str
    vcpu_count: int
    memory: int
    resident: int
    balloon: int | None
    cpu_seconds: float
    process_resident: int
    started: float
    unclaimed: int
    flows: dict[FlowName, Flow]
    waited_ns: dict[str, int]
    exits: dict[Place, Exits] | None
    vcpus: dict[int, Spent] | None


def take(client: QmpClient) -> Sample:
    """Ask for all of it. Raises ConfigError where that is no machine of vmexit's, and what
    `QmpClient.execute()` raises.
    """
    try:
        counters = client.execute("x-query-counters")
    except RefusedError as error:
        raise ConfigError(f"this is no machine of vmexit's: {error}; give another one") from error
    try:
        counted = client.execute("x-query-exits")
    except RefusedError:
        counted = None
    try:
        return _sample(_object(counters), None if counted is None else _object(counted))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"the machine answers what this vmexit does not know ({error}); use the same version"
        ) from error


_Object = dict[str, Json]


def _sample(counters: _Object, counted: _Object | None) -> Sample:
    memory, process = _object(counters["memory"]), _object(counters["process"])
    devices = _objects(counters["devices"])
    return Sample(
        _int(counters["time-ns"]),
        _str(counters["state"]),
        _str(counters["accelerator"]),
        _str(counters["machine"]),
        _int(counters["vcpus"]),
        _int(memory["size"]),
        _int(memory["resident"]),
        _int(_object(counters["balloon"])["actual"]) if "balloon" in counters else None,
        _float(process["cpu-seconds"]),
        _int(process["resident"]),
        _float(process["started"]),
        sum(_int(one["reads"]) + _int(one["writes"]) for one in _objects(counters["unclaimed"])),
        {
            FlowName(_str(one["name"]), _str(one["kind"]), _str(flow["operation"])): Flow(
                _int(flow["operations"]), _int(flow["size"])
            )
            for one in devices
            for flow in _objects(one["flows"])
        },
        {_str(one["name"]): _int(one["waited-ns"]) for one in devices if "waited-ns" in one},
        None if counted is None else dict(map(_exits, _objects(counted["rows"]))),
        None if counted is None else dict(map(_spent, _objects(counted["vcpus"]))),
    )


def _exits(row: _Object) -> tuple[Place, Exits]:
    where = "elsewhere" if row.get("elsewhere") else ""
    reason = _str(row["reason"])
    if "address" in row:
        address = _int(row["address"])
        where = f"{address:#06x}" if reason.startswith("io ") else f"{address:#x}"
        where += f"/{_int(row['size'])}"
    device = _str(row["device"]) if "device" in row else ""
    return Place(reason, where, device), Exits(_int(row["exits"]), _int(row["host-ns"]))


def _spent(row: _Object) -> tuple[int, Spent]:
    parts = (_int(row[f"{where}-ns"]) for where in Spent._fields)
    return _int(row["cpu-index"]), Spent(*parts)


def _object(value: Json) -> _Object:
    if not isinstance(value, dict):
        raise TypeError("no object")
    return value


def _objects(value: Json) -> list[_Object]:
    if not isinstance(value, list):
        raise TypeError("no array")
    return [_object(one) for one in value]


def _int(value: Json) -> int:
    if type(value) is not int or abs(value) > _MOST:
        raise TypeError("no integer of 64 bits")
    return value


def _float(value: Json) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("no number")
    if not abs(value) <= _MOST:  # nor is it NaN
        raise TypeError("no number of 64 bits")
    return float(value)


def _str(value: Json) -> str:
    if not isinstance(value, str):
        raise TypeError("no string")
    return value
