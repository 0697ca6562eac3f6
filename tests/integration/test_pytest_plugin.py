"""The pytest plugin, by a pytest of its own: fixtures, clones, reports of what failed."""

import pytest

from vmexit import Machine

pytest_plugins = "pytester"

CONFTEST = """
import pytest

# 16-bit: mov si, text; next: cs lodsb; test al, al; je echo; mov dx, 0x3f8; out dx, al; jmp next
# echo: mov dx, 0x3fd; in al, dx; test al, 1; jz echo; mov dx, 0x3f8; in al, dx; cmp al, '!';
# je end; out dx, al; jmp echo; end: hlt
CODE = bytes.fromhex(
    "be2700 2eac 84c0 7406 baf803 ee ebf4 bafd03 ec a801 74f8 baf803 ec 3c21 7403 ee ebed f4"
)

@pytest.fixture(scope="session")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernel") / "kernel.bin"
    path.write_bytes(CODE.ljust(0x27, b"\\x90") + b"up# \\0")
    return path

@pytest.fixture(scope="session")
def vm_boot(image):
    return {"image": image, "load_address": 0x1000, "memory": "1M"}

@pytest.fixture
def vm_options(image):
    return {"image": image, "load_address": 0x1000, "memory": "1M"}
"""
TESTS = """
import pytest

def test_fresh(vm):
    vm.console.expect("up# ", 30)

@pytest.mark.parametrize("n", range(5))
def test_warm(booted, n):
    assert booted.console.output == ""  # what it wrote before is another machine's
    booted.console.send(f"hello {n}")
    booted.console.expect(f"hello {n}", 30)
    booted.memory.write(0x8000, b"mine")

def test_nothing_is_left_of_the_others(booted):
    assert booted.memory.read(0x8000, 4) == bytes(4)
"""
FAILS = """
def test_fails(booted):
    booted.console.send("last words")
    booted.console.expect("last words", 30)
    assert booted.vcpus[0].regs.rax == 0x1234
"""


@pytest.fixture
def project(pytester):
    pytester.makeconftest(CONFTEST)
    return pytester


def test_machines_are_fixtures_on_both_accelerators(project):
    project.makepyfile(TESTS)
    done = project.runpytest_subprocess("-v", "--strict-markers")
    done.assert_outcomes(passed=14)
    assert done.outlines and sum("kvm" in line for line in done.outlines) >= 7
    project.runpytest_subprocess("--vm-accel", "soft").assert_outcomes(passed=7)
    project.runpytest_subprocess("-m", "soft").assert_outcomes(passed=7, deselected=7)


def test_auto_is_the_accelerator_that_a_kernel_would_get(project):
    with Machine("1M", machine="microvm") as machine:
        accel = machine.accel
    project.makepyfile(
        f"def test_it(vm, booted): assert (vm.accel, booted.accel) == {(accel,) * 2}"
    )
    done = project.runpytest_subprocess("-v", "--vm-accel", "auto")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines([f"*test_it?{accel}? PASSED*"])
    project.runpytest_subprocess("--vm-accel", "auto", "-m", accel).assert_outcomes(passed=1)


def test_a_failure_tells_what_the_machine_did(project):
    project.makepyfile(FAILS)
    done = project.runpytest_subprocess("--vm-accel", "soft")
    done.assert_outcomes(failed=1)
    text = done.stdout.str()
    for words in ("Machine on soft, 1 MiB", ": exits", "rip=", "cs=", "the end of the console"):
        assert words in text, text
    assert "last words" in text.partition("the end of the console")[2]
    assert "io in" in text and "0x03fd" in text


def test_a_test_that_boots_nothing_is_told_what_to_do(pytester):
    pytester.makepyfile("def test_it(booted): pass")
    done = pytester.runpytest_subprocess("--vm-accel", "soft")
    assert "have a fixture vm_boot" in done.stdout.str() + done.stderr.str()


def test_workers_share_what_was_booted(project, monkeypatch):
    """As pytest-xdist has them: processes with a name and a folder each, in one folder."""
    project.makepyfile(TESTS)
    for worker in ("gw0", "gw1"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        base = project.path / "base" / worker
        base.parent.mkdir(exist_ok=True)
        done = project.runpytest_subprocess("--vm-accel", "soft", "--basetemp", base)
        done.assert_outcomes(passed=7)
    assert sorted(path.name for path in (project.path / "base").iterdir()) == [
        "gw0", "gw1", "vmexit-soft", "vmexit.lock",
    ]  # fmt: skip


def test_other_projects_are_left_alone(pytester):
    """The plugin is there for each pytest where vmexit is installed."""
    pytester.makepyfile(
        "import sys\ndef test_it():\n    assert 'vmexit.machine' not in sys.modules"
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)
