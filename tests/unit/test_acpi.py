"""ACPI tables and their AML: read back as an OS finds them, and by iasl where there is one."""

import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iasl import disassembled

from vmexit.arch.x86 import acpi, aml
from vmexit.arch.x86.layout import ACPI_TABLES, HIGH_MEMORY
from vmexit.core.errors import ConfigError


class Tables:
    """The tables as an OS finds them: scan for the RSDP, follow the addresses."""

    def __init__(self, blob: bytes, at: int) -> None:
        memory = bytearray(0x2_0000)
        memory[at - 0xE_0000 : at - 0xE_0000 + len(blob)] = blob
        self.memory = bytes(memory)
        found = [
            gpa for gpa in range(0xE_0000, 0x10_0000, 16)
            if self.read(gpa, 8) == b"RSD PTR " and sum(self.read(gpa, 20)) % 256 == 0
        ]  # fmt: skip
        (self.rsdp,) = found

    def read(self, gpa: int, size: int) -> bytes:
        return self.memory[gpa - 0xE_0000 : gpa - 0xE_0000 + size]

    def table(self, gpa: int) -> bytes:
        (length,) = struct.unpack("<I", self.read(gpa + 4, 4))
        data = self.read(gpa, length)
        if data[:4] != b"FACS":
            assert sum(data) % 256 == 0, data[:4]
        return data

    def all(self) -> dict[bytes, bytes]:
        length, xsdt = struct.unpack("<IQ", self.read(self.rsdp + 20, 12))
        assert length == 36 and sum(self.read(self.rsdp, 36)) % 256 == 0
        (rsdt,) = struct.unpack("<I", self.read(self.rsdp + 16, 4))
        pointers = struct.iter_unpack("<Q", self.table(xsdt)[36:])
        short = struct.iter_unpack("<I", self.table(rsdt)[36:])
        addresses = [a for (a,) in pointers]
        assert addresses == [a for (a,) in short]
        tables = {data[:4]: data for data in map(self.table, addresses)}
        facs, dsdt = struct.unpack_from("<II", tables[b"FACP"], 36)
        assert facs % 64 == 0 and struct.unpack_from("<Q", tables[b"FACP"], 140) == (dsdt,)
        return tables | {b"FACS": self.table(facs), b"DSDT": self.table(dsdt)}


@pytest.mark.parametrize("cpus", [1, 2, 255])
def test_the_tables_are_found_by_scanning_and_have_the_right_checksums(cpus) -> None:
    tables = Tables(acpi.build(cpus, ACPI_TABLES), ACPI_TABLES)
    assert tables.rsdp == ACPI_TABLES and tables.read(ACPI_TABLES + 15, 1) == b"\x02"
    assert set(tables.all()) == {b"FACP", b"APIC", b"FACS", b"DSDT"}


def test_the_fadt_says_where_the_fixed_hardware_is() -> None:
    """Offsets of ACPI 6.4, table 5-33."""
    fadt = Tables(acpi.build(1, ACPI_TABLES), ACPI_TABLES).all()[b"FACP"]
    u16, u32 = (lambda at, c=c: struct.unpack_from(c, fadt, at)[0] for c in ("<H", "<I"))
    assert fadt[8] == 6 and len(fadt) == 276
    assert u16(46) == 9 and u32(48) == 0  # SCI_INT; SMI_CMD: always in ACPI mode
    assert (u32(56), u32(64), u32(76)) == (0x600, 0x604, 0x608)
    assert (fadt[88], fadt[89], fadt[91]) == (4, 2, 4)
    assert fadt[108] == 0x32  # the RTC's register of centuries
    assert u16(109) == 1 << 0 | 1 << 2 | 1 << 3  # legacy devices, no 8042, no VGA, no MSI; RTC
    flags = u32(112)
    assert flags & 1 << 10 and flags & 1 << 8 and flags & 1  # RESET_REG_SUP, TMR_VAL_EXT, WBINVD
    assert not flags & 1 << 4 and not flags & 1 << 20  # power button fixed; not hardware-reduced
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)
    for at, bits, port in ((148, 32, 0x600), (172, 16, 0x604), (208, 32, 0x608)):
        assert struct.unpack_from("<BBxxQ", fadt, at) == (1, bits, port)


