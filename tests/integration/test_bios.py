"""The BIOS of boot protocol 16: each service, called by INT as a guest does."""

import re
import shutil
import struct
import subprocess

import pytest
from command import ROOT

from vmexit import Access, Machine, StopReason
from vmexit.arch.x86.e820 import memory_map
from vmexit.arch.x86.layout import BIOS_STUB, ram_ranges
from vmexit.boot import real_mode
from vmexit.core.memory import GuestMemory

pytestmark = pytest.mark.usefixtures("nothing_left")

SOURCE = ROOT / "src/vmexit/boot/bios.S"
CARRY, ZERO = 0x01, 0x40
MEMORY = 32 << 20
# The guest's code: HLT where the BIOS jumps to, and INT n; HLT for each n.
CODE, CALLS = 0x2000, 0x3000


def ram():
    memory = GuestMemory(ram_ranges(MEMORY))
    try:
        return memory_map(memory.regions)
    finally:
        memory.close()


class Pc:
    """A machine whose BIOS has run up to what it boots, with a UART that is two byte strings."""

    def __init__(self, vm: Machine) -> None:
        self.vm = vm
        self.regs = vm.vcpus[0].regs
        self.printed = bytearray()
        self.typed = bytearray()
        self.can_send = 0x60
        self.uart: list[tuple[int, int]] = []
        vm.on_pio(0x3F8, count=8, read=self._read, write=self._write)
        vm.memory.write(BIOS_STUB, real_mode.bios((0, CODE >> 4), ram()))
        vm.memory.write(0x1000, b"\xea" + struct.pack("<HH", 0, BIOS_STUB >> 4))
        vm.memory.write_u8(CODE, 0xF4)
        vm.memory.write(CALLS, b"".join(bytes((0xCD, n, 0xF4, 0x90)) for n in range(256)))
        vm.memory.write_u16(0x413, 639)
        self.before = dict(rax=0x1111_2222, rbx=3, rcx=4, rdx=5, rsi=6, rdi=7, rbp=8, rsp=0x1F00)
        self.regs.update(**self.before)
        self.halt()

    def _read(self, access: Access) -> int:
        if access.address == 0x3FD:
            return self.can_send | bool(self.typed)
        return self.typed.pop(0) if access.address == 0x3F8 and self.typed else 0

    def _write(self, access: Access) -> None:
        if access.address == 0x3F8:
            self.printed.append(access.value)
        else:
            self.uart.append((access.address, access.value))

    def halt(self) -> None:
        assert self.vm.run(timeout=60).reason is StopReason.HALT

    def call(self, number: int, flags: int = 0, **registers: int) -> dict[str, int]:
        """What INT `number` returns, with the flags CF and ZF; what it must keep is as it was."""
        names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp")
        given = {name: registers.get("e" + name[1:], 0) for name in names}
        self.regs.update(rip=CALLS - CODE + 4 * number, rsp=0x1F00, rflags=2 | flags, **given)
        segments = [self.regs.ds, self.regs.es, self.regs.ss]
        self.halt()
        assert self.regs.rsp == 0x1F00
        assert [self.regs.ds, self.regs.es, self.regs.ss] == segments
        got = {"e" + name[1:]: getattr(self.regs, name) for name in names}
        assert [got[n] for n in ("esi", "edi", "ebp")] == [given[n] for n in ("rsi", "rdi", "rbp")]
        return got | {"flags": self.regs.rflags & (CARRY | ZERO)}

    def prints(self, number: int, **registers: int) -> bytes:
        """What INT `number` prints."""
        del self.printed[:]
        self.call(number, **registers)
        return bytes(self.printed)

    def cursor(self) -> tuple[int, int]:
        """Row and column."""
        return divmod(self.call(0x10, eax=0x0300)["edx"], 256)


@pytest.fixture
def pc(accel):
    with Machine(MEMORY, accel) as vm:
        yield Pc(vm)


