"""`examples/fuzz.py`: coverage leads it to the planted mistake, and what it saves crashes again."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT

EXAMPLE = ROOT / "examples" / "fuzz.py"
MOST = 6000  # executions; without coverage it would take billions


def fuzz(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def counts(text: str) -> tuple[int, int]:
    """Executions and blocks, from the last line of progress."""
    found = re.findall(r"^(\d+) executions, \d+/s, (\d+) of \d+ blocks", text, re.MULTILINE)
    return int(found[-1][0]), int(found[-1][1])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, str]:
    """The file with an input that crashes the target, and what was printed until it was found."""
    folder = tmp_path_factory.mktemp("crashes")
    done = fuzz("--seed", 2, "--executions", MOST, "--until", "shutdown", "--crashes", folder)
    assert done.returncode == 0, done.stderr
    files = list(folder.glob("shutdown-*"))
    assert len(files) == 1, done.stdout
    assert f"crash: {files[0]}\n" in done.stdout
    return files[0], done.stdout


@pytest.mark.timeout(300)
def test_coverage_finds_what_blind_changes_do_not(found, tmp_path):
    _, text = found
    executions, blocks = counts(text)
    assert executions <= MOST
    blind = fuzz("--seed", 2, "--executions", executions, "--blind", "--crashes", tmp_path / "none")
    assert counts(blind.stdout)[0] == executions
    assert counts(blind.stdout)[1] < blocks
    assert not (tmp_path / "none").exists(), blind.stdout


@pytest.mark.parametrize("accel", [pytest.param("kvm", marks=pytest.mark.kvm), "soft"])
def test_the_input_crashes_again(found, accel):
    path, _ = found
    assert path.read_bytes()[:4] == b"VXI1"
    done = fuzz("--accel", accel, "--replay", path)
    assert done.returncode == 1, done.stderr
    rip = path.name.split("-")[1]
    assert re.match(rf"vcpu 0: shutdown: triple fault.* at 0x{rip}\n", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (b"VXI1\0W\1x", 1, "vcpu 0: timeout at 0x"),  # waits for an odd number by steps of two
        (b"VXI1\0W\2xx", 0, "vcpu 0: stopped at 0x"),
        (b"", 0, "vcpu 0: stopped at 0x"),
    ],
)
def test_an_input_of_ones_own(tmp_path, data, status, said):
    path = tmp_path / "input"
    path.write_bytes(data)
    done = fuzz("--replay", path, "--timeout", 2)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.startswith(said)
