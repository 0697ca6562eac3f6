"""The debug console, the debug-exit port and Python hooks: each access arrives once, as it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmexit.core.bus import Bus
from vmexit.devices.debug_exit import DebugExit
from vmexit.devices.debugcon import Debugcon
from vmexit.machine.hooks import Access, Hook

sizes = st.integers(1, 8)


@given(st.binary(max_size=64))
def test_the_debug_console_passes_on_each_byte_as_it_is(data) -> None:
    out = bytearray()
    bus = Bus("port")
    bus.attach(0x402, 1, Debugcon(out.extend))
    for byte in data:
        bus.write(0x402, 1, byte)
    bus.write_string(0x402, 1, data)
    assert out == data + data


def test_the_debug_console_answers_0xe9_by_which_firmware_finds_it() -> None:
    bus = Bus("port")
    bus.attach(0xE9, 1, Debugcon(lambda data: None))
    assert bus.read(0xE9, 1) == 0xE9


def test_a_wide_write_to_the_debug_console_sends_only_the_byte_that_is_at_its_port() -> None:
    out = bytearray()
    bus = Bus("port")
    bus.attach(0x402, 1, Debugcon(out.extend))
    bus.write(0x402, 2, 0x4241)
    bus.write(0x401, 2, 0x4443)
    assert out == b"AD"
    assert bus.unclaimed_writes == 2


@pytest.mark.parametrize(("size", "value"), [(1, 0x2A), (2, 0x1234), (4, 0xFFFF_FFFF)])
def test_the_debug_exit_port_gives_the_whole_value_once_whatever_the_width(size, value) -> None:
    values: list[int] = []
    bus = Bus("port")
    bus.attach(0xF4, 1, DebugExit(values.append), overhang=True)
    bus.write(0xF4, size, value)
    assert values == [value]
    assert bus.read(0xF4, size) == 0
    assert values == [value]  # reading ends nothing


@given(st.integers(0, 100), sizes, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_a_hook_is_told_address_size_and_value_and_answers_in_the_width_asked(
    offset, size, written, answer
) -> None:
    seen: list[Access] = []

    def on_read(access: Access) -> int:
        seen.append(access)
        return answer

    written &= (1 << 8 * size) - 1
    bus = Bus("MMIO")
    bus.attach(0xD000_0000, 0x1000, Hook(0xD000_0000, on_read, seen.append))
    bus.write(0xD000_0000 + offset, size, written)
    assert bus.read(0xD000_0000 + offset, size) == answer % (1 << 8 * size)
    assert seen == [
        Access(0xD000_0000 + offset, size, written, True),
        Access(0xD000_0000 + offset, size, 0, False),
    ]


@given(sizes, st.integers(max_value=-1))
def test_a_negative_answer_is_its_twos_complement(size, answer) -> None:
    hook = Hook(0, lambda access: answer, None)
    assert hook.read(0, size) == answer % (1 << 8 * size)


@given(sizes)
def test_without_functions_a_hook_reads_as_ones_and_ignores_writes(size) -> None:
    hook = Hook(0x10, None, None)
    hook.write(0, size, 0)
    assert hook.read(0, size) == int.from_bytes(b"\xff" * size, "little")


@pytest.mark.parametrize("kind", ["read", "write"])
def test_what_a_hook_raises_comes_out_of_the_access(kind) -> None:
    def fail(access: Access) -> int:
        raise LookupError(access.address)

    bus = Bus("port")
    bus.attach(0x10, 4, Hook(0x10, fail, fail))
    with pytest.raises(LookupError, match="17"):
        bus.read(0x11, 1) if kind == "read" else bus.write(0x11, 1, 0)


@pytest.mark.parametrize(
    "device",
    [Debugcon(print), DebugExit(print), Hook(0, None, None)],
    ids=lambda d: type(d).__name__,
)
def test_a_device_without_state_takes_its_own_state_back(device) -> None:
    state = device.state()
    assert state == {"version": 1}
    device.reset()
    device.restore(state)
    assert device.state() == state
