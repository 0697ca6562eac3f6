"""Shared folders by virtiofsd, which is QEMU's or the one in Rust."""

from collections.abc import Sequence

from vmexit.backends.program import Program


def serve_folder(program: str, folder: str, *, readonly: bool) -> Program:
    """Have `folder` served by the virtiofsd at `program`. Raises HostError."""

    def command(fd: int) -> Sequence[str]:
        options = ["-o", f"source={folder}"]
        if readonly:
            options.append("--readonly")
        return [program, f"--fd={fd}", *options]

    return Program(f"virtiofsd for {folder}", command)
