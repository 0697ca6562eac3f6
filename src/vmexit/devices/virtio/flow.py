"""How much has gone through a device: operations of one kind, and their bytes."""


class Flow:
    """Counts under the lock of its device; any thread may read. Neither number ever goes down."""

    __slots__ = ("name", "operations", "size")

    def __init__(self, name: str) -> None:
        """`name` is that of the operation: `read`, `transmit`, …"""
        self.name = name
        self.operations = 0
        self.size = 0
        """Bytes in all."""

    def count(self, size: int) -> None:
        """One more operation, of `size` bytes."""
        self.operations += 1
        self.size += size
