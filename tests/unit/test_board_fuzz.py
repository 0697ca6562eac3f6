"""Whatever a guest does to the devices of a PC, in any order: they answer, and stay themselves."""

from fakes import ManualClock
from hypothesis import given, settings
from hypothesis import strategies as st

from vmexit.arch.x86 import layout
from vmexit.core.bus import Bus
from vmexit.devices.irqchip import PcIrqChip
from vmexit.machine.board import Board
from vmexit.machine.config import MachineConfig
from vmexit.machine.stop import Stop

MS = 1_000_000

# Where something is, and a little around it.
PORTS = [
    *range(0x20, 0x22), *range(0x40, 0x44), 0x60, 0x61, 0x64, 0x70, 0x71, 0x92, 0xA0, 0xA1,
    *range(0x3F8, 0x400), 0x4D0, 0x4D1, *range(0x600, 0x60C), *range(0xCF8, 0xCFC), 0xF4, 0x1F,
]  # fmt: skip
LAPIC = [layout.LAPIC_ADDRESS + 0x10 * n for n in range(0x40)]
IOAPIC = [layout.IOAPIC_ADDRESS, layout.IOAPIC_ADDRESS + 0x10]


class Pc:
    """All devices, on a clock that is advanced by hand."""

    def __init__(self, cpus: int = 2) -> None:
        self.clock = ManualClock()
        self.pio, self.mmio = Bus("port"), Bus("MMIO")
        self.stops: list[Stop] = []
        self.current = 0
        config = MachineConfig(machine="microvm", smp=cpus, serial="null")
        self.chip = PcIrqChip(cpus, self.clock, 25_000_000, lambda: None)
        request, nothing = _Request(self.stops), lambda *_: None
        board = Board(config, self.pio, self.mmio, request, self.clock, nothing, nothing)
        board.attach_common(self.chip)
        board.attach_irqchip(self.chip, lambda: self.current)
        board.attach_pc(self.chip)
        self.devices = board.devices
        self.devices["cmos"]._wall = lambda: 1_800_000_000 + self.clock.now() / 1_000_000_000

    def do(self, action: tuple[str, int, int, int]) -> None:
        """One access, passing of time, or acknowledgement by a vCPU."""
        what, where, size, value = action
        bus = self.mmio if what.startswith("mmio") else self.pio
        if what.endswith("write"):
            bus.write(where, size, value & (1 << 8 * size) - 1)
        elif what.endswith("read"):
            assert 0 <= bus.read(where, size) < 1 << 8 * size
        elif what == "time":
            self.clock.advance(value % (20 * MS))
        elif what == "late":
            self.clock.sleep(value)
        else:
            self.current = where
            vcpu = self.chip.vcpus[where]
            if vcpu.pending():
                assert 0 <= vcpu.acknowledge() <= 0xFF
            vcpu.take_nmi()
            vcpu.take_startup()

    def state(self) -> dict[str, object]:
        return {name: device.state() for name, device in self.devices.items()}


class _Request:
    def __init__(self, stops: list[Stop]) -> None:
        self._stops = stops

    def __call__(self, stop: Stop) -> bool:
        self._stops.append(stop)
        return True

    def pending(self) -> bool:
        return False

    def leave(self) -> None:
        return


values = st.one_of(
    st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFF), st.sampled_from([0x36, 0x1FF])
)
ports = st.one_of(st.sampled_from(PORTS), st.integers(0, 0xFFFF))
actions = st.one_of(
    st.tuples(st.sampled_from(["write", "read"]), ports, st.sampled_from([1, 2, 4]), values),
    st.tuples(
        st.sampled_from(["mmio-write", "mmio-read"]),
        st.one_of(
            st.sampled_from(LAPIC + IOAPIC),
            st.integers(layout.LAPIC_ADDRESS, layout.LAPIC_ADDRESS + 0xFF8),
        ),
        st.sampled_from([1, 2, 4, 8]),
        values,
    ),
    st.tuples(st.just("time"), st.just(0), st.just(1), values),
    st.tuples(st.just("late"), st.just(0), st.just(1), st.integers(0, 1 << 50)),
    st.tuples(st.just("vcpu"), st.integers(0, 1), st.just(1), st.just(0)),
)


@given(st.lists(actions, max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_accesses_in_any_order(some):
    pc = Pc()
    for action in some:
        pc.do(action)
    # No device asks for more of the host's time than a call each 100 µs, and they are seven.
    before = pc.clock.calls
    pc.clock.advance(10 * MS)
    assert pc.clock.calls - before < 7 * 110
    assert len(pc.clock.armed) < 10


@given(st.lists(actions, max_size=40), st.lists(actions, max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_machine_restored_at_any_moment_goes_on_identically(before, after):
    pc, copy = Pc(), Pc()
    for action in before:
        pc.do(action)
    # The clock of the copy is another one; what a device tells of time is what has passed.
    copy.clock.time = pc.clock.time
    copy.current = pc.current
    for name, device in copy.devices.items():
        device.restore(pc.devices[name].state())
    assert copy.state() == pc.state()
    for action in after:
        pc.do(action)
        copy.do(action)
        assert copy.state() == pc.state()


def test_a_device_reset_after_anything_is_as_it_was_at_first():
    pc, fresh = Pc(), Pc()
    for port in PORTS:
        for value in (0xFF, 0x5A, 0x36):
            pc.do(("write", port, 1, value))
    for address in LAPIC + IOAPIC:
        pc.do(("mmio-write", address, 4, 0x1_00FF))
    for device in pc.devices.values():
        device.reset()
    states, expected = pc.state(), fresh.state()
    for name in states.keys() - {"cmos"}:  # which has a battery
        assert states[name] == expected[name], name
