"""Clones, one after the other: all end alike, and none leaves anything behind in this process."""

import gc
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from test_delivery import TCG

from guests import COUNT_AT, FOLDER, GUESTS
from vmexit import Machine, StopReason
from vmexit.machine.snapshot import Snapshot

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_left")]

TIMEOUT = 60
SIZE = 2 << 20
KIB = 1 << 10
# So many KiB of memory may be lost at each clone; a machine has hundreds.
LOST = 2

SERIAL, COUNTED = 0x3F8, 0x10
# By the port at whose first access the snapshot is taken. Neither of them looks at a clock.
PLACES = {"ring3-out": COUNTED, "strings": SERIAL, "long-hello": SERIAL}


class Used(NamedTuple):
    """By this process; memory of its own in KiB."""

    descriptors: int
    threads: int
    mappings: int
    memory: int


def used() -> Used:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    descriptors, threads = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
    maps = Path("/proc/self/maps").read_text().count("\n")
    return Used(descriptors, threads, maps, int(status["RssAnon"].split()[0]))


def end_of(snapshot: Snapshot) -> tuple[object, ...]:
    """How a clone ends: why, all registers, and memory."""
    with snapshot.clone() as clone:
        stop = clone.run(TIMEOUT)
        vcpu = clone.vcpus[0]
        return stop, vcpu.regs.as_dict(), vcpu.fpu, clone.memory.read(0, SIZE)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.timeout(600)
def test_all_clones_end_alike(accel, name, count):
    if accel == "kvm" and TCG and name == "ring3-out":
        pytest.skip("QEMU's TCG, below this KVM, takes a busy TSS for none: it has no I/O bitmap")
    with Machine("2M", accel, image=FOLDER / f"{name}.bin", mode=GUESTS[name], serial="null") as vm:
        vm.memory.write_u32(COUNT_AT, 50)
        assert vm.run_until(pio=PLACES[name], timeout=TIMEOUT).reason is StopReason.UNTIL
        with vm.snapshot() as snapshot:
            expected = end_of(snapshot)
            assert expected[0].reason in (StopReason.HALT, StopReason.DEBUG_EXIT)
            for _ in range(20):  # what is loaded and kept the first times
                end_of(snapshot)
            before = used()
            for number in range(count):
                assert end_of(snapshot) == expected, number
            after = used()
    assert after[:2] == before[:2]
    assert after.mappings - before.mappings < 20
    assert after.memory - before.memory < count * LOST + 2048
