"""QMP, the machine protocol of QEMU: `QmpServer(vm, "unix:PATH")`."""

from vmexit.control.qmp.server import QmpServer

__all__ = ["QmpServer"]
