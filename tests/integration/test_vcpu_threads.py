"""The threads of vCPUs begin with the first run, or do not begin at all."""

import threading
from pathlib import Path

import pytest

from vmexit import HostError, Machine, StopReason
from vmexit.core.threads import start_without_signals
from vmexit.machine import runner

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_left")]

SMP = Path(__file__).resolve().parents[2] / "guests" / "smp.bin"


class Failing:
    """In the place of `start_without_signals()`: the thread with this number does not begin."""

    def __init__(self, number: int, error: BaseException, *, after: bool = False) -> None:
        """`after`: it has begun all the same, as when the handler of a signal raises."""
        self.left = number
        self.error = error
        self.after = after

    def __call__(self, thread: threading.Thread) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        start_without_signals(thread)
        if self.left == 0:
            raise self.error


def vcpu_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("vmexit-vcpu")]


def machine(accel: str, cpus: int) -> Machine:
    image: dict[str, object] = {"machine": "microvm"} if cpus > 1 else {}
    return Machine("1M", accel, image=SMP, mode="protected", smp=cpus, **image)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    ("error", "after", "expected"),
    [
        (RuntimeError("can't start new thread"), False, HostError),
        (KeyboardInterrupt(), False, KeyboardInterrupt),
        (KeyboardInterrupt(), True, KeyboardInterrupt),
    ],
    ids=["refused", "interrupted before", "interrupted after"],
)
def test_a_thread_that_cannot_begin_ends_the_run(
    accel, monkeypatch, number, error, after, expected
):
    """None is left, and the next run begins anew."""
    if accel == "soft" and number > 1:
        pytest.skip("its vCPUs share a thread")
    with machine(accel, 3) as vm:
        monkeypatch.setattr(runner, "start_without_signals", Failing(number, error, after=after))
        with pytest.raises(expected):
            vm.run(timeout=20)
        monkeypatch.undo()
        assert vcpu_threads() == []
        vm.reset()
        assert vm.run(timeout=60).reason is StopReason.DEBUG_EXIT
        assert len(vcpu_threads()) == (3 if accel == "kvm" else 1)
    assert vcpu_threads() == []
