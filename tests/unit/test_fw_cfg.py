"""The firmware configuration device: registers, DMA, hostile guests; and what is in its items.

Numbers and layouts are those of QEMU's docs/specs/fw_cfg.rst.
"""

import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_images import bzimage

from vmexit.arch.x86 import acpi
from vmexit.boot import firmware_items
from vmexit.core.bus import Bus
from vmexit.core.errors import ConfigError, ImageError
from vmexit.core.memory import GuestMemory
from vmexit.devices.fw_cfg import MAX_FILL, SIZE, FwCfg

PORT, DATA, DMA_HIGH, DMA_LOW = 0x510, 0x511, 0x514, 0x518
ERROR, READ, SKIP, SELECT, WRITE = 1, 2, 4, 8, 16
RAM = 4 << 20
BOOT = Path(firmware_items.__file__).parent
CONTENT = bytes(range(100))


class Pc:
    """A guest that uses the device by its ports."""

    def __init__(self, items=None, files=None) -> None:
        self.memory = GuestMemory([(0, RAM)])
        self.memory.add_rom(0xFFFF_0000, b"\xcc" * 0x1000)
        self.device = FwCfg(
            self.memory, items or {5: b"\x02\0"}, files or {"opt/b": CONTENT, "etc/a": b"A"}
        )
        self.bus = Bus("port")
        self.bus.attach(PORT, SIZE, self.device)

    def select(self, key: int) -> None:
        self.bus.write(PORT, 2, key)

    def take(self, count: int) -> bytes:
        return self.bus.read_string(DATA, 1, count)

    def item(self, key: int, count: int) -> bytes:
        self.select(key)
        return self.take(count)

    def dma(self, control: int, length: int = 0, address: int = 0, at: int = 0x1000) -> int:
        """Run a transfer; the control field that is left."""
        self.memory.write(at, struct.pack(">IIQ", control, length, address))
        self.bus.write(DMA_HIGH, 4, 0)  # the fuzz test has written anything there
        self.bus.write(DMA_LOW, 4, int.from_bytes(at.to_bytes(4, "big"), "little"))
        return struct.unpack(">I", self.memory.read(at, 4))[0]

    def directory(self) -> dict[str, tuple[int, int]]:
        """Size and key of each file."""
        (count,) = struct.unpack(">I", self.item(0x19, 4))
        found = {}
        for _ in range(count):
            size, key, reserved, name = struct.unpack(">IHH56s", self.take(64))
            assert reserved == 0 and name.endswith(b"\0")
            found[name.rstrip(b"\0").decode()] = (size, key)
        return found


@pytest.fixture
def pc():
    pc = Pc()
    yield pc
    pc.memory.close()


def test_a_guest_recognises_it_by_its_signatures(pc):
    assert pc.take(4) == b"QEMU"  # it is selected after reset
    assert pc.item(0, 4) == b"QEMU"
    assert pc.item(1, 4) == b"\3\0\0\0"
    assert struct.pack("<2I", pc.bus.read(DMA_HIGH, 4), pc.bus.read(DMA_LOW, 4)) == b"QEMU CFG"
    assert [pc.bus.read(DMA_HIGH + i, 1) for i in range(8)] == list(b"QEMU CFG")


def test_an_item_is_read_byte_by_byte_and_then_zeros(pc):
    assert pc.item(5, 4) == b"\2\0\0\0"
    assert pc.item(5, 1) == b"\2"
    assert pc.item(0x77, 3) == bytes(3)  # there is none
    pc.select(5)
    assert pc.bus.read(PORT, 1) == 2  # the selector's port reads data, too


def test_files_are_found_by_the_directory(pc):
    directory = pc.directory()
    assert directory == {"etc/a": (1, 0x20), "opt/b": (100, 0x21)}
    assert pc.item(0x21, 101) == CONTENT + b"\0"
    assert pc.item(0x21 | 0x4000, 100) == CONTENT  # with the bit that once meant to write


def test_items_cannot_be_written_at_the_data_port(pc):
    pc.select(0x4021)
    pc.bus.write(DATA, 1, 0xEE)
    assert pc.take(100) == CONTENT


@pytest.mark.parametrize("at", [0x1000, 0x1001, RAM - 16])
def test_dma_copies_and_goes_on_where_it_ended(pc, at):
    assert pc.dma(0x21 << 16 | SELECT | READ, 60, 0x2000, at) == 0
    assert pc.memory.read(0x2000, 61) == CONTENT[:60] + b"\0"
    assert pc.take(2) == CONTENT[60:62]
    pc.memory.write(0x3000, b"\xff" * 64)
    assert pc.dma(READ, 60, 0x3000, at) == 0
    assert pc.memory.read(0x3000, 61) == CONTENT[62:] + bytes(22) + b"\xff"


