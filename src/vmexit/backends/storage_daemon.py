"""Images of any format that QEMU knows, through its storage daemon."""

import json
from collections.abc import Sequence
from shutil import which

from vmexit.backends.program import Program
from vmexit.core.errors import HostError, shown

_NAME = "qemu-storage-daemon"


def serve_image(path: str, kind: str, *, readonly: bool, direct: bool, queues: int) -> Program:
    """Have the image at `path`, of format `kind`, served. Raises HostError."""
    program = which(_NAME)
    if program is None:
        raise HostError(
            f"a {kind} image needs {_NAME}: apt-get install qemu-system-common; or convert it: "
            "qemu-img convert -O raw"
        )

    def command(fd: int) -> Sequence[str]:
        cache = {"direct": direct, "no-flush": False}
        rights = {"read-only": readonly, "discard": "unmap", "cache": cache}
        file = {"driver": "file", "filename": path, **rights}
        image = {"driver": kind, "node-name": "disk", "file": file, **rights}
        export = {
            "type": "vhost-user-blk", "id": "export", "node-name": "disk", "writable": not readonly,
            "addr": {"type": "fd", "str": str(fd)}, "num-queues": queues,
        }  # fmt: skip
        return [program, "--blockdev", json.dumps(image), "--export", json.dumps(export)]

    return Program(f"{_NAME} for {shown(path)}", command)
