"""Port I/O of the software CPU: to the devices, strings read ahead, exact ends of a run."""

from collections.abc import Callable

from vmexit.accel.soft.cpu_state import CpuState
from vmexit.accel.soft.layout import EFLAGS, EIP, HF_CPL, HF_INHIBIT_IRQ, HFLAGS, SEGMENT
from vmexit.accel.soft.ports import PortAccess, bitmap_allows, decode_port_access
from vmexit.accel.soft.replay import Replay
from vmexit.accel.soft.stubs import LEAVE_BLOCK, StopWords
from vmexit.arch.x86.code import MAX_INSTRUCTION, code_bits, linear_ip, read_linear
from vmexit.arch.x86.registers import RFLAGS_DF, RFLAGS_VM
from vmexit.core.bus import Bus, Read, Write
from vmexit.core.memory import PAGE_SIZE, GuestMemory
from vmexit.core.trace import ExitObserver

# KVM reads ahead for INS in pieces of at most so many bytes (arch/x86/kvm, read-ahead buffer);
# vmexit does the same, so that both accelerators show a device the same accesses.
MAX_AHEAD = 1024

_MAX_PLAIN = _MAX_ROUTES = 4096

_GENERAL_PROTECTION = 13

_CS_BASE = (SEGMENT["cs"] + 8) // 8  # as a 64-bit word