def test_dma_skips_and_selects(pc):
    assert pc.dma(0x21 << 16 | SELECT) == 0
    assert pc.dma(SKIP, 98) == 0
    assert pc.take(3) == b"\x62\x63\0"
    assert pc.dma(0x21 << 16 | SELECT | SKIP, 0xFFFF_FFFF) == 0
    assert pc.device.state()["offset"] == 100
    assert pc.dma(0) == 0


def test_to_read_wins_over_to_write_and_that_over_to_skip(pc):
    assert pc.dma(0x21 << 16 | SELECT | READ | WRITE | SKIP, 4, 0x2000) == 0
    assert pc.memory.read(0x2000, 4) == CONTENT[:4]
    assert pc.dma(WRITE | SKIP, 4, 0x2000) == ERROR
    assert pc.take(1) == b"\4"


def test_a_write_is_an_error_as_all_items_are_read_only(pc):
    pc.memory.write(0x2000, b"\xee" * 100)
    assert pc.dma(0x21 << 16 | SELECT | WRITE, 100, 0x2000) == ERROR
    assert pc.item(0x21, 100) == CONTENT


@pytest.mark.parametrize(
    "address",
    [RAM, RAM - 50, 0x1_0000_0000, 0xFFFF_0000, (1 << 64) - 1, (1 << 64) - 50, 0xFEE0_0000],
)
def test_memory_that_is_no_ram_is_an_error_and_stays_as_it_is(pc, address):
    pc.memory.write(RAM - 64, b"\xee" * 64)
    assert pc.dma(0x21 << 16 | SELECT | READ, 60, address) == ERROR
    assert pc.memory.read(RAM - 64, 64) == b"\xee" * 64
    assert pc.memory.read(0xFFFF_0000, 0x1000) == b"\xcc" * 0x1000
    assert pc.take(1) == b"\0"  # nothing was taken: this is the first byte of the item
    assert pc.device.state()["offset"] == 1


@pytest.mark.parametrize("at", [RAM, 0xFFFF_0000, (1 << 64) - 8, 0xFEE0_0000])
def test_a_descriptor_that_is_not_in_ram_does_nothing(pc, at):
    if at >> 32:
        pc.bus.write(DMA_HIGH, 4, 0xFFFF_FFFF)
    pc.bus.write(DMA_LOW, 4, int.from_bytes((at & 0xFFFF_FFFF).to_bytes(4, "big"), "little"))
    assert pc.memory.read(0xFFFF_0000, 0x1000) == b"\xcc" * 0x1000


def test_a_descriptor_that_reaches_beyond_ram_gets_the_error_as_far_as_there_is_ram(pc):
    pc.memory.write(RAM - 8, b"\xee" * 8)
    pc.bus.write(DMA_LOW, 4, int.from_bytes((RAM - 8).to_bytes(4, "big"), "little"))
    assert pc.memory.read(RAM - 8, 8) == struct.pack(">I", ERROR) + b"\xee" * 4


def test_zeros_behind_an_item_are_bounded(pc):
    # Neither does it take the time of 4 GiB, nor touch memory that the guest has not.
    assert pc.dma(0x20 << 16 | SELECT | READ, MAX_FILL + 1, 0x2000) == 0
    assert pc.dma(0x20 << 16 | SELECT | READ, MAX_FILL + 2, 0x2000) == ERROR
    assert pc.dma(READ, 0xFFFF_FFFF, 0) == ERROR
    assert pc.dma(0x99 << 16 | SELECT | READ, 16, 0x2000) == 0


def test_the_high_half_of_the_address_counts_once(pc):
    memory = GuestMemory([(0, RAM), (1 << 32, 1 << 20)])
    device = FwCfg(memory, {}, {"f": CONTENT})
    memory.write((1 << 32) + 0x100, struct.pack(">IIQ", 0x20 << 16 | SELECT | READ, 8, 0x2000))
    device.write(4, 4, 0x0100_0000)
    device.write(8, 4, 0x0001_0000)
    assert memory.read(0x2000, 8) == CONTENT[:8]
    memory.write(0x100, struct.pack(">IIQ", READ, 4, 0x2000))
    device.write(8, 4, 0x0001_0000)
    assert memory.read(0x2000, 4) == CONTENT[8:12]
    assert device.state()["high"] == 0
    memory.close()


