"""Shared folders by virtiofsd, which is QEMU's or the one in Rust."""

import os
from collections.abc import Sequence

from vmexit.backends.program import Program
from vmexit.core.errors import ConfigError, shown


def serve_folder(program: str, folder: str) -> Program:
    """Have `folder` served by the virtiofsd at `program`. Raises ConfigError, HostError."""
    if not os.access(program, os.X_OK):
        raise ConfigError(
            f"there is no program {shown(program)}; give virtiofsd's path, as "
            "virtiofsd=/usr/libexec/virtiofsd"
        )
    if not os.path.isdir(folder):  # noqa: PTH112 - a text, as the program takes it
        raise ConfigError(f"{shown(folder)} is no folder that can be shared; give one")

    def command(fd: int) -> Sequence[str]:
        return [program, f"--fd={fd}", "-o", f"source={folder}"]

    return Program(f"virtiofsd for {shown(folder)}", command)
