"""Which program this is, as QMP tells it."""

from typing import NamedTuple

from vmexit import __version__


class VersionTriple(NamedTuple):
    major: int
    minor: int
    micro: int


class VersionInfo(NamedTuple):
    """The numbers are vmexit's own, in the place where QEMU has its own."""

    qemu: VersionTriple
    package: str


def version_info() -> VersionInfo:
    """That of vmexit."""
    major, minor, micro = (int(number) for number in __version__.split(".")[:3])
    return VersionInfo(VersionTriple(major, minor, micro), f"vmexit {__version__}")
