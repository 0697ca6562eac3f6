"""What the tests of whole machines share."""

from collections.abc import Iterator

import pytest

from vmexit import Machine


@pytest.fixture
def machine(accel: str) -> Iterator[Machine]:
    """A machine with 1 MiB and nothing loaded, on each accelerator."""
    with Machine("1M", accel) as vm:
        yield vm
