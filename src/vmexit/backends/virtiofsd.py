"""Shared folders by virtiofsd, which is QEMU's or the one in Rust."""

import os
from collections.abc import Sequence

from vmexit.backends.program import Program
from vmexit.core.errors import ConfigError, shown

# Where distributions have it: by itself, and with QEMU.
_PLACES = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd"]


def serve_folder(program: str, folder: str) -> Program:
    """Have `folder` served by the virtiofsd at `program`. Raises ConfigError, HostError."""
    if not os.access(program, os.X_OK):
        there = [place for place in _PLACES if os.access(place, os.X_OK)] or _PLACES
        raise ConfigError(
            f"there is no program {shown(program)}; give virtiofsd's path: virtiofsd={there[0]}"
        )
    if not os.path.isdir(folder):  # noqa: PTH112 - a text, as the program takes it
        raise ConfigError(f"{shown(folder)} is no folder that can be shared; give one")

    folder = os.path.abspath(folder)  # noqa: PTH100 - it changes its own root
    if "," in folder:
        raise ConfigError(f"virtiofsd takes no comma in {shown(folder)}; share another folder")

    def command(fd: int) -> Sequence[str]:
        return [program, f"--fd={fd}", "-o", f"source={folder}"]

    return Program(f"virtiofsd for {shown(folder)}", command)