@pytest.mark.parametrize("cpus", [1, 4, 255])
def test_the_madt_has_a_lapic_for_each_cpu_the_ioapic_and_the_overrides(cpus) -> None:
    madt = Tables(acpi.build(cpus, ACPI_TABLES), ACPI_TABLES).all()[b"APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    lapics = [struct.unpack("<xxBBI", e) for e in entries if e[0] == 0]
    assert lapics == [(n, n, 1) for n in range(cpus)]
    assert [struct.unpack("<xxBxII", e) for e in entries if e[0] == 1] == [(0, 0xFEC0_0000, 0)]
    overrides = [struct.unpack("<xxBBIH", e) for e in entries if e[0] == 2]
    assert overrides == [(0, 0, 2, 0), (0, 9, 9, 0b1101)]
    assert [struct.unpack("<xxBHB", e) for e in entries if e[0] == 4] == [(0xFF, 0, 1)]
    assert len(entries) == cpus + 4


@pytest.mark.parametrize("cpus", [0, -1, 256])
def test_a_number_of_cpus_that_cannot_be(cpus) -> None:
    with pytest.raises(ConfigError, match=f"{cpus} processors cannot be; use 1 to 255"):
        acpi.build(cpus, ACPI_TABLES)


def test_tables_that_outgrow_their_place_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ACPI tables at .* use fewer devices"):
        acpi.build(1, ACPI_TABLES, aml.buffer(bytes(0x2_0000)))
    assert ACPI_TABLES + len(acpi.build(255, ACPI_TABLES)) < HIGH_MEMORY


def disassemble(tmp_path, table: bytes) -> str:
    """iasl's view of a table, white space and comments squeezed."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", disassembled(tmp_path, table), flags=re.S)
    return " ".join(text.split())


def test_iasl_reads_the_dsdt_as_it_is_meant(tmp_path) -> None:
    virtio = aml.device(
        "VIO0",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(0x1234)),
        aml.name(
            "_CRS",
            aml.resource_template(
                aml.memory32_fixed(0xD000_0000, 0x1000),
                aml.extended_irq(5, level=True, active_low=True, shared=True),
            ),
        ),
        aml.name("BIG_", aml.package(aml.integer(1 << 40), aml.string("x" * 100))),
        aml.name("LONG", aml.buffer(bytes(5000))),
    )
    blob = acpi.build(2, ACPI_TABLES, virtio)
    text = disassemble(tmp_path, Tables(blob, ACPI_TABLES).all()[b"DSDT"])
    for part in (
        r"Name (\_S5, Package (0x04) { 0x05, 0x05, Zero, Zero })",
        r'Scope (\_SB) { Device (COM1) { Name (_HID, EisaId ("PNP0501") ) Name (_UID, One)',
        "IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08, ) IRQNoFlags () {4}",
        'Device (RTC) { Name (_HID, EisaId ("PNP0B00") )',
        "IO (Decode16, 0x0070, 0x0070, 0x01, 0x02, ) IRQNoFlags () {8}",
        'Device (VIO0) { Name (_HID, "LNRO0005") Name (_UID, 0x1234)',
        "Memory32Fixed (ReadWrite, 0xD0000000, 0x00001000, )",
        "Interrupt (ResourceConsumer, Level, ActiveLow, Shared, ,, ) { 0x00000005, }",
        "0x0000010000000000",
        "Name (LONG, Buffer (0x1388)",
    ):
        assert part in text, part


@pytest.mark.parametrize("signature", [b"FACP", b"APIC"])
def test_iasl_finds_nothing_wrong_with_the_data_tables(tmp_path, signature) -> None:
    table = Tables(acpi.build(3, ACPI_TABLES), ACPI_TABLES).all()[signature]
    disassemble(tmp_path, table)


@given(st.integers(0, (1 << 64) - 1))
def test_an_integer_has_its_shortest_form(value) -> None:
    raw = aml.integer(value)
    if value < 2:
        assert raw == bytes((value,))
    else:
        size = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[raw[0]]
        assert len(raw) == 1 + size and int.from_bytes(raw[1:], "little") == value
        assert size == 1 or value >> 4 * size


# around the lengths at which it grows: 1 << 6, 1 << 12 and 1 << 20
@given(
    st.integers(50, 70)
    | st.integers((1 << 12) - 10, (1 << 12) + 10)
    | st.integers((1 << 20) - 10, (1 << 20) + 10)
)
def test_a_package_length_counts_itself_and_its_body(size) -> None:
    """ACPI 6.4, 20.2.4, read back."""
    raw = aml.scope("\\", bytes(size))
    more = raw[1] >> 6
    length = raw[1] & 0x3F
    if more:
        length = raw[1] & 0xF | int.from_bytes(raw[2 : 2 + more], "little") << 4
    assert length == len(raw) - 1
    assert raw[2 + more :] == b"\\\0" + bytes(size)


def test_names() -> None:
    assert aml.name_string("\\_SB") == b"\\_SB_"
    assert aml.name_string("^^A.BC") == b"^^\x2eA___BC__"
    assert aml.name_string("A.B.C") == b"\x2f\x03A___B___C___"
    for bad in ("", "a", "ABCDE", "1A", "A..B", "A B"):
        if bad:
            with pytest.raises(ValueError, match="no ACPI name"):
                aml.name_string(bad)


def test_an_eisa_id_is_the_documented_integer() -> None:
    # ACPI 6.4, 19.3.4: EISAID ("PNP0A03") is 0x030AD041.
    assert aml.eisa_id("PNP0A03") == b"\x0c" + (0x030AD041).to_bytes(4, "little")


@pytest.mark.parametrize(
    "make",
    [
        lambda: aml.eisa_id("PN0501"), lambda: aml.integer(-1), lambda: aml.integer(1 << 64),
        lambda: aml.string("é"), lambda: aml.string("a\0"), lambda: aml.buffer(bytes(1 << 28)),
    ],
)  # fmt: skip
def test_what_cannot_be_aml_is_a_value_error(make) -> None:
    with pytest.raises(ValueError):
        make()
