"""The monitor for people: its commands, numbers, memory and page tables as text."""

import random
import struct

import pytest

from vmexit import Machine, RunState, VmexitError
from vmexit.arch.x86.paging import translate
from vmexit.arch.x86.registers import CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA
from vmexit.control.expression import evaluate
from vmexit.control.memory_view import Format
from vmexit.control.monitor import execute
from vmexit.control.page_view import show_mappings
from vmexit.core.memory import GuestMemory

CODE = bytes.fromhex("66ff060030 ebf9")  # inc dword [0x3000]; jmp 0
DATA = bytes(range(0x41, 0x51)) + b"\x00\xff\xfe\x80" + (-2).to_bytes(8, "little", signed=True)


@pytest.fixture
def vm(accel):
    with Machine("1M", accel, serial="null") as vm:
        vm.load_bytes(CODE, at=0x1000)
        vm.memory.write(0x5000, DATA)
        vm.vcpus[0].regs.update(rax=0x5000, rbx=3)
        yield vm


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("0x1F", 31),
        ("010", 10),
        ("$rax", 0x5000),
        ("$rax+8", 0x5008),
        (" $rax - $rbx + 1 ", 0x4FFE),
        ("-1", (1 << 64) - 1),
        ("1 - -1", 2),
        ("$pc", 0),
        ("$cs", 0x100),
    ],
)
def test_numbers(vm, text, value):
    assert evaluate(vm, text) == value


@pytest.mark.parametrize(
    "text",
    ["", "+", "1 +", "1 2", "$", "$foo", "$gdt", "0x", "x", "1*2", "(1)", "--", "é", "1" * 300,
     "0x" + "1" * 17, "$rax$rbx"],
)  # fmt: skip
def test_what_is_no_number(vm, text):
    with pytest.raises(VmexitError):
        evaluate(vm, text)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("xp 0x5000", "0000000000005000: 0x44434241"),
        ("xp/2xb 0x5000", "0000000000005000: 0x41 0x42"),
        ("xp/bx 0x5000", "0000000000005000: 0x41"),
        ("xp/2hx 0x5000", "0000000000005000: 0x4241 0x4443"),
        ("xp/1xg 0x5000", "0000000000005000: 0x4847464544434241"),
        ("xp/2db 0x5011", "0000000000005011: -1 -2"),
        ("xp/2ub 0x5011", "0000000000005011: 255 254"),
        ("xp/1ob 0x5000", "0000000000005000: 0101"),
        ("xp/3c 0x5000", "0000000000005000: 'A' 'B' 'C'"),
        ("xp/2c 0x5010", "0000000000005010: '\\x00' '\\xff'"),
        ("xp/1dg 0x5014", "0000000000005014: -2"),
        ("x/1xb $rax + 1", "0000000000005001: 0x42"),
        (
            "xp/5xw 0xffff8",
            "00000000000ffff8: 0x00000000 0x00000000\n0000000000100000: no memory is there",
        ),
        ("xp/1xw 0xffffffffffffffff", "ffffffffffffffff: no memory is there"),
        ("gva2gpa 0x5000", "gpa: 0x5000"),
        ("print $rax + 1", "0x5001"),
        ("info version", "vmexit 0.1.0"),
        ("info status", "VM status: paused (prelaunch)"),
        ("info mem", "paging is off"),
        ("info memory", "0000000000000000-0000000000100000 RAM"),
        ("info chardev", "serial0: null"),
        ("info block", ""),
        ("", ""),
    ],
)
def test_commands(vm, line, text):
    assert execute(vm, line) == text


def test_what_is_shown_in_several_lines(vm):
    lines = execute(vm, "xp/20xb 0x5000").splitlines()
    assert [line[:18] for line in lines] == [f"{0x5000 + 8 * n:016x}: " for n in range(3)]
    code = execute(vm, "xp/2i 0x1000").splitlines()
    assert "66 ff 06 00 30" in code[0] and "inc" in code[0] and "jmp" in code[1]
    assert "rax=0000000000005000" in execute(vm, "info registers")
    assert execute(vm, "info registers -a").startswith("CPU#0\n")
    assert "pc=0x0000000000000000" in execute(vm, "info cpus")
    assert execute(vm, "gpa2hva 0x1000").endswith(f"{vm.memory.hva(0x1000):#x}")
    told = execute(vm, "help")
    for name in ("x/FMT", "info mem", "system_reset", "quit"):
        assert name in told
    assert "info block" in execute(vm, "info") and "x/FMT" not in execute(vm, "info")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("foo", "unknown command: 'foo'"),
        ("info foo", "unknown command: 'info foo'"),
        ("info regs", "did you mean info registers"),
        ("help foo", "unknown command"),
        ("x", "too few"),
        ("x/9s 0", "is no format"),
        ("x/5000xb 0", "cannot be shown"),
        ("x/0xb 0", "cannot be shown"),
        ("xp/1xb $foo", "no register"),
        ("info balloon", "no memory balloon"),
        ("balloon 64", "no memory balloon"),
        ("balloon", "takes a size"),
        ("memsave 0 1", "too few"),
        ("pmemsave 0 1 /nowhere/x", "Could not open"),
        ("pmemsave 0x100000 1 /dev/null", "Invalid addr"),
        ("gpa2hva 0x100000", "100000"),
        ("cont", "no run"),
        ("nmi", "no interrupts"),
        ("system_powerdown", "no power button"),
        ("x" * 5000, "too long"),
    ],
)
def test_what_cannot_be(vm, line, why):
    with pytest.raises(VmexitError, match=why):
        execute(vm, line)
    with pytest.raises(VmexitError, match="CPU number"):
        execute(vm, "info registers", 1)


