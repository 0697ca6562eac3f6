"""Where the tests are that belong into the KVM lab."""

import os

import pytest

IN_LAB = os.environ.get("VMEXIT_IN_LAB") == "1"

in_lab = pytest.mark.skipif(not IN_LAB, reason="not in the KVM lab: make test-lab")

# A Linux guest on KVM, in the lab.
linux_in_lab = [pytest.mark.kvm, pytest.mark.linux, pytest.mark.timeout(300), in_lab]
