"""The mark for the tests of the tool, which run outside of the lab; and what the others share."""

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "integration")]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "lab_tool: tests of tools/kvm-lab itself, outside of the lab"
    )
