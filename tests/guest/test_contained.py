"""What a guest does to itself ends with an exact verdict at once, or can be ended."""

import os
import random
import signal
import threading
import time

import pytest

from vmexit import Machine, StopReason, VmexitError

pytestmark = pytest.mark.engine

MODES = ("real", "protected", "long")


@pytest.fixture
def microvm(nothing_left):
    """A machine that runs `code` at 0x1000."""
    made = []

    def make(code: str, mode: str = "long", **more) -> Machine:
        machine = Machine("4M", "soft", machine="microvm", **more)
        made.append(machine)
        machine.load_bytes(bytes.fromhex(code), mode=mode)
        return machine

    yield make
    for machine in made:
        machine.close()


def end_within(machine: Machine, seconds: float) -> None:
    """The guest runs for ever, is interruptible, and goes on afterwards."""
    assert machine.run(timeout=0.2).reason is StopReason.TIMEOUT
    threading.Timer(0.2, machine.stop).start()
    began = time.monotonic()
    assert machine.run(timeout=60).reason is StopReason.STOPPED
    assert time.monotonic() - began < 0.2 + seconds


@pytest.mark.parametrize("mode", MODES)
def test_cli_hlt_ends_at_once(microvm, mode):
    stop = microvm("fa f4 ebfc", mode).run(timeout=60)
    assert stop.reason is StopReason.HALT
    assert "interrupts off" in stop.detail
    assert stop.status == 0


def test_cli_hlt_on_every_processor_ends_at_once(microvm):
    # The second vCPU is never started, so there is nothing to wait for.
    assert microvm("fa f4", smp=2).run(timeout=60).reason is StopReason.HALT


@pytest.mark.parametrize("mode", MODES)
def test_sti_hlt_waits_without_using_the_host(microvm, mode):
    machine = microvm("fb f4 ebfd", mode)
    before = time.process_time()
    assert machine.run(timeout=1).reason is StopReason.TIMEOUT
    assert time.process_time() - before < 0.3
    end_within(machine, 5)


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_an_exception_with_no_idt_is_a_triple_fault_that_names_it(microvm, mode):
    stop = microvm("0f0b", mode).run(timeout=60)
    assert stop.reason is StopReason.SHUTDOWN
    assert "#UD, #GP" in stop.detail and "#DF at rip 0x1000: `ud2`" in stop.detail
    assert stop.status == 3


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        ("protected", "b8000000f0 ffe0"),  # mov eax, 0xf0000000; jmp eax
        ("long", "b8000000f0 ffe0"),
        ("real", "b800f0 50 31c0 50 cb"),  # push 0xf000; push 0; retf: RAM full of zeros, for ever
    ],
)
def test_a_jump_to_where_nothing_is_is_contained(microvm, mode, code):
    stop = microvm(code, mode).run(timeout=0.5)
    assert stop.reason in (StopReason.INTERNAL_ERROR, StopReason.SHUTDOWN, StopReason.TIMEOUT)
    assert stop.reason is StopReason.TIMEOUT or stop.crashed


def idt(gate: bytes, count: int = 32) -> bytes:
    return gate * count


def test_an_endless_chain_of_exceptions_can_be_ended(microvm):
    # Every gate leads to an address beyond the page tables, on a stack of its own (IST 1): a page
    # fault again and again, without one instruction of a handler.
    machine = microvm(
        "0f011c2500200000"  # lidt [0x2000]
        "0f01142510200000"  # lgdt [0x2010]
        "66b82800 0f00d8"  # mov ax, 0x28; ltr ax
        "0f0b"
    )
    nowhere = 0x0000_7000_0000_0000
    gate = (
        (nowhere & 0xFFFF).to_bytes(2, "little") + b"\x18\x00\x01\x8e"
        + (nowhere >> 16 & 0xFFFF).to_bytes(2, "little")
        + (nowhere >> 32).to_bytes(4, "little") + bytes(4)
    )  # fmt: skip
    memory = machine.memory
    memory.write(0x2000, (32 * 16 - 1).to_bytes(2, "little") + (0x3000).to_bytes(8, "little"))
    memory.write(0x2010, (0x37).to_bytes(2, "little") + (0x2100).to_bytes(8, "little"))
    code, data = 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
    tss = 0x67 | 0x2200 << 16 | 0x89 << 40
    for at, value in ((0x2110, data), (0x2118, code), (0x2128, tss), (0x2130, 0)):
        memory.write(at, value.to_bytes(8, "little"))
    memory.write(0x2200 + 36, (0x8000).to_bytes(8, "little"))  # IST 1
    memory.write(0x3000, gate * 32)
    end_within(machine, 5)


@pytest.mark.parametrize(
    ("what", "code"),
    [
        # Each enables its interrupt as often as the device can, with IF set and the default IDT:
        # there is none, so the first one that is delivered is a triple fault; with IF clear the
        # devices are all that works.
        ("PIT", "b034 e643 b001 e640 b000 e640 ebfe"),
        ("RTC", "b00b e670 b042 e671 b00a e670 b023 e671 ebfe"),
        (
            "LAPIC timer, periodic",
            "bb0000e0fe c783f0000000ff010000 c783e00300000b000000"
            "c7832003000030000200 c7838003000001000000 ebfe",
        ),
        (
            "IPIs to itself",
            "bb0000e0fe c783f0000000ff010000 c7830003000040000400 ebf4",
        ),
    ],
)
def test_a_storm_of_interrupts_can_be_ended(microvm, what, code):
    end_within(microvm(code), 5)


