"""Commands that ask for the machine's parts, and the balloon's."""

from enum import Enum
from typing import NamedTuple

from vmexit.control import hardware
from vmexit.control.qmp import errors
from vmexit.control.qmp.commands import command
from vmexit.control.qmp.session import Session
from vmexit.control.qmp.typed import underscored
from vmexit.core.errors import ConfigError


class SysEmuTarget(Enum):
    X86_64 = "x86_64"


class CpuInstanceProperties(NamedTuple):
    socket_id: int
    core_id: int
    thread_id: int


class CpuInfoFast(NamedTuple):
    cpu_index: int
    qom_path: str
    thread_id: int
    """The host's thread that runs it; 0 before the first run."""
    target: SysEmuTarget
    props: CpuInstanceProperties | None = None


class ImageInfo(NamedTuple):
    filename: str
    format: str
    virtual_size: int


class BlockdevDetectZeroesOptions(Enum):
    OFF = "off"


class BlockdevCacheInfo(NamedTuple):
    writeback: bool
    direct: bool
    no_flush: bool


@underscored(
    "backing_file_depth", "bps_rd", "bps_wr", "iops_rd", "iops_wr", "detect_zeroes",
    "write_threshold",
)  # fmt: skip
class BlockDeviceInfo(NamedTuple):
    file: str
    ro: bool
    drv: str
    backing_file_depth: int
    encrypted: bool
    bps: int
    bps_rd: int
    bps_wr: int
    iops: int
    iops_rd: int
    iops_wr: int
    cache: BlockdevCacheInfo
    detect_zeroes: BlockdevDetectZeroesOptions
    write_threshold: int
    image: ImageInfo


class BlockInfo(NamedTuple):
    device: str
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo | None = None
    """None where another program reads the image, and only that knows its size."""


class ChardevInfo(NamedTuple):
    label: str
    filename: str
    frontend_open: bool


class MemoryInfo(NamedTuple):
    base_memory: int
    plugged_memory: int | None = None


class BalloonInfo(NamedTuple):
    actual: int


@command("query-cpus-fast")
def query_cpus_fast(session: Session) -> list[CpuInfoFast]:
    return [
        CpuInfoFast(
            vcpu.index,
            f"/machine/unattached/device[{vcpu.index}]",
            session.vm.thread_id(vcpu.index),
            SysEmuTarget.X86_64,
            CpuInstanceProperties(0, vcpu.index, 0),  # each is a core of its own
        )
        for vcpu in session.vm.vcpus
    ]


@command("query-block")
def query_block(session: Session) -> list[BlockInfo]:
    return [_block(disk) for disk in hardware.disks(session.vm)]


def _block(disk: hardware.Disk) -> BlockInfo:
    drive, size = disk.drive, disk.size
    inserted = None
    if size is not None:
        inserted = BlockDeviceInfo(
            disk.where, drive.readonly, "raw", 0, False, drive.bps, 0, 0, drive.iops, 0, 0,
            BlockdevCacheInfo(writeback=True, direct=drive.direct, no_flush=False),
            BlockdevDetectZeroesOptions.OFF, 0, ImageInfo(disk.where, "raw", size),
        )  # fmt: skip
    return BlockInfo(disk.device, "unknown", False, False, inserted)


@command("query-chardev")
def query_chardev(session: Session) -> list[ChardevInfo]:
    return [ChardevInfo(one.label, one.where, True) for one in hardware.channels(session.vm)]


@command("query-memory-size-summary")
def query_memory_size_summary(session: Session) -> MemoryInfo:
    return MemoryInfo(session.vm.config.memory, 0)


@command("query-balloon")
def query_balloon(session: Session) -> BalloonInfo:
    _require_balloon(session)
    return BalloonInfo(hardware.memory_left(session.vm))


@command("balloon")
def balloon(session: Session, *, value: int) -> None:
    _require_balloon(session)
    hardware.leave_memory(session.vm, value)


def _require_balloon(session: Session) -> None:
    try:
        _ = session.vm.balloon
    except ConfigError as error:
        raise errors.DeviceNotActive("No balloon device has been activated") from error
