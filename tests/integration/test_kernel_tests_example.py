"""`examples/kernel-tests`: the project runs as its README says, and its reports tell of a bug."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT

EXAMPLE = ROOT / "examples" / "kernel-tests"


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy: nothing that was built before is used, and nothing is left behind."""
    folder = tmp_path / "kernel-tests"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("build", "__pycache__"))
    return folder


def run_pytest(project: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=100
    )
    return done.stdout + done.stderr


def test_fifty_tests_pass(project):
    text = run_pytest(project)
    assert "= 50 passed in" in text, text


@pytest.mark.parametrize("accel", [pytest.param("kvm", marks=pytest.mark.kvm), "soft"])
def test_they_pass_on_the_accelerator_that_is_asked_for(project, accel):
    text = run_pytest(project, "-v", "--vm-accel", accel)
    assert "= 50 passed in" in text, text
    assert text.count(f"{accel}-") + text.count(f"[{accel}]") >= 50


def test_a_bug_of_the_kernel_is_in_the_report(project):
    source = project / "kernel" / "ring.c"
    good = "    ring->bytes[ring->head % RING_SIZE] = byte;\n"
    assert good in source.read_text()
    bad = "    *(volatile char *)0x5000000000 = byte;\n"
    source.write_text(source.read_text().replace(good, bad))
    text = run_pytest(project, "--vm-accel", "soft", "tests/test_ring.py")
    assert "= 3 failed in" in text, text
    calls, _, console = text.partition("backtrace:")[2].partition("the end of the console")
    for name in ("power_off", "panic", "interrupt"):
        assert f" {name}+0x" in calls, calls
    assert "panic: page fault at 5000000000, error 2, rip" in console
    assert "ring_put did not return: vcpu 0: debug-exit" in text
