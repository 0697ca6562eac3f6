"""The public names of the package: all there, each what it is where it is defined, loaded late."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vmexit


@pytest.mark.parametrize("name", vmexit.__all__)
def test_every_public_name_is_there(name):
    value = getattr(vmexit, name)
    if name != "__version__":
        assert value.__name__ == name
    assert name in dir(vmexit)


def test_what_type_checkers_see_is_what_there_is():
    text = Path(vmexit.__file__).read_text()
    block = text[text.index("if TYPE_CHECKING:") : text.index("__version__ =")]
    seen = {}
    for home, names in re.findall(r"from (\S+) import (\([^)]*\)|[^\n]*)", block):
        for name in re.findall(r"\w+", names):
            seen[name] = home
    assert seen == vmexit._HOME
    assert {*seen, "__version__"} == set(vmexit.__all__)


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="'vmexit' has no attribute 'machine_'"):
        _ = vmexit.machine_


def test_the_abi_alone_loads_no_machine_and_the_kvm_accelerator_no_unicorn():
    program = (
        "import sys, vmexit.abi.kvm; assert 'vmexit.machine' not in sys.modules;"
        "import vmexit; vmexit.Machine; import vmexit.accel.kvm.system;"
        "assert 'unicorn' not in sys.modules and 'capstone' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