def test_the_image_is_what_its_source_builds_to(tmp_path):
    commands = re.search(r"^# (as --32 .*)$", SOURCE.read_text(), re.MULTILINE)
    assert commands is not None
    shutil.copy(SOURCE, tmp_path)
    subprocess.run(["sh", "-ec", commands[1]], cwd=tmp_path, check=True, timeout=60)
    built = (tmp_path / "bios.bin").read_bytes()
    assert built == SOURCE.with_suffix(".bin").read_bytes(), f"build it again: {commands[1]}"


def test_power_on_sets_vectors_and_port_and_goes_on_with_the_registers_as_they_were(pc):
    assert {name: getattr(pc.regs, name) for name in pc.before} == pc.before
    assert (pc.regs.cs.base, pc.regs.rip, pc.regs.rflags & 1 << 9) == (CODE, 1, 0)
    vectors = list(struct.iter_unpack("<HH", pc.vm.memory.read(0, 0x400)))
    assert {segment for _, segment in vectors} == {BIOS_STUB >> 4}
    assert {pc.vm.memory.read_u8(BIOS_STUB + offset) for offset, _ in vectors[0x78:]} == {0xCF}
    assert pc.vm.memory.read_u16(0x400) == 0x3F8
    assert pc.uart == [(0x3F9, 0), (0x3FA, 1), (0x3FB, 3), (0x3FC, 3)]


@pytest.mark.parametrize("flags", [0, CARRY])
def test_other_interrupts_change_nothing(pc, flags):
    for number in (0x00, 0x05, 0x0D, 0x14, 0x1C, 0x21, 0x73):
        got = pc.call(number, flags, eax=0x1234_5678, ebx=9, ecx=8, edx=7)
        assert got == {
            "eax": 0x1234_5678, "ebx": 9, "ecx": 8, "edx": 7, "esi": 0, "edi": 0, "ebp": 0,
            "flags": flags,
        }  # fmt: skip


# INT 10h


def test_teletype_moves_the_cursor_as_a_screen_does(pc):
    def type_(text: bytes) -> bytes:
        return b"".join(pc.prints(0x10, eax=0x0E00 | byte) for byte in text)

    assert type_(b"Hi\a") == b"Hi\a" and pc.cursor() == (0, 2)
    assert type_(b"\b\b\b") == b"\b\b\b" and pc.cursor() == (0, 0)
    assert type_(b"x\r\n") == b"x\r\n" and pc.cursor() == (1, 0)
    assert type_(b"y" * 80) == b"y" * 80 + b"\r\n" and pc.cursor() == (2, 0)
    assert type_(b"\n" * 30) == b"\n" * 30 and pc.cursor() == (24, 0)
    assert type_(b"z" * 80) == b"z" * 80 + b"\r\n" and pc.cursor() == (24, 0)


def test_a_character_without_ascii_is_shown_as_one_like_it(pc):
    shown = b"".join(pc.prints(0x10, eax=0x0E00 | byte) for byte in b"\xda\xc4\xbf\xb3\x18\x9b\x1b")
    assert shown == b"+-+|^?<"


def test_the_terminal_is_told_where_the_cursor_goes_when_something_is_printed(pc):
    assert pc.prints(0x10, eax=0x0200, edx=0x0A05) == b""
    assert pc.cursor() == (10, 5)
    assert pc.prints(0x10, eax=0x0E41) == b"\x1b[11;06HA"
    assert pc.prints(0x10, eax=0x0E42) == b"B"
    pc.call(0x10, eax=0x0200, edx=0xFFFF)
    assert pc.cursor() == (24, 79)


def test_a_character_written_leaves_the_cursor_where_it_is(pc):
    assert pc.prints(0x10, eax=0x0941, ebx=7, ecx=1) == b"A" and pc.cursor() == (0, 0)
    pc.call(0x10, eax=0x0200, edx=1)  # GRUB moves it so: the terminal is there already
    assert pc.prints(0x10, eax=0x0A42, ecx=1) == b"B"
    assert pc.prints(0x10, eax=0x0E43) == b"\x1b[01;02HC"
    assert pc.prints(0x10, eax=0x092D, ecx=5) == b"-----"
    assert pc.prints(0x10, eax=0x0E44) == b"\x1b[01;03HD"
    assert pc.prints(0x10, eax=0x0941, ecx=0) == b""


