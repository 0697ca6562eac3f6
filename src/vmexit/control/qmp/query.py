"""Commands that ask for the machine as a whole."""

from typing import NamedTuple

from vmexit.control.qmp import errors
from vmexit.control.qmp.commands import command
from vmexit.control.qmp.session import Session
from vmexit.control.qmp.version import VersionInfo, version_info
from vmexit.control.steering import RunStatus, run_status


class StatusInfo(NamedTuple):
    running: bool
    status: RunStatus


class KvmInfo(NamedTuple):
    enabled: bool
    present: bool


class NameInfo(NamedTuple):
    name: str | None = None


class UuidInfo(NamedTuple):
    UUID: str


class ExitRow(NamedTuple):
    """Exits of one reason at one address; times in nanoseconds.

    `device` is who answers there, `elsewhere` that these are addresses too many to be told apart.
    """

    reason: str
    exits: int
    host_ns: int
    address: int | None = None
    size: int | None = None
    median_ns: int | None = None
    device: str | None = None
    elsewhere: bool | None = None


class VcpuTime(NamedTuple):
    """How a vCPU's time is divided, in nanoseconds."""

    cpu_index: int
    guest_ns: int
    host_ns: int
    elsewhere_ns: int


class ExitInfo(NamedTuple):
    total: int
    rows: list[ExitRow]
    vcpus: list[VcpuTime]


@command("query-status")
def query_status(session: Session) -> StatusInfo:
    status = run_status(session.vm, debugging=session.served.relay.debugging)
    return StatusInfo(status is RunStatus.RUNNING, status)


@command("query-version")
def query_version(session: Session) -> VersionInfo:
    return version_info()


@command("query-kvm")
def query_kvm(session: Session) -> KvmInfo:
    enabled = session.vm.accel == "kvm"
    return KvmInfo(enabled, enabled or _present())


def _present() -> bool:
    import os

    return os.access("/dev/kvm", os.R_OK | os.W_OK)


@command("query-name")
def query_name(session: Session) -> NameInfo:
    return NameInfo(session.served.name or None)


@command("query-uuid")
def query_uuid(session: Session) -> UuidInfo:
    # The guest sees none, as with QEMU without -uuid.
    return UuidInfo("00000000-0000-0000-0000-000000000000")


@command("x-query-exits")
def query_exits(session: Session) -> ExitInfo:
    counts = session.served.exits
    if counts is None:
        raise errors.QmpError("nobody counts exits; run the machine with --stats")
    now = counts.snapshot()
    rows = [
        ExitRow(
            row.reason,
            row.exits,
            row.host_ns,
            row.address,
            row.size if row.address is not None else None,
            row.median_ns if row.timed else None,
            _device(session, row.reason, row.address),
            row.elsewhere or None,
        )
        for row in now.rows
    ]
    times = [VcpuTime(t.vcpu, t.guest_ns, t.host_ns, t.elsewhere_ns) for t in now.vcpus]
    return ExitInfo(sum(row.exits for row in rows), rows, times)


def _device(session: Session, reason: str, address: int | None) -> str | None:
    if address is None:
        return None
    return session.vm.device_at(address, mmio=reason.startswith("mmio")) or None
