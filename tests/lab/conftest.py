"""The mark for the tests of the tool, which run outside of the lab; and what the others share."""

import os
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "integration")]

# A file with the tests that need not run any more: what tools/test-lab starts a lab again for.
PASSED = os.environ.get("VMEXIT_LAB_PASSED", "")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "lab_tool: tests of tools/kvm-lab itself, outside of the lab"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if PASSED and os.path.exists(PASSED):
        done = set(Path(PASSED).read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if PASSED and report.when == "call" and report.passed:
        with open(PASSED, "a") as file:
            file.write(f"{report.nodeid}\n")