class PortIo:
    """The ports of one engine. `on_out` and `on_in` are hooks: they let no exception out."""

    def __init__(
        self,
        state: CpuState,
        memory: GuestMemory,
        bus: Bus,
        words: memoryview,
        replay: Replay,
        fail: Callable[[BaseException], None],
        throw: Callable[[int], None],
        withhold: Callable[[], None],
    ) -> None:
        """`fail` takes what a device raises; `throw` makes the guest have an exception instead.

        `withhold` is called when an INS has read ahead: no interrupt may come before the rest.
        """
        self._state = state
        self._memory = memory
        self._pio = bus
        self._words = words
        self._replay = replay
        self._fail = fail
        self._throw = throw
        self._withhold = withhold
        self._index = 0
        self._observer: ExitObserver | None = None
        # Port accesses seen before, by port and size: the device's function, and the offset for it.
        self._out_routes: dict[int, tuple[Write, int]] = {}
        self._in_routes: dict[int, tuple[Read, int]] = {}
        bus.on_change(self._forget_routes)
        # Linear addresses where an IN or OUT is known not to be a string one.
        self._plain: set[int] = set()
        self._ahead: list[int] = []  # what an INS has read but not consumed yet, last first
        self._ahead_of = (0, 0, 0)  # and which: RIP, port, size

    def serve(self, index: int, observer: ExitObserver | None) -> None:
        """The accesses to come are those of vCPU `index`."""
        self._index = index
        self._observer = observer
        self.forget_ahead()

    @property
    def in_string(self) -> bool:
        """Whether the next instruction is an INS that has yet to consume what it read ahead."""
        return bool(self._ahead) and self._ahead_of[0] == self._state.rip

    def begin(self) -> None:
        """A run begins: code may have changed."""
        self._plain.clear()

    def _forget_routes(self) -> None:
        self._out_routes.clear()
        self._in_routes.clear()

    def _is_simple(self) -> bool:
        """Whether there is nothing to a port access but to make it: ring 0 does it, seen before."""
        state = self._state
        return (
            not state.u32[HFLAGS // 4] & HF_CPL
            and not self._replay.repeating
            and not self._words[StopWords.KICK]
            and state.u64[EIP // 8] + state.u64[_CS_BASE] in self._plain
        )

    def on_out(self, _uc: int, port: int, size: int, value: int, _data: int) -> None:
        route = self._out_routes.get(port << 3 | size)
        if route is not None and self._is_simple():
            try:
                route[0](route[1], size, value)
            except BaseException as error:
                self._fail(error)
            if not self._words[StopWords.KICK]:
                return
        elif not self._out(port, size, value):
            return
        self._made("out", port, size, value)

    def _out(self, port: int, size: int, value: int) -> bool:
        """Make an OUT, observed or for the first time; False if it was not made now."""
        try:
            if self._replay.repeating and self._replay.answer("out", port, size) is not None:
                return False
            if self._refused(port, size):
                return False
            if self._observer is not None:
                self._observed_write(self._observer, port, size, value)
                return True
            if len(self._out_routes) < _MAX_ROUTES:
                self._out_routes[port << 3 | size] = self._pio.route_write(port, size)
            self._pio.write(port, size, value)
        except BaseException as error:
            self._fail(error)
        return True

    def on_in(self, _uc: int, port: int, size: int, _data: int) -> int:
        route = self._in_routes.get(port << 3 | size)
        if route is not None and not self._ahead and self._is_simple():
            try:
                value = route[0](route[1], size)
            except BaseException as error:
                self._fail(error)
                value = (1 << 8 * size) - 1
            if self._words[StopWords.KICK]:
                self._made("in", port, size, value)
            return value
        return self._in(port, size)

    def _in(self, port: int, size: int) -> int:
        """Make an IN, observed, in a string, or for the first time."""
        try:
            if self._replay.repeating:
                answer = self._replay.answer("in", port, size)
                if answer is not None:
                    return answer
            if self._refused(port, size):
                return 0
            rip = self._state.rip
            if self._ahead:
                value = self._take_ahead(rip, port, size)
            elif self._is_plain():
                value = self._read_port(port, size)
            else:
                value = self._first_in(rip, port, size)
        except BaseException as error:
            self._fail(error)
            value = (1 << 8 * size) - 1
        self._made("in", port, size, value)
        return value

    def _made(self, kind: str, port: int, size: int, value: int) -> None:
        """A port access was made, and perhaps it was the last one of the run."""
        rip = self._state.rip
        kicked = self._words[StopWords.KICK] and not self._replay.repeating
        if self._is_plain() and not kicked:
            return
        access = self._port_access()
        if access is None or not access.string:
            self._note_plain()
            if kicked and access is not None:
                self._leave(access, value if kind == "in" else None, size)
        elif access.repeated:
            # The next element begins a block; but the memory side may be MMIO, and leave this one.
            self._replay.note(rip, kind, port, size, value)
        else:
            self._replay.made(rip, kind, port, size, value)

    def _is_plain(self) -> bool:
        return self._state.u64[EIP // 8] + self._state.u64[_CS_BASE] in self._plain

    def _note_plain(self) -> None:
        """This is no string access: no need to look at it again in this run."""
        if len(self._plain) >= _MAX_PLAIN:
            self._plain.clear()
        self._plain.add(self._state.u64[EIP // 8] + self._state.u64[_CS_BASE])

    def _refused(self, port: int, size: int) -> bool:
        """Whether the code may not use the port: the engine leaves that check to us.

        Then the block is left at once, before the instruction, with #GP to deliver.
        """
        state = self._state
        flags = state.u32[EFLAGS // 4]
        level = 3 if flags & RFLAGS_VM else state.u32[HFLAGS // 4] & HF_CPL
        if not level or (level <= flags >> 12 & 3 and not flags & RFLAGS_VM):
            return False
        if bitmap_allows(self._memory, self._state.read_system(), port, size):
            return False
        self._throw(_GENERAL_PROTECTION)
        return True

    def _read_port(self, port: int, size: int) -> int:
        if self._observer is not None:
            return int.from_bytes(self._observed_read(self._observer, port, size, 1), "little")
        value = self._pio.read(port, size)
        if len(self._in_routes) < _MAX_ROUTES:
            self._in_routes[port << 3 | size] = self._pio.route_read(port, size)
        return value

    def _observed_read(self, observer: ExitObserver, port: int, size: int, count: int) -> bytes:
        observer.left(self._index)
        data = self._pio.read_string(port, size, count)
        observer.io(self._index, False, port, size, count, data)
        observer.enters(self._index)
        return data

    def _observed_write(self, observer: ExitObserver, port: int, size: int, value: int) -> None:
        observer.left(self._index)
        observer.io(self._index, True, port, size, 1, value.to_bytes(4, "little")[:size])
        self._pio.write(port, size, value)
        observer.enters(self._index)

    def _take_ahead(self, rip: int, port: int, size: int) -> int:
        if (rip, port, size) == self._ahead_of:
            return self._ahead.pop()
        # The INS was left in the middle, by a fault: what it had read is lost, as on KVM.
        self.forget_ahead()
        return self._first_in(rip, port, size)

    def _first_in(self, rip: int, port: int, size: int) -> int:
        """An IN not seen before: the start of a REP INS reads ahead, as KVM does."""
        access = self._port_access()
        if access is None or not access.string:
            self._note_plain()
            return self._read_port(port, size)
        if not access.repeated:
            return self._read_port(port, size)
        mask = (1 << access.address_bits) - 1
        registers = self._state.read_general()
        in_page = registers["rdi"] % PAGE_SIZE
        if not registers["rflags"] & RFLAGS_DF:
            in_page = PAGE_SIZE - in_page
        count = max(1, min(in_page // size, MAX_AHEAD // size, registers["rcx"] & mask))
        if self._observer is None:
            data = self._pio.read_string(port, size, count)
        else:
            data = self._observed_read(self._observer, port, size, count)
        values = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
        self._ahead = values[:0:-1]
        self._ahead_of = (rip, port, size)
        if self._ahead:
            self._withhold()
        return values[0]

    def _port_access(self) -> PortAccess | None:
        registers, system = self._state.read_general(), self._state.read_system()
        code = read_linear(self._memory, system, linear_ip(registers, system), MAX_INSTRUCTION)
        return decode_port_access(code, code_bits(registers, system))

    def _leave(self, access: PortAccess, value: int | None, size: int) -> None:
        """Finish the port access under way (`value` is what an IN read), and stop behind it."""
        state = self._state
        state.rip += access.length
        state.u32[HFLAGS // 4] &= ~HF_INHIBIT_IRQ & 0xFFFF_FFFF
        if value is not None:
            keep = 0 if size == 4 else state.u64[0] >> 8 * size << 8 * size
            state.u64[0] = keep | value
        self._words[StopWords.LEAVE] = LEAVE_BLOCK

    def forget_ahead(self) -> None:
        """The vCPU goes on elsewhere: what a REP INS has read for later is lost, as on KVM."""
        self._ahead.clear()