def test_blanks_everywhere_clear_the_screen(pc):
    assert pc.prints(0x10, eax=0x0920, ecx=2000) == b"\x1b[2J"
    assert pc.prints(0x10, eax=0x0600, ecx=0, edx=0x184F) == b"\x1b[2J"
    assert pc.prints(0x10, eax=0x0601, ecx=0, edx=0x184F) == b""
    assert len(pc.prints(0x10, eax=0x092E, ecx=0xFFFF)) == len("\x1b[01;01H") + 2000


def test_a_string_is_written_with_or_without_attributes(pc):
    pc.vm.memory.write(0x4000, b"O\x07K\x07")
    assert pc.prints(0x10, eax=0x1303, ecx=2, edx=0x0102, ebp=0x4000) == b"\x1b[02;03HOK"
    assert pc.cursor() == (1, 4)
    assert pc.prints(0x10, eax=0x1300, ecx=1, edx=0x0104, ebp=0x4002) == b"K"
    assert pc.cursor() == (1, 4)
    assert pc.prints(0x10, eax=0x1301, ecx=0, edx=0x0104, ebp=0x4002) == b""


def test_the_mode_is_80_columns_and_there_is_no_vga_and_no_vesa(pc):
    got = pc.call(0x10, eax=0x0F00, ebx=0xFFFF)
    assert (got["eax"], got["ebx"]) == (0x5003, 0xFF)
    for eax in (0x1200, 0x1A00, 0x4F00):
        got = pc.call(0x10, eax=eax, ebx=0x10)
        assert (got["eax"], got["ebx"]) == (eax, 0x10)
    pc.call(0x10, eax=0x0100, ecx=0x2000)
    assert pc.call(0x10, eax=0x0300)["ecx"] == 0x2000


def test_a_port_that_never_gets_ready_does_not_hold_the_guest_up(pc):
    pc.can_send = 0
    assert pc.prints(0x10, eax=0x0E41) == b"A"


# INT 16h


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        (b"a", 0x0061), (b"~", 0x007E), (b"\x03", 0x0003), (b"\r", 0x1C0D), (b"\n", 0x1C0D),
        (b"\x08", 0x0E08), (b"\x7f", 0x0E08), (b"\t", 0x0F09),
        (b"\x1b[A", 0x4800), (b"\x1bOB", 0x5000), (b"\x1b[C", 0x4D00), (b"\x1b[D", 0x4B00),
        (b"\x1b[H", 0x4700), (b"\x1b[F", 0x4F00), (b"\x1b[3~", 0x5300), (b"\x1b[6~", 0x5100),
    ],
)  # fmt: skip
def test_keys_come_from_the_serial_port(pc, typed, key):
    pc.typed += typed + b"!"
    for service in (0x0100, 0x1100, 0x0100):  # it stays
        got = pc.call(0x16, ZERO, eax=service)
        assert (got["eax"], got["flags"]) == (key, 0)
    assert pc.call(0x16, eax=0x0000)["eax"] == key
    assert pc.call(0x16, eax=0x1000)["eax"] == ord("!")
    assert pc.call(0x16, eax=0x0100)["flags"] == ZERO


def test_the_key_esc_itself(pc):
    pc.typed += b"\x1b"
    assert pc.call(0x16, eax=0x0000)["eax"] == 0x011B


def test_what_is_no_key_is_dropped(pc):
    for typed in (b"\0", b"\xc3", b"\x1b[Z", b"\x1b[9~", b"\x1b["):
        pc.typed += typed
        got = pc.call(0x16, eax=0x0100)
        assert (got["flags"], got["eax"], pc.typed) == (ZERO, 0x0100, b"")
    assert pc.call(0x16, eax=0x0200)["eax"] == 0


# INT 11h to 15h


