"""What `Machine.run_until()` waits for."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from vmexit.accel.base import Point
from vmexit.arch.x86.layout import PHYSICAL_END
from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError
from vmexit.machine.stop import Stop, StopReason

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine


class Until(NamedTuple):
    """One of these; the others are None."""

    pio: int | None = None
    mmio: int | None = None
    address: int | None = None
    symbol: str | None = None
    text: str | None = None

    def check(self) -> None:
        """Raises ConfigError unless it is one thing that can be."""
        if sum(value is not None for value in self) != 1:
            raise ConfigError(
                "run_until() waits for one thing; give pio=, mmio=, address=, symbol= or text="
            )
        if self.pio is not None and not 0 <= self.pio <= 0xFFFF:
            raise ConfigError(f"there is no port {self.pio:#x}; use 0 to 0xffff")
        if self.text == "":
            raise ConfigError("no text is waited for; give some")
        if self.mmio is not None and not 0 <= self.mmio < PHYSICAL_END:
            raise ConfigError(f"{self.mmio:#x} is no guest physical address; use a valid one")


def run_until(
    vm: "Machine",
    until: Until,
    timeout: float | None,
    buses: tuple[Bus, Bus],
    happened: Callable[[], None],
) -> Stop:
    """Run until that happens. `buses` are those of ports and of MMIO; `happened` ends a run."""
    until.check()
    address = until.address
    if until.symbol is not None:
        address = vm.symbols.address(until.symbol)
        if address is None:
            raise ConfigError(
                f"no symbol is called {until.symbol!r}; see vmexit symbols, and symbols="
            )
    with ExitStack() as stack:
        if until.text is not None:
            stack.callback(vm.console.when(until.text, happened))
            return vm.run(timeout)
        if address is None:
            bus, at = (buses[0], until.pio) if until.mmio is None else (buses[1], until.mmio)
            assert at is not None
            with vm.paused():
                stack.callback(bus.watch(at, happened))
            return vm.run(timeout)
        point = Point(address)
        vm.add_breakpoint(point)
        stack.callback(vm.remove_breakpoint, point)
        stop = vm.run(timeout)
        if stop.reason is StopReason.DEBUG and stop.point == point:
            return stop._replace(reason=StopReason.UNTIL)
        return stop