def test_random_port_writes_do_not_hurt_the_host(microvm):
    # A linear congruential generator picks port and value: PICs, PIT, RTC, i8042, UART, ACPI, …
    machine = microvm(
        "bf78563412"  # mov edi, seed
        "69ff0d661900"  # loop: imul edi, edi, 1664525
        "81c75ff36e3c"  # add edi, 1013904223
        "89fa c1ea14"  # mov edx, edi; shr edx, 20
        "89f8 c1e808"  # mov eax, edi; shr eax, 8
        "80fa f4 74e5"  # skip the debug-exit port
        "ee"  # out dx, al
        "ec"  # in al, dx
        "ebe1",
        debug_exit=None,
    )
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        stop = machine.run(timeout=0.1)
        assert stop.reason in (StopReason.TIMEOUT, StopReason.RESET, StopReason.POWEROFF)
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 3  # the event loop's


def test_a_triple_fault_of_another_processor_names_it(microvm):
    machine = microvm(
        "bb0000e0fe c7831003000000000001"  # mov ebx, LAPIC; ICR: for APIC 1
        "c7830003000000450000 c7830003000008460000 ebfe",  # INIT; SIPI to 0x8000; jmp .
        smp=2,
    )
    machine.memory.write(0x8000, bytes.fromhex("2e0f011e1000 0f0b"))  # lidt cs:[0x10]; ud2
    machine.memory.write(0x8010, bytes(6))  # an IVT of one byte
    stop = machine.run(timeout=60)
    assert (stop.reason, stop.vcpu) == (StopReason.SHUTDOWN, 1)
    assert "#UD, #GP" in stop.detail and "#DF at rip 0x6: `ud2`" in stop.detail


def test_processors_that_all_wait_for_each_other_have_halted(microvm):
    machine = microvm(
        "bb0000e0fe c7831003000000000001"
        "c7830003000000450000 c7830003000008460000"
        "b900000001 e2fe fa f4",  # a while later: cli; hlt
        smp=2,
    )
    machine.memory.write(0x8000, bytes.fromhex("fa f4 ebfd"))
    stop = machine.run(timeout=60)
    assert stop.reason is StopReason.HALT and "interrupts off" in stop.detail


def test_an_ins_that_overwrites_itself_ends_with_the_fault_that_follows(microvm):
    """With the scratch register of the serial port, 6: `06` has no meaning in 64-bit mode."""
    stop = microvm(
        "b006 66baff03 ee"  # mov al, 6; mov dx, 0x3ff; out dx, al
        "488d3d0a000000 66baff03 b964000000 fc 90 f36c f4",  # rdi: the INS itself; rep insb; hlt
        serial="null",
    ).run(timeout=30)
    assert stop.reason is StopReason.SHUTDOWN
    assert stop.detail.startswith("triple fault: #UD")


def test_exceptions_whose_stack_is_where_nothing_answers_can_be_ended(microvm):
    code = (
        "488d052d000000 bb60600000 668903 66c743021800 66c74304008e 4889c1 48c1e910 66894b06"
        "c7430800000000"  # a gate for #UD at 0x6060
        "0f011d07000000 bc000000d0 0f0b ff0f 0060000000000000"  # l: esp in the hole; ud2
    )
    end_within(microvm(code), 5)


def test_a_locked_instruction_on_a_register_that_changes_can_be_ended(microvm):
    """LOCK NEG of the LAPIC timer's count: the engine tries until two reads agree."""
    code = (
        "48bb0000e0fe00000000 c783f0000000ff010000 c783e00300000b000000"
        "c7832003000020000300 c78380030000ffffffff f0f79b90030000 ebf7"
    )
    machine = microvm(code, serial="null")
    assert machine.run(timeout=1).reason is StopReason.TIMEOUT
    assert machine.run(timeout=1).reason is StopReason.TIMEOUT


def test_a_callback_may_not_look_at_another_vcpu(microvm):
    """It would swap the state of the one that makes the access."""
    machine = microvm("b812340000 e610 ebfc", smp=2)
    machine.on_pio(0x10, write=lambda access: machine.vcpus[1].regs.rip)
    with pytest.raises(VmexitError, match="vCPU 0 has its turn"):
        machine.run(timeout=30)
    assert machine.vcpus[0].regs.rax == 0x3412
    assert machine.vcpus[1].regs.rip == 0xFFF0


def test_a_second_triple_fault_does_not_tell_of_the_first(microvm):
    machine = microvm("0f0b")
    first = machine.run(timeout=30)
    machine.vcpus[0].regs.rip = 0x1000
    assert machine.run(timeout=30).detail == first.detail


def test_a_signals_handler_may_stop_the_machine_at_any_moment(microvm):
    machine = microvm("ebfe")
    before = signal.signal(signal.SIGALRM, lambda *_: machine.stop())
    try:
        for _ in range(1500):
            signal.setitimer(signal.ITIMER_REAL, 0.002 + random.random() * 0.0004)
            machine.run(timeout=0.002)  # both come at about the same time
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
