"""`examples/minikvm.py`: short, in nine steps, on the abi layer alone, and it works."""

import re
import subprocess
import sys

import pytest
from command import GUESTS, ROOT

EXAMPLE = ROOT / "examples" / "minikvm.py"


def run(*arguments: object) -> str:
    command = [sys.executable, EXAMPLE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.kvm
def test_it_counts_on_port_0x10():
    expected = [f"io: out port 0x10 data {ord(digit):02x}" for digit in "0123456789"]
    assert run().splitlines() == [*expected, "halt"]


@pytest.mark.kvm
def test_it_runs_other_guests():
    lines = run(GUESTS / "counter.bin").splitlines()
    assert lines == [*(f"io: out port 0x10 data {n:02x}00" for n in range(10)), "halt"]
    assert run(GUESTS / "ports.bin").endswith("halt\n")
    assert "io: in port" in run(GUESTS / "ports.bin")
    assert run(GUESTS / "hello.bin").endswith("halt\n")


def test_it_is_short_and_shows_nine_steps_in_order_of_the_text():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 120
    steps = re.findall(r"^ +# (\d)\. ", text, re.MULTILINE)
    assert sorted(steps) == list("123456789")


def test_it_uses_nothing_of_vmexit_but_the_abi():
    imported = re.findall(r"^(?:from|import) (vmexit[\w.]*)", EXAMPLE.read_text(), re.MULTILINE)
    assert imported
    assert all(name == "vmexit.abi" or name.startswith("vmexit.abi.") for name in imported)
