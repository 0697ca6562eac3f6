"""gdb's remote serial protocol (GDB manual, appendix E): a debugger for whatever the guest is."""

from vmexit.control.gdb.server import GdbServer

__all__ = ["GdbServer"]