def test_equipment_base_memory_and_no_drives(pc):
    assert pc.call(0x11)["eax"] == 0x0202
    assert pc.call(0x12)["eax"] == 639
    for eax in (0x0000, 0x0201, 0x0800, 0x4100):
        got = pc.call(0x13, eax=eax, edx=0x80)
        assert (got["eax"], got["flags"]) == (0x0100 | eax & 0xFF, CARRY)


def test_the_memory_map_entry_by_entry(pc):
    found, index = [], 0
    while True:
        got = pc.call(0x15, CARRY, eax=0xE820, ebx=index, ecx=24, edx=0x534D4150, edi=0x4000)
        assert (got["eax"], got["ecx"], got["flags"]) == (0x534D4150, 20, 0)
        found.append(struct.unpack("<QQI", pc.vm.memory.read(0x4000, 20)))
        index = got["ebx"]
        if not index:
            break
    assert found == ram()


@pytest.mark.parametrize(
    "wrong",
    [{"edx": 0}, {"ecx": 19}, {"ebx": 5}, {"ebx": 0x1_0000}, {"ebx": 0xFFFF_FFFF}, {"edi": 0xFFED}],
)
def test_a_wrong_question_for_the_memory_map_is_refused(pc, wrong):
    right = {"ebx": 0, "ecx": 20, "edx": 0x534D4150, "edi": 0xFFEC}
    assert pc.call(0x15, eax=0xE820, **right)["flags"] == 0
    pc.vm.memory.write(0xFFEC, bytes(0x20))
    got = pc.call(0x15, eax=0xE820, **(right | wrong))
    assert (got["eax"], got["flags"]) == (0x8620, CARRY)
    assert pc.vm.memory.read(0xFFEC, 0x20) == bytes(0x20)


def test_sizes_of_extended_memory(pc):
    got = pc.call(0x15, CARRY, eax=0xE801)
    assert [got[n] for n in ("eax", "ecx", "ebx", "edx")] == [15360, 15360, 256, 256]
    got = pc.call(0x15, CARRY, eax=0x8800)
    assert (got["eax"], got["flags"]) == (31 << 10, 0)


def test_a20_is_open_and_stays_so(pc):
    assert pc.call(0x15, CARRY, eax=0x2401) | {"eax": 0} == pc.call(0x15) | {"flags": 0, "eax": 0}
    assert pc.call(0x15, eax=0x2402)["eax"] == 1
    assert pc.call(0x15, eax=0x2403)["ebx"] == 3
    assert pc.call(0x15, eax=0x2400)["flags"] == CARRY


def test_services_that_are_not_there_say_so(pc):
    for number, eax in [(0x15, 0x5300), (0x15, 0xEC00), (0x15, 0xC000), (0x1A, 0xB101)]:
        got = pc.call(number, eax=eax)
        assert (got["eax"], got["flags"]) == (0x8600 | eax & 0xFF, CARRY)


def table(source: int, target: int, limits: tuple[int, int] = (0xFFFF, 0xFFFF)) -> bytes:
    """The GDT for INT 15h AH=87h."""

    def descriptor(base: int, limit: int) -> bytes:
        return struct.pack("<HHBBBB", limit, base & 0xFFFF, base >> 16 & 0xFF, 0x93, 0, base >> 24)

    return bytes(16) + descriptor(source, limits[0]) + descriptor(target, limits[1]) + bytes(16)


def test_a_block_is_copied_to_extended_memory_and_back(pc):
    data = bytes(range(256)) * 256
    pc.vm.memory.write(0x1_0000, data)
    pc.vm.memory.write(0x4000, table(0x1_0000, 0x123_4567))
    got = pc.call(0x15, CARRY, eax=0x87AA, ecx=0x8000, esi=0x4000)
    assert (got["eax"], got["flags"]) == (0x00AA, 0)
    assert pc.vm.memory.read(0x123_4566, len(data) + 2) == b"\0" + data + b"\0"
    pc.vm.memory.write(0x4000, table(0x123_4567, 0x2_0001))
    assert pc.call(0x15, eax=0x8700, ecx=3, esi=0x4000)["flags"] == 0
    assert pc.vm.memory.read(0x2_0000, 8) == b"\0" + data[:6] + b"\0"
    assert pc.regs.cr0 & 1 == 0
    assert pc.call(0x15, eax=0x8700, ecx=0, esi=0x4000)["flags"] == 0