def test_a_transfer_into_its_own_descriptor_ends(pc):
    assert pc.dma(0x21 << 16 | SELECT | READ, 16, 0x1000) == 0
    assert pc.memory.read(0x1000, 16) == bytes(4) + CONTENT[4:16]


def test_other_widths_start_nothing(pc):
    pc.memory.write(0x1000, struct.pack(">IIQ", 0x21 << 16 | SELECT | READ, 4, 0x2000))
    pc.device.write(8, 2, 0x0010)
    pc.device.write(6, 4, 0x0010_0000)
    pc.device.write(0, 4, 0x21)
    pc.device.write(0, 1, 0x21)
    assert pc.memory.read(0x2000, 4) == bytes(4)
    assert pc.take(4) == b"QEMU"
    assert pc.device.read(2, 2) == 0xFFFF
    assert pc.device.read(0, 2) == pc.device.read(1, 4) == 0


def test_a_saved_device_goes_on_where_it_was(pc):
    pc.item(0x21, 7)
    pc.bus.write(DMA_HIGH, 4, 0x0100_0000)
    state = pc.device.state()
    other = Pc()
    other.device.restore(state)
    assert other.device.state() == state
    assert other.take(1) == CONTENT[7:8]
    other.device.reset()
    assert other.take(4) == b"QEMU"
    assert other.device.state()["high"] == 0
    other.device.restore({**state, "offset": 5000})  # of an item that was longer there
    assert other.device.state()["offset"] == 100
    assert other.take(1) == b"\0"
    other.memory.close()


@pytest.mark.parametrize("wrong", [{"version": 2}, {"key": 1 << 16}, {"offset": -1}, {"high": "x"}])
def test_a_state_that_cannot_be_is_refused(pc, wrong):
    with pytest.raises(ConfigError, match="not the state of a firmware configuration device"):
        pc.device.restore({**pc.device.state(), **wrong})


@pytest.mark.parametrize("name", ["", "x" * 56, "ä", "a\0b"])
def test_a_file_name_that_has_no_room_is_refused(name):
    memory = GuestMemory([(0, 0x1000)])
    with pytest.raises(ConfigError, match="cannot be the name of a firmware file"):
        FwCfg(memory, {}, {name: b""})
    memory.close()


keys = st.one_of(
    st.sampled_from([0, 1, 5, 0x19, 0x20, 0x21, 0x4021, 0x8002]), st.integers(0, 0xFFFF)
)
numbers = st.one_of(
    st.sampled_from([0, 16, 0x1000, RAM - 8, RAM, 0xFFFF_0000, 1 << 32, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
lengths = st.one_of(st.integers(0, 200), st.sampled_from([RAM, 0xFFFF_FFFF]))
transfers = st.tuples(keys, st.integers(0, 63), lengths, numbers, numbers)
accesses = st.tuples(
    st.integers(0, SIZE - 1), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFF_FFFF), st.booleans()
)


@given(st.lists(st.one_of(transfers, accesses), max_size=20))
def test_no_sequence_of_accesses_raises_or_reaches_beyond_ram(steps):
    pc = Pc()
    try:
        for step in steps:
            if len(step) == 5:
                key, control, length, address, at = step
                at = at if at + 16 <= RAM else 0x1000
                assert pc.dma(key << 16 | control, length, address, at) in (0, ERROR)
            else:
                offset, size, value, is_write = step
                if is_write:
                    pc.bus.write(PORT + offset, size, value & (1 << 8 * size) - 1)
                else:
                    assert 0 <= pc.bus.read(PORT + offset, size) < 1 << 8 * size
            state = pc.device.state()
            pc.device.restore(state)
            assert pc.device.state() == state
        assert pc.memory.read(0xFFFF_0000, 0x1000) == b"\xcc" * 0x1000
        assert pc.item(0x21, 100) == CONTENT
    finally:
        pc.memory.close()


def test_vcpus_that_enter_at_once_get_each_what_they_asked_for():
    files = {f"f{i}": bytes((i,)) * 5000 for i in range(4)}
    pc = Pc(files=files)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    wrong = []

    def vcpu(number: int) -> None:
        for _ in range(5000):
            at, target = 0x1000 * (number + 1), 0x10_0000 * (number + 1) - 0x8000
            control = (0x20 + number) << 16 | SELECT | READ
            pc.memory.write(at, struct.pack(">IIQ", control, 5000, target))
            pc.device.write(8, 4, int.from_bytes(at.to_bytes(4, "big"), "little"))
            if pc.memory.read(target, 5000) != files[f"f{number}"]:
                wrong.append(number)
            pc.memory.write(target, bytes(5000))

    threads = [threading.Thread(target=vcpu, args=(i,)) for i in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    pc.memory.close()


# What firmware is told.


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 64 << 20), (1 << 32, 1 << 20)])
    yield memory
    memory.close()


