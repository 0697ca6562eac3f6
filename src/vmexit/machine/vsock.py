"""What a user says of the guest's sockets: `--vsock path=P[,cid=N]`."""

from typing import NamedTuple

from vmexit.abi.virtio import VSOCK_CID_FIRST, VSOCK_CID_LAST
from vmexit.machine.options import Options


class VsockOptions(NamedTuple):
    """Where the host's Unix sockets are, and the guest's context ID."""

    path: str
    cid: int = VSOCK_CID_FIRST

    @classmethod
    def parse(cls, text: str) -> "VsockOptions":
        """`cid=N,path=P`, where a comma in a value is written twice. Raises ConfigError."""
        options = Options("the vsock", text, cls._fields)
        path = options.required("path", "path=PATH")
        return cls(path, options.number("cid", VSOCK_CID_FIRST, VSOCK_CID_FIRST, VSOCK_CID_LAST))
