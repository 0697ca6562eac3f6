"""The threads of vCPUs begin with the first run, or do not begin at all."""

import os
import threading
from pathlib import Path

import pytest

from vmexit import HostError, Machine, Snapshot, StopReason
from vmexit.core import threads
from vmexit.core.threads import start_without_signals

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
        monkeypatch.setattr(threads, "start_without_signals", Failing(number, error, after=after))
        with pytest.raises(expected):
            vm.run(timeout=20)
        monkeypatch.undo()
        assert vcpu_threads() == []
        vm.reset()
        assert vm.run(timeout=60).reason is StopReason.DEBUG_EXIT
        assert len(vcpu_threads()) == (3 if accel == "kvm" else 1)
    assert vcpu_threads() == []


def run_clone(snapshot: Snapshot) -> tuple[Machine, list[int]]:
    """A clone that has run to its end, and the threads that ran it."""
    clone = snapshot.clone()
    assert clone.run(timeout=60).reason is StopReason.DEBUG_EXIT
    count = 3 if clone.accel == "kvm" else 1
    return clone, [clone.thread_id(vcpu) for vcpu in range(count)]


def test_a_clone_has_the_threads_of_one_that_was_closed(accel):
    with machine(accel, 3) as vm, vm.snapshot() as snapshot:
        first, threads_of_first = run_clone(snapshot)
        second, threads_of_second = run_clone(snapshot)
        first.close()
        third, threads_of_third = run_clone(snapshot)
        for clone in (second, third):
            clone.close()
    # On KVM one of them may still be taking the first one apart.
    new = set(threads_of_third) - set(threads_of_first)
    assert len(new) <= (1 if accel == "kvm" else 0)
    assert not set(threads_of_second) & set(threads_of_first)


def test_a_clone_that_outlives_its_snapshot_ends_its_threads(accel):
    with machine(accel, 3) as vm:
        with vm.snapshot() as snapshot:
            closed, _ = run_clone(snapshot)
            clone, _ = run_clone(snapshot)
            closed.close()
        clone.reset()
        assert clone.run(timeout=60).reason is StopReason.DEBUG_EXIT
        clone.close()
        assert vcpu_threads() == []


def test_a_thread_that_cannot_begin_in_a_clone_leaves_the_others_to_the_next(accel, monkeypatch):
    if accel == "soft":
        pytest.skip("its vCPUs share a thread")
    with machine(accel, 3) as vm, vm.snapshot() as snapshot, snapshot.clone() as clone:
        failing = Failing(3, RuntimeError("can't start new thread"))
        monkeypatch.setattr(threads, "start_without_signals", failing)
        with pytest.raises(HostError, match="cannot start a thread"):
            clone.run(timeout=20)
        assert vcpu_threads() == []
        clone.reset_to(snapshot)
        monkeypatch.undo()
        assert clone.run(timeout=60).reason is StopReason.DEBUG_EXIT


def test_a_clone_is_taken_apart_while_the_next_one_is_made(accel):
    """KVM takes some milliseconds for its interrupt controllers; nobody waits, nothing is left."""
    with machine(accel, 3) as vm, vm.snapshot() as snapshot:
        before = len(os.listdir("/proc/self/fd"))
        most = 0
        for _ in range(40):
            clone, _ = run_clone(snapshot)
            clone.close()
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
    assert most <= threads._MOST_BUSY