def test_the_machine_is_told_of(memory):
    memory.add_rom(0xFFFF_0000, bytes(0x1000))
    items, files = firmware_items.machine(memory.regions, 3, serial=True)
    assert struct.unpack("<Q", items[3]) == (65 << 20,)
    assert items[5] == items[0x0F] == files["etc/boot-cpus"] == b"\3\0"
    assert files["etc/sercon-port"] == b"\xf8\3"
    ranges = list(struct.iter_unpack("<QQI", files["etc/e820"]))
    assert ranges == [(0, 64 << 20, 1), (1 << 32, 1 << 20, 1), (0xFEFF_C000, 0x4000, 2)]
    assert "etc/sercon-port" not in firmware_items.machine([], 1, serial=False).files


def load_tables(files, places: dict[str, int]) -> dict[str, bytearray]:
    """What firmware does with the script, its files being at `places`."""
    script, data = files["etc/table-loader"], {}
    assert len(script) % 128 == 0

    def name(raw: bytes) -> str:
        return raw.rstrip(b"\0").decode()

    for at in range(0, len(script), 128):
        (command,) = struct.unpack_from("<I", script, at)
        if command == 1:
            file, align, zone = struct.unpack_from("<56sIB", script, at + 4)
            # A FACS must be at a multiple of 64, the RSDP at one of 16 below 1 MiB.
            assert (align, zone) == ((16, 2) if b"rsdp" in file else (64, 1))
            assert places[name(file)] % align == 0
            data[name(file)] = bytearray(files[name(file)])
        elif command == 2:
            dest, src, offset, size = struct.unpack_from("<56s56sIB", script, at + 4)
            target = data[name(dest)]
            value = int.from_bytes(target[offset : offset + size], "little") + places[name(src)]
            target[offset : offset + size] = value.to_bytes(size, "little")
        else:
            assert command == 3
            file, offset, start, length = struct.unpack_from("<56sIII", script, at + 4)
            part = data[name(file)]
            part[offset] = (part[offset] - sum(part[start : start + length])) & 0xFF
    return data


def test_acpi_tables_are_whole_wherever_firmware_puts_them():
    _, files = firmware_items.acpi_tables(acpi.build(2, 0))
    base = 0x7F_FFC0
    data = load_tables(files, {"etc/acpi/tables": base, "etc/acpi/rsdp": 0xF_0010})
    rsdp, tables = data["etc/acpi/rsdp"], data["etc/acpi/tables"]
    assert rsdp[:8] == b"RSD PTR " and sum(rsdp[:20]) & 0xFF == sum(rsdp) & 0xFF == 0

    def table(gpa: int) -> bytes:
        at = gpa - base
        (length,) = struct.unpack_from("<I", tables, at + 4)
        found = bytes(tables[at : at + length])
        assert found[:4] == b"FACS" or sum(found) & 0xFF == 0
        return found

    rsdt, xsdt = struct.unpack_from("<I", rsdp, 16)[0], struct.unpack_from("<Q", rsdp, 24)[0]
    entries = [e for (e,) in struct.iter_unpack("<I", table(rsdt)[36:])]
    assert entries == [e for (e,) in struct.iter_unpack("<Q", table(xsdt)[36:])]
    fadt, madt = map(table, entries)
    assert (fadt[:4], madt[:4]) == (b"FACP", b"APIC")
    facs, dsdt = struct.unpack_from("<2I", fadt, 36)
    assert struct.unpack_from("<2Q", fadt, 132) == (0, dsdt)
    assert table(dsdt)[:4] == b"DSDT"
    assert table(facs)[:4] == b"FACS" and facs % 64 == 0
    # Who looks for the RSDP in memory does not find the one that is nowhere's.
    assert b"RSD PTR" not in tables


