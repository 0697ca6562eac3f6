"""What all tests share: the accelerators of this machine, and a check that nothing is left open."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from resources import resources

ROOT = Path(__file__).resolve().parent.parent

_covered: Counter[str] = Counter()


def have_kvm() -> bool:
    """Whether /dev/kvm is there. Whether it works is for the tests to say."""
    return Path("/dev/kvm").exists()


# A file with the tests that need not run any more: what tools/test-lab starts a lab again for.
# Each example has as much time as its test: how fast this machine is, is nobody's error.
hypothesis.settings.register_profile("vmexit", deadline=None)
hypothesis.settings.load_profile("vmexit")

PASSED = os.environ.get("VMEXIT_LAB_PASSED", "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if PASSED and os.path.exists(PASSED):
        done = set(Path(PASSED).read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("accel") == "kvm":
            item.add_marker(pytest.mark.kvm)
        if item.get_closest_marker("kvm") and not have_kvm():
            item.add_marker(pytest.mark.skip(reason="no /dev/kvm on this machine"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if PASSED and report.when == "call" and report.passed:
        with open(PASSED, "a") as file:
            file.write(f"{report.nodeid}\n")
    if report.when == "call" and report.outcome != "skipped":
        for name in ("kvm", "soft"):
            # The mark, or the parameter `accel`; not a structure called kvm_regs.
            if name in report.keywords or re.search(rf"[\[-]{name}[\]-](?!lab)", report.nodeid):
                _covered[name] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    runs = ", ".join(f"{name} ({_covered[name]} tests)" for name in ("kvm", "soft"))
    terminalreporter.write_line(f"accelerators covered: {runs}")


@pytest.fixture(params=["kvm", "soft"])
def accel(request: pytest.FixtureRequest) -> str:
    """The test runs once on each accelerator."""
    name: str = request.param
    return name


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a descriptor, a vCPU thread or a mapping of a guest behind."""
    before = resources()
    yield
    assert resources() == before
