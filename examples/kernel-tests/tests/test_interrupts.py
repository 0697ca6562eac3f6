"""Exceptions, the timer, the UART's interrupt."""

import pytest

TIMER, SERIAL = 32, 36
# Halts until there were five ticks, with numbers in registers that C may change; returns their sum.
#   push rbx; push r12; mov rbx, TICKS; mov r12, [rbx]; add r12, 5;
#   mov rcx, 0x1000; mov rdi, 0x100; mov r9, 0x10; mov r11, 1;
#   again: hlt; cmp [rbx], r12; jb again; lea rax, [rcx+rdi]; add rax, r9; add rax, r11;
#   pop r12; pop rbx; ret
WAIT = """53 4154 48bb {0} 4c8b23 4983c405
    48c7c100100000 48c7c700010000 49c7c110000000 49c7c301000000
    f4 4c3923 72fa 488d0439 4c01c8 4c01d8 415c 5b c3"""


def test_registers_are_what_they_were_after_an_interrupt(kernel):
    ticks = kernel.variable("ticks")
    at = kernel.address("ticks").to_bytes(8, "little").hex()
    code = kernel.put(bytes.fromhex(WAIT.format(at)))
    assert kernel.call(code) == 0x1111
    assert kernel.variable("ticks") >= ticks + 5


def test_each_tick_is_one_interrupt_of_the_timer(kernel):
    assert kernel.shell("sleep 3") == "slept\n"
    assert kernel.variable("ticks") == kernel.variable("interrupt_counts", TIMER) >= 3


def test_what_is_typed_comes_by_interrupts(kernel):
    before = kernel.variable("interrupt_counts", SERIAL)
    kernel.shell("echo x")
    assert kernel.variable("interrupt_counts", SERIAL) > before
    assert kernel.variable("serial_lost") == 0


def test_what_nobody_reads_is_counted_as_lost(kernel):
    """A ring has 64 bytes, and while this waits nobody takes any out."""
    at = kernel.address("ticks").to_bytes(8, "little").hex()
    code = kernel.put(bytes.fromhex(WAIT.format(at)))
    kernel.vm.console.send(100 * "x")
    for _ in range(20):
        kernel.call(code)
        if kernel.variable("serial_lost") == 36:
            break
    assert kernel.call_int("ring_count", kernel.address("serial_typed")) == 64
    assert kernel.variable("serial_lost") == 36


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("31c9 31d2 f7f1", "exception 0, error 0,"),  # xor ecx, ecx; xor edx, edx; div ecx
        ("0f0b", "exception 6, error 0,"),  # ud2
        ("b800010000 8ed8", "exception 13, error 100,"),  # mov eax, 0x100; mov ds, eax
    ],
    ids=["divide", "invalid", "protection"],
)
def test_an_exception_is_a_panic_that_names_it_and_where(kernel, code, said):
    at = kernel.put(bytes.fromhex(code))
    text = kernel.panic(at)
    assert text.startswith(said)
    assert at <= int(text.rpartition("rip ")[2], 16) < at + 8