@pytest.mark.parametrize(
    ("count", "at", "limits"),
    [(0x8001, 0x4000, (0xFFFF, 0xFFFF)), (2, 0xFFE1, (0xFFFF, 0xFFFF)),
     (2, 0x4000, (2, 3)), (2, 0x4000, (3, 2))],
)  # fmt: skip
def test_a_block_beyond_the_limits_is_not_copied(pc, count, at, limits):
    pc.vm.memory.write(at, table(0x1_0000, 0x20_0000, limits))
    pc.vm.memory.write(0x1_0000, b"data")
    got = pc.call(0x15, eax=0x8700, ecx=count, esi=at)
    assert (got["eax"], got["flags"]) == (0x0200, CARRY)
    assert pc.vm.memory.read(0x20_0000, 4) == bytes(4)


# Time


def test_the_timer_counts_the_ticks_of_a_day(pc):
    eois = []
    pc.vm.on_pio(0x20, write=lambda a: eois.append(a.value))
    pc.call(0x1A, eax=0x0100, ecx=0x12, edx=0xFFFF)
    pc.call(0x08, eax=0x1234)
    got = pc.call(0x1A, CARRY, eax=0x00FF)
    assert [got[n] for n in ("eax", "ecx", "edx", "flags")] == [0, 0x13, 0, 0]
    pc.call(0x1A, eax=0x0100, ecx=0x18, edx=0x00AF)
    pc.call(0x08)
    for midnight in (1, 0):
        got = pc.call(0x1A, eax=0x0000)
        assert [got[n] for n in ("eax", "ecx", "edx")] == [midnight, 0, 0]
    assert eois == [0x20, 0x20]


def test_interrupts_that_nobody_wants_are_acknowledged(pc):
    eois = []
    for port in (0x20, 0xA0):
        pc.vm.on_pio(port, write=lambda a: eois.append((a.address, a.value)))
    pc.call(0x0F)
    pc.call(0x77)
    assert eois == [(0x20, 0x20), (0xA0, 0x20), (0x20, 0x20)]


def test_time_and_date_are_those_of_the_clock(pc):
    registers = {0: 0x59, 2: 0x47, 4: 0x23, 7: 0x31, 8: 0x12, 9: 0x26, 0x32: 0x20, 0x0A: 0x26}
    selected = []
    pc.vm.on_pio(0x70, write=selected.append)
    pc.vm.on_pio(0x71, read=lambda a: registers[selected[-1].value])
    got = pc.call(0x1A, CARRY, eax=0x0200)
    assert [got[n] for n in ("ecx", "edx", "flags")] == [0x2347, 0x5900, 0]
    got = pc.call(0x1A, CARRY, eax=0x0400)
    assert [got[n] for n in ("ecx", "edx", "flags")] == [0x2026, 0x1231, 0]


def test_where_there_is_no_clock_there_is_no_time(pc):
    assert pc.call(0x1A, eax=0x0200)["flags"] == CARRY


# The end


@pytest.mark.parametrize("number", [0x18, 0x19])
def test_nothing_to_boot_is_said_and_ends_the_machine(pc, number):
    resets = []
    pc.vm.on_pio(0xCF9, write=lambda a: resets.append(a.value))
    pc.regs.update(rip=CALLS - CODE + 4 * number)
    pc.halt()
    assert (pc.printed, resets) == (b"\r\nNo bootable device\r\n", [6])


def test_a_jump_to_the_reset_vector_ends_the_machine(pc):
    resets = []
    pc.vm.on_pio(0x64, write=lambda a: resets.append(a.value))
    pc.regs.update(cs=pc.regs.cs._replace(selector=0xF000, base=0xF_0000), rip=0xFFF0)
    pc.halt()
    assert resets == [0xFE]
    assert pc.vm.memory.read_u8(0xF_FFFE) == 0xFC