def test_a_kernel_is_given_as_qemu_does(memory):
    image = bzimage(b"payload" * 100)
    items, files = firmware_items.kernel(image, b"i" * 5000, "console=ttyS0", memory)

    def number(key: int) -> int:
        return struct.unpack("<I", items[key])[0]

    assert (number(0x16), number(0x13), number(0x07)) == (0x1_0000, 0x2_0000, 0x10_0000)
    assert items[0x15] == b"console=ttyS0\0" and number(0x14) == 14
    assert bytes(items[0x18])[:0x1F1] == image[:0x1F1] and number(0x17) == len(items[0x18]) == 2560
    assert bytes(items[0x11]) == image[2560:] and number(0x08) == len(image) - 2560
    at = (64 << 20) - firmware_items.FIRMWARE_TABLES - 0x2000
    assert (number(0x0A), number(0x0B), items[0x12]) == (at, 5000, b"i" * 5000)
    setup = items[0x18]
    assert setup[0x210] == 0xFF and setup[0x211] & 0x80
    assert struct.unpack_from("<2I", setup, 0x218) == (at, 5000)
    assert struct.unpack_from("<H", setup, 0x224) == (0xDE00,)
    assert struct.unpack_from("<I", setup, 0x228) == (0x2_0000,)
    assert files["bootorder"] == b"/rom@genroms/linuxboot.bin\0"
    assert 0x12 not in firmware_items.kernel(image, None, "", memory).items


@pytest.mark.parametrize(("version", "loadflags"), [(0x200, 0), (0x201, 1)])
def test_an_old_kernel_finds_its_command_line_by_an_offset(memory, version, loadflags):
    image = bzimage(version=version, loadflags=loadflags)
    items = firmware_items.kernel(image, None, "x", memory).items
    magic, offset = struct.unpack_from("<2H", items[0x18], 0x20)
    setup, cmdline = (struct.unpack("<I", items[key])[0] for key in (0x16, 0x13))
    assert (magic, setup, setup + offset) == (0xA33F, 0x9_0000, cmdline)


def test_an_initrd_goes_below_what_the_kernel_can_reach(memory):
    image = bzimage(initrd_addr_max=0x1FF_FFFF)
    items = firmware_items.kernel(image, b"i" * 4097, "", memory).items
    assert struct.unpack("<I", items[0x0A]) == (0x1FF_E000,)


def test_what_firmware_cannot_boot_is_refused(memory):
    with pytest.raises(ImageError, match="pass a vmlinuz, or leave out --firmware"):
        firmware_items.kernel(b"\x7fELF" + bytes(1000), None, "", memory)
    with pytest.raises(ImageError, match=r"no room between .* use --memory 68M or more"):
        firmware_items.kernel(bzimage(), bytes(48 << 20), "", memory)
    with pytest.raises(ImageError, match=r"no room .*0x2000000; use a smaller one"):
        image = bzimage(initrd_addr_max=0x1FF_FFFF)
        firmware_items.kernel(image, bytes(48 << 20), "", memory)
    for cmdline in ("x" * 2048, "a\0b"):
        with pytest.raises(ConfigError, match="use another --append"):
            firmware_items.kernel(bzimage(), None, cmdline, memory)


@pytest.mark.parametrize("initrd", [None, b"initrd"])
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"init_size": 100 << 20}, "use --memory 117M or more"),
        ({"payload": bytes(64 << 20)}, "use --memory 66M or more"),
        ({"init_size": 0xC000_0000}, "use a smaller one"),
    ],
)
def test_a_kernel_that_memory_is_too_small_for_is_refused(memory, initrd, options, remedy):
    with pytest.raises(ImageError, match=rf"the kernel needs memory up to .*; {remedy}"):
        firmware_items.kernel(bzimage(**options), initrd, "", memory)


def test_the_option_rom_is_one_that_boots():
    rom = firmware_items.option_rom()
    assert rom[:2] == b"\x55\xaa" and len(rom) == rom[2] * 512 and sum(rom) & 0xFF == 0
    (pnp,) = struct.unpack_from("<H", rom, 0x1A)
    assert rom[pnp : pnp + 4] == b"$PnP" and rom[pnp + 5] == 2
    name, vector = (struct.unpack_from("<H", rom, pnp + at)[0] for at in (0x10, 0x1A))
    assert rom[name:].startswith(b"Linux kernel\0") and 0 < vector < len(rom)


def test_the_option_rom_is_what_its_source_builds_to(tmp_path):
    source = BOOT / "linuxboot.S"
    command = re.search(r"^# (as --32 .*)$", source.read_text(), re.MULTILINE)
    assert command is not None
    shutil.copy(source, tmp_path)
    subprocess.run(["sh", "-ec", command[1]], cwd=tmp_path, check=True, timeout=60)
    built = (tmp_path / "linuxboot.bin").read_bytes()
    assert built == source.with_suffix(".bin").read_bytes(), f"build it again: {command[1]}"
