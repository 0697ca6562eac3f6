"""What a user says of a shared folder: `--share TAG=DIR[,readonly=on|,virtiofsd=PROGRAM]`."""

import resource
from collections.abc import Sequence
from typing import NamedTuple

from vmexit.core.errors import ConfigError, quoted
from vmexit.machine.options import Options

# Linux shows it in a page of sysfs, and users type it.
_LONGEST_TAG = 255
_LONGEST_FS_TAG = 36  # virtio 5.11.4
_MOST_DESCRIPTORS = 1024


class Share(NamedTuple):
    """One folder, by the name under which the guest mounts it."""

    tag: str
    folder: str
    readonly: bool = False
    virtiofsd: str = ""
    """The program that serves it, by virtio-fs; empty: we do, by 9P."""

    @classmethod
    def parse(cls, text: str) -> "Share":
        """`tag=DIR,readonly=on`, where a comma in a value is written twice. Raises ConfigError."""
        options = Options("the share", text, ("readonly", "virtiofsd"), named=True)
        tag, folder = options.name, options.value
        if not tag or not folder:
            raise ConfigError(f"{options.what} names no tag or no folder; use TAG=DIR")
        readonly, program = options.flag("readonly"), options.text("virtiofsd")
        if readonly and program:
            raise ConfigError(
                f"{options.what}: not each virtiofsd can be read-only; leave one of the two out"
            )
        longest = _LONGEST_FS_TAG if program else _LONGEST_TAG
        if not tag.isprintable() or len(tag.encode()) > longest:
            raise ConfigError(
                f"{options.what} has a tag that cannot be; use at most {longest} bytes of text"
            )
        return cls(tag, folder, readonly, program)

    @classmethod
    def parse_all(cls, texts: Sequence[str]) -> list["Share"]:
        """All of a machine. Raises ConfigError, also for a tag that is there twice."""
        shares = [cls.parse(text) for text in texts]
        tags = [share.tag for share in shares]
        for tag in tags:
            if tags.count(tag) > 1:
                raise ConfigError(f"two shares have the tag {quoted(tag)}; give one another tag")
        return shares


def descriptors_for_each(shares: int) -> int:
    """How many each of so many may have: half of those of this process are kept for the rest."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    half = _MOST_DESCRIPTORS * shares if limit == resource.RLIM_INFINITY else limit // 2
    return min(_MOST_DESCRIPTORS, half // shares)
