"""ACPI tables as iasl reads them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vmexit.arch.x86 import acpi
from vmexit.arch.x86.layout import ACPI_TABLES


def disassembled(folder: Path, table: bytes) -> str:
    """ASL of a table, which iasl finds nothing wrong with; it is in `t.dsl`, too."""
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("no iasl on this machine; apt-get install acpica-tools")
    (folder / "t.dat").write_bytes(table)
    done = subprocess.run([iasl, "-d", "t.dat"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|error|invalid", done.stderr, re.I), done.stderr
    return (folder / "t.dsl").read_text()


def devices_there_and_back(folder: Path, devices: bytes) -> str:
    """ASL of the DSDT with this AML, from which iasl makes AML again."""
    blob = acpi.build(1, ACPI_TABLES, devices)
    at = blob.index(b"DSDT")
    text = disassembled(folder, blob[at : at + int.from_bytes(blob[at + 4 : at + 8], "little")])
    subprocess.run(["iasl", "t.dsl"], cwd=folder, check=True, capture_output=True)
    return text
