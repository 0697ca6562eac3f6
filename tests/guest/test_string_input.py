"""REP INS reads ahead; what the device has given reaches the guest, whatever comes in between."""

import itertools
import struct
import time

import pytest

from vmexit import Machine, StopReason

pytestmark = pytest.mark.engine

PORT, DONE = 0x10, 0x11
BUFFER, COUNT = 0x20000, 512
TIMER_VECTOR = 0x40
LAPIC = 0xFEE0_0000
STOP_AT = 10


def store(address: int, value: int) -> bytes:
    """`mov dword [address], value`, in 32-bit code."""
    return b"\xc7\x05" + struct.pack("<II", address, value)


def gate(offset: int, selector: int) -> bytes:
    return struct.pack("<HHBBH", offset, selector, 0, 0x8E, 0)


START = bytes.fromhex("0f011d00400000 bc00800000 fc") + store(LAPIC + 0xF0, 0x1FF)  # lidt; esp; cld
TIMER = store(LAPIC + 0x3E0, 0xB) + store(LAPIC + 0x320, 0x2_0000 | TIMER_VECTOR)
TIMER += store(LAPIC + 0x380, 5000) + b"\xfb"  # periodic, 0.2 ms; sti
SECOND_CPU = store(LAPIC + 0x300, 0xC_4500) + store(LAPIC + 0x300, 0xC_4605)  # INIT, SIPI to 0x5000
# l: mov edi, 0x20000; mov ecx, 512; mov dx, 0x10; rep insb; out 0x11, al; jmp l
READ = bytes.fromhex("bf00000200 b900020000 66ba1000 f36c e611 ebea")
# push eax; in al, 0x61; EOI; pop eax; iret
HANDLER = bytes.fromhex("50 e461") + store(LAPIC + 0xB0, 0) + b"\x58\xcf"


@pytest.mark.parametrize(
    ("smp", "extra"),
    [
        pytest.param(1, b"", id="undisturbed"),
        pytest.param(1, TIMER, id="timer"),
        pytest.param(2, SECOND_CPU, id="second vCPU"),
    ],
)
def test_nothing_is_lost_or_doubled_by_interrupts_and_turns(smp, extra):
    """The handler reads a port, too, and the second vCPU takes its turns."""
    given, damaged, batches = 0, 0, 0

    def give(access) -> int:
        nonlocal given
        given += 1
        return given - 1 & 0xFF

    def done(access) -> None:
        nonlocal damaged, batches
        data = vm.memory.read(BUFFER, COUNT)
        damaged += any((a + 1) & 0xFF != b for a, b in itertools.pairwise(data))
        batches += 1
        if batches == 40:
            vm.stop()

    with Machine("1M", "soft", machine="microvm", mode="protected", smp=smp, serial="null") as vm:
        vm.load_bytes(START + extra + READ, at=0x1000)
        vm.load_bytes(HANDLER, at=0x2000)
        vm.memory.write(0x3000 + 8 * TIMER_VECTOR, gate(0x2000, 8))
        vm.memory.write(0x4000, struct.pack("<HI", 0x7FF, 0x3000))
        vm.load_bytes(b"\xeb\xfe", at=0x5000)
        vm.on_pio(PORT, read=give)
        vm.on_pio(DONE, write=done)
        assert vm.run(timeout=60).reason is StopReason.STOPPED
    assert damaged == 0
    assert given == batches * COUNT


def test_a_stop_while_reading_ahead_comes_although_the_rest_faults(accel):
    """`rep insd` reaches a page that is not there, and the handler never reads a port again."""
    given = 0

    def give(access) -> int:
        nonlocal given
        given += 1
        if given == STOP_AT:
            vm.stop()
        return 0

    # lidt [0x4000]; mov esp, 0x8000; mov rdi, 4 GiB - 64; mov ecx, 256; mov dx, 0x10; rep insd
    code = bytes.fromhex("0f011c2500400000 bc00800000 48bf c0ffffff00000000")
    code += bytes.fromhex("b900010000 66ba1000 f36d f4")
    with Machine("4M", accel, mode="long", serial="null") as vm:
        vm.load_bytes(code, at=0x1000)
        vm.load_bytes(b"\xeb\xfe", at=0x2000)
        vm.memory.write(0x3000 + 14 * 16, struct.pack("<HHBBHII", 0x2000, 0x18, 0, 0x8E, 0, 0, 0))
        vm.memory.write(0x4000, struct.pack("<HQ", 0xFFF, 0x3000))
        vm.on_pio(PORT, read=give, count=4)
        begin = time.monotonic()
        assert vm.run(timeout=30).reason is StopReason.STOPPED
        assert time.monotonic() - begin < 20  # not only when the time was over
        assert given >= STOP_AT
