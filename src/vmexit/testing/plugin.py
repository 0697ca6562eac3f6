"""The fixtures, and what a report says of the machines of a test that failed."""

import fcntl
import os
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vmexit import Machine, Snapshot
    from vmexit.core.exit_stats import ExitStats

_ACCELERATORS = ("kvm", "soft")
_LINES = 30  # of the console
_ROWS = 10  # of exits

_machines = pytest.StashKey[list[tuple["Machine", "ExitStats"]]]()
_chosen = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("vmexit").addoption(
        "--vm-accel",
        choices=("both", "auto", *_ACCELERATORS),
        default="both",
        help="the accelerator of the fixtures vm and booted (default: a test for each; "
        "auto: KVM where it can run kernels, else the software CPU)",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name, text in (("kvm", "on KVM"), ("soft", "on the software CPU")):
        config.addinivalue_line("markers", f"{name}: a test with a machine {text} (vmexit)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vm_accel" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--vm-accel")
        if wanted == "auto":
            wanted = _auto(metafunc.config)
        names = _ACCELERATORS if wanted == "both" else (wanted,)
        marks = {name: getattr(pytest.mark, name) for name in names}
        params = [pytest.param(name, marks=marks[name]) for name in names]
        metafunc.parametrize("vm_accel", params, indirect=True, scope="session")


def _auto(config: pytest.Config) -> str:
    """What `accel="auto"` takes here for a kernel; found out once."""
    if _chosen not in config.stash:
        from vmexit import Machine

        with Machine("1M", machine="microvm") as machine:
            config.stash[_chosen] = machine.accel
    return config.stash[_chosen]


@pytest.fixture(scope="session")
def vm_accel(request: pytest.FixtureRequest) -> str:
    """`kvm` or `soft`: a test that uses it runs on each, and has a mark of that name."""
    name: str = request.param
    if name == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is not there, or may not be opened")
    return name


@pytest.fixture
def vm_options() -> Mapping[str, object]:
    """To be overridden: the arguments of `vmexit.Machine` for the fixture `vm`."""
    return {}


@pytest.fixture
def vm(
    request: pytest.FixtureRequest, vm_accel: str, vm_options: Mapping[str, object]
) -> Iterator["Machine"]:
    """A machine of its own for each test, on each accelerator; `vm_options` say which."""
    from vmexit import ExitStats, Machine

    stats = ExitStats()
    options = {"serial": "null", **vm_options}
    with Machine(accel=vm_accel, observer=stats, **options) as machine:  # type: ignore[arg-type]
        _remember(request, machine, stats)
        yield machine


@pytest.fixture(scope="session")
def vm_boot() -> Mapping[str, object]:
    """To be overridden: the arguments of `vmexit.Machine` for `boot_snapshot`.

    And `until`, the text on the console that shows that it is up (default `# `, of a shell), with
    `timeout` in seconds (default 120).
    """
    raise pytest.UsageError(
        "there is nothing to boot; have a fixture vm_boot, of scope session, that returns "
        "{'kernel': …, 'initrd': …, 'append': …, 'until': …}"
    )


@pytest.fixture(scope="session")
def boot_snapshot(
    vm_accel: str, vm_boot: Mapping[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Snapshot"]:
    """What `vm_boot` describes, up: booted once in a session, and once for all workers of xdist."""
    from vmexit import Snapshot

    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        with _boot(vm_accel, vm_boot) as snapshot:
            yield snapshot
        return
    folder = tmp_path_factory.getbasetemp().parent
    saved = folder / f"vmexit-{vm_accel}"
    with (folder / "vmexit.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not saved.exists():
            with _boot(vm_accel, vm_boot) as snapshot:
                snapshot.save(saved)
    with Snapshot.load(saved) as snapshot:
        yield snapshot


@pytest.fixture
def booted(request: pytest.FixtureRequest, boot_snapshot: "Snapshot") -> Iterator["Machine"]:
    """A clone of `boot_snapshot` for each test: up, paused, and the test's own."""
    from vmexit import ExitStats

    stats = ExitStats()
    with boot_snapshot.clone(observer=stats) as machine:
        _remember(request, machine, stats)
        yield machine


def _boot(accel: str, boot: Mapping[str, object]) -> "Snapshot":
    from vmexit import Machine

    options = {"serial": "null", **boot}
    until, timeout = str(options.pop("until", "# ")), float(str(options.pop("timeout", 120)))
    with Machine(accel=accel, **options) as machine:  # type: ignore[arg-type]
        machine.console.expect(until, timeout)
        return machine.snapshot()


def _remember(request: pytest.FixtureRequest, machine: "Machine", stats: "ExitStats") -> None:
    request.node.stash.setdefault(_machines, []).append((machine, stats))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.failed:
        for machine, stats in item.stash.get(_machines, []):
            report.sections += _sections(machine, stats)
    return report


def _sections(machine: "Machine", stats: "ExitStats") -> Iterator[tuple[str, str]]:
    """What there is to say of a machine, while it is there."""
    from vmexit import VmexitError

    name = repr(machine)
    try:
        with machine.paused():
            yield f"{name}: exits", stats.table(_ROWS)
            for vcpu in range(len(machine.vcpus)):
                yield f"{name}: vCPU {vcpu}", machine.dump(vcpu)
            lines = machine.console.output.splitlines()[-_LINES:]
            yield f"{name}: the end of the console", "\n".join(lines)
    except VmexitError as error:
        yield f"{name}", f"nothing more can be said of it: {error}"