def test_a_machine_that_runs(vm, tmp_path):
    vm.start(60)
    assert execute(vm, "info status") == "VM status: running"
    assert "rip=" in execute(vm, "info registers")
    assert execute(vm, f"memsave 0x1000 {len(CODE)} {tmp_path / 'a b'}") == ""
    assert (tmp_path / "a b").read_bytes() == CODE
    execute(vm, "stop")
    assert vm.state is RunState.PAUSED
    assert execute(vm, "info status") == "VM status: paused"
    execute(vm, "system_reset")
    assert vm.memory.read_u32(0x3000) == 0
    execute(vm, "cont")
    assert vm.state is RunState.RUNNING
    execute(vm, "quit")
    assert vm.wait(60).status == 0


def test_formats():
    assert Format.parse("") == Format(1, "x", 4)
    assert Format.parse("10i") == Format(10, "i", 4)
    assert Format.parse("3c").size == 1
    assert Format.parse("4gx") == Format.parse("4xg") == Format(4, "x", 8)


# Page tables.

PAGES = 64
MODES = {
    "32-bit": (CR0_PE | CR0_PG, 0, 0),
    "32-bit, large pages": (CR0_PE | CR0_PG, CR4_PSE, 0),
    "PAE": (CR0_PE | CR0_PG, CR4_PAE, 0),
    "4 levels": (CR0_PE | CR0_PG, CR4_PAE, EFER_LMA),
    "5 levels": (CR0_PE | CR0_PG, CR4_PAE | CR4_LA57, EFER_LMA),
}


def system(mode, **more):
    cr0, cr4, efer = MODES[mode]
    with Machine("1M", "soft") as vm:
        return vm.vcpus[0].regs.system()._replace(cr0=cr0, cr4=cr4, efer=efer, **more)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_ranges_are_what_translation_says(mode, seed):
    """Tables of random entries that lead to each other, or nowhere."""
    dice = random.Random(seed)
    size = 4 if mode.startswith("32") else 8
    memory = GuestMemory([(0, PAGES * 4096)])
    for page in range(PAGES):
        for _ in range(3):
            entry = dice.choice((0, 1, 3, 5, 7, 7, 0x83, 0x87)) | dice.randrange(PAGES) << 12
            at = page * 4096 + dice.randrange(4 if seed % 2 else 4096 // size) * size
            memory.write(at, entry.to_bytes(size, "little"))
    registers = system(mode, cr3=dice.randrange(PAGES) << 12)
    found = show_mappings(memory, registers)
    ranges = []
    for line in found.splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        ranges.append(range(start, end))
        for gva in (start, end - 1, start + (end - start) // 2):
            assert translate(memory, registers, gva) is not None, line
    last = 0xFFFF_FFFF if size == 4 or mode == "PAE" else (1 << 64) - 1
    for one in ranges:
        for gva in (one.start - 1, one.stop):
            if 0 <= gva <= last and not any(gva in other for other in ranges):
                assert translate(memory, registers, gva) is None, hex(gva)
    memory.close()


def test_a_table_that_leads_to_itself_ends():
    memory = GuestMemory([(0, 4096)])
    memory.write(0, struct.pack("<512Q", *[7] * 512))
    assert "more than can be shown" in show_mappings(memory, system("4 levels", cr3=0))
    memory.close()


def test_long_mode_is_mapped_to_itself(accel):
    with Machine("8M", accel) as vm:
        vm.load_bytes(b"\xf4", at=0x1000, mode="long")
        told = execute(vm, "info mem")
        assert told == "0000000000000000-0000000100000000 0000000100000000 -rw"
