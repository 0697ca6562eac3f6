"""What was written to a disk over its image, as it was at some moment."""

import os
from typing import NamedTuple


class DiskImage(NamedTuple):
    """`fd` is a file as long as the disk, `blocks` says which parts of it count, in the form of
    the overlay that gave it; `digest` tells the image below. Whoever has it closes it.
    """

    fd: int
    blocks: bytes
    digest: bytes

    def close(self) -> None:
        """The disks that began with it go on."""
        os.close(self.fd)
