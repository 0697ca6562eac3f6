"""The mark for the tests of the tool, which run outside of the lab."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "lab_tool: tests of tools/kvm-lab itself, outside of the lab"
    )
