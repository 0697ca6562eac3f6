"""Some registers of a device, to be attached at an address of their own."""

from vmexit.core.bus import Device, State


class Window:
    """The registers of `device` from `start` on, as if they were a device that begins there.

    Reset and state are those of the whole device, for which once is enough.
    """

    def __init__(self, device: Device, start: int) -> None:
        self._device = device
        self._start = start
        self.widths = device.widths

    def read(self, offset: int, size: int) -> int:
        return self._device.read(self._start + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write(self._start + offset, size, value)

    def reset(self) -> None:
        """Reset the device as a whole."""
        self._device.reset()

    def state(self) -> State:
        return self._device.state()

    def restore(self, state: State) -> None:
        """Restore the device as a whole."""
        self._device.restore(state)
