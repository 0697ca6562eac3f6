"""Snapshots: going back, clones, folders. A guest goes on as it would have gone on."""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from command import assert_one_line, vmexit

from vmexit import (
    ConfigError,
    JsonTrace,
    Machine,
    Point,
    RunState,
    Snapshot,
    StopReason,
    VmexitError,
)

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_left")]

TIMEOUT = 30

# 16-bit: xor ax, ax; 2: inc ax; 3: mov [0x3000], ax; 6: mov bx, [0x3000]; a: out 0x10, al;
# c: cmp ax, 1000; f: jb 2; 11: hlt
COUNTER = bytes.fromhex("31c0 40 a30030 8b1e0030 e610 3de803 72f1 f4")
COUNT = 0x3000
SMP = Path(__file__).resolve().parents[2] / "guests" / "smp.bin"


@contextlib.contextmanager
def stopped_at(accel: str, count: int):
    """The counter, paused behind the write to the port that has made it `count`."""
    with Machine("2M", accel) as vm:
        vm.load_bytes(COUNTER, at=0x1000)
        stop_at(vm, count)
        assert vm.run(TIMEOUT).reason is StopReason.STOPPED
        yield vm


def stop_at(vm: Machine, count: int) -> None:
    vm.on_pio(0x10, write=lambda a: a.value == count & 0xFF and vm.stop())


def finish(vm: Machine) -> int:
    while (stop := vm.run(TIMEOUT)).reason is StopReason.STOPPED:
        pass
    assert stop.reason is StopReason.HALT, stop
    assert vm.vcpus[0].regs.rbx == vm.memory.read_u16(COUNT)
    return vm.vcpus[0].regs.rax


def test_a_clone_goes_on_by_itself(accel):
    with stopped_at(accel, 100) as vm, vm.snapshot() as snap:
        assert snap.accel == accel
        with snap.clone() as one, snap.clone() as other:
            assert (one.accel, one.state) == (accel, RunState.CREATED)
            assert one.vcpus[0].regs.as_dict() == vm.vcpus[0].regs.as_dict()
            other.memory.write_u16(0x4000, 0x1234)
            assert finish(one) == 1000
            assert [m.memory.read_u16(COUNT) for m in (vm, one, other)] == [100, 1000, 100]
            assert [m.memory.read_u16(0x4000) for m in (vm, one, other)] == [0, 0, 0x1234]
            assert finish(vm) == 1000
            stop_at(other, 200)
            assert other.run(TIMEOUT).reason is StopReason.STOPPED
            assert other.memory.read_u16(COUNT) == 200


def test_a_clone_has_what_the_guest_wrote_over_its_firmware(accel, tmp_path):
    """The firmware's copy below 1 MiB is RAM, which programs write to."""
    rom = bytearray(b"\xf4" * 0x2_0000)
    # mov ax, 0xf000; mov ds, ax; mov word [0x100], 0x1234; out 0x10, al
    code = bytes.fromhex("b800f0 8ed8 c70600013412 e610")
    rom[0x1_0000 : 0x1_0000 + len(code)] = code
    rom[0x1_FFF0:0x1_FFF5] = bytes.fromhex("ea000000f0")  # jmp 0xf000:0
    (tmp_path / "rom").write_bytes(rom)
    with Machine("2M", accel, firmware=tmp_path / "rom") as vm:
        vm.on_pio(0x10, write=lambda access: vm.stop())
        assert vm.run(TIMEOUT).reason is StopReason.STOPPED
        assert vm.memory.read_u16(0xF_0100) == 0x1234
        with vm.snapshot() as snap, snap.clone() as twin:
            assert twin.memory.read(0, 2 << 20) == vm.memory.read(0, 2 << 20)


def test_clones_outlive_the_snapshot_and_the_machine(accel):
    with stopped_at(accel, 100) as vm:
        snap = vm.snapshot()
        clone = snap.clone()
        snap.close()
        with pytest.raises(VmexitError, match="this snapshot is closed"):
            snap.clone()
    with clone:
        assert finish(clone) == 1000


def test_a_signal_while_it_is_closed_keeps_no_memory(accel, monkeypatch):
    """To end threads takes a moment, in which Ctrl-C may come; `nothing_left` looks for memory."""
    with stopped_at(accel, 5) as vm:
        snapshot = vm.snapshot()
        with snapshot.clone() as clone:
            clone.run(timeout=20)
        monkeypatch.setattr(snapshot.workers, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            snapshot.close()
        monkeypatch.undo()
        assert snapshot._contents.memory.fd < 0
        snapshot.workers.close()


def interrupted():
    raise KeyboardInterrupt


def test_going_back_again_and_again(accel):
    with stopped_at(accel, 100) as vm, vm.snapshot() as snap:
        before = vm.vcpus[0].regs.as_dict(), vm.memory.read(0, 2 << 20)
        for _ in range(20):
            assert finish(vm) == 1000
            vm.memory.write(0x10_0000, b"x" * 0x4000)
            vm.reset_to(snap)
            assert (vm.vcpus[0].regs.as_dict(), vm.memory.read(0, 2 << 20)) == before
            assert vm.last_stop is None


# 64-bit: 0: out 0x10, al; rdi = 2 MiB; ecx = [0x800]; then cl to each second page, ecx times,
# counting down; out 0x11, al; jmp 0
WRITES_PAGES = bytes.fromhex(
    "e610 48c7c700002000 8b0c2500080000 85c9 740d 880f 4881c700200000 ffc9 ebef e611 ebdb"
)


def test_going_back_undoes_what_the_guest_and_the_host_wrote(accel):
    with Machine("16M", accel) as vm:
        vm.load_bytes(WRITES_PAGES, at=0x1000, mode="long")
        vm.memory.write_u32(0x800, 700)
        for port in (0x10, 0x11):
            vm.on_pio(port, write=lambda access: None)
        assert vm.run_until(pio=0x10, timeout=60).reason is StopReason.UNTIL
        with vm.snapshot() as first:
            before, registers = vm.memory.read(0, 16 << 20), vm.vcpus[0].regs.as_dict()
            for number in range(6):
                assert vm.run_until(pio=0x11, timeout=60).reason is StopReason.UNTIL
                assert vm.memory.read_u8((2 << 20) + 699 * 8192) == 1
                vm.memory.write(0x300000 + number * 0x1000, b"by the host")
                vm.memory[0x400000:0x400004] = b"view"
                vm.reset_to(first)
                assert vm.memory.read(0, 16 << 20) == before
                assert vm.vcpus[0].regs.as_dict() == registers
            vm.run_until(pio=0x11, timeout=60)
            with vm.snapshot() as second:
                after = vm.memory.read(0, 16 << 20)
                for snapshot, memory in ((first, before), (second, after), (second, after)) * 2:
                    vm.run_until(pio=0x11, timeout=60)
                    vm.reset_to(snapshot)
                    assert vm.memory.read(0, 16 << 20) == memory


def test_a_later_snapshot_holds_what_was_written_since(accel):
    with stopped_at(accel, 100) as vm, vm.snapshot() as first:
        vm.memory.write(0x10_0000, b"later")
        assert vm.run(TIMEOUT).reason is StopReason.STOPPED  # the next time the low byte is that
        with vm.snapshot() as second:
            assert finish(vm) == 1000
            for snap, count, text in ((first, 100, bytes(5)), (second, 356, b"later")) * 2:
                vm.reset_to(snap)
                assert (vm.memory.read_u16(COUNT), vm.memory.read(0x10_0000, 5)) == (count, text)
                with snap.clone() as clone:
                    assert clone.memory.read_u16(COUNT) == count
                    assert clone.memory.read(0x10_0000, 5) == text
                    assert finish(clone) == 1000


def test_a_reset_of_a_clone_begins_where_the_machine_began(accel):
    with stopped_at(accel, 100) as vm, vm.snapshot() as snap, snap.clone() as clone:
        clone.memory.write(0x10_0000, b"x")
        clone.reset()
        assert clone.memory.read(0x10_0000, 1) == bytes(1)
        assert clone.memory.read_u16(COUNT) == 0
        assert finish(clone) == 1000


def test_a_machine_that_runs_is_paused_for_it_and_goes_on(accel):
    with Machine("2M", accel) as vm:
        vm.load_bytes(bytes.fromhex("40 a30030 ebfa"), at=0x1000)  # inc ax; mov [0x3000], ax; jmp
        vm.start()
        with vm.snapshot() as snap, snap.clone() as clone:
            assert vm.state is RunState.RUNNING
            count = clone.memory.read_u16(COUNT)
            assert clone.vcpus[0].regs.rax & 0xFFFF in (count, count + 1 & 0xFFFF)
            vm.reset_to(snap)
            assert vm.state is RunState.RUNNING
        vm.stop()
        assert vm.wait(TIMEOUT).reason is StopReason.STOPPED


# What guests/smp.S says: two vCPUs count to 2 * 2000 together, in a loop with a lock.
STARTED, GO_ON, COUNTED, ROUNDS = 0x6000, 0x6004, 0x6008, 2000


def smp(accel: str) -> Machine:
    vm = Machine("1M", accel, machine="microvm", smp=2, image=SMP, mode="protected", serial="null")
    vm.memory.write_u32(STARTED, 1)
    return vm


def test_several_vcpus_with_their_interrupt_controllers(accel):
    """Stopped at some moment, whatever they do then: the start-up interrupt included."""
    with smp(accel) as vm:
        snaps = []
        try:
            stop = None
            while stop is None or stop.reason is StopReason.TIMEOUT:
                stop = vm.run(timeout=0.002)
                if len(snaps) < 8 and stop.reason is StopReason.TIMEOUT:
                    snaps.append(vm.snapshot())
            assert (stop.reason, stop.value) == (StopReason.DEBUG_EXIT, 0x21)
            for snap in snaps:
                with snap.clone() as clone:
                    stop = clone.run(TIMEOUT)
                    assert (stop.reason, stop.value) == (StopReason.DEBUG_EXIT, 0x21), stop
                    assert clone.memory.read_u32(COUNTED) == 2 * ROUNDS
                vm.reset_to(snap)
                assert vm.run(TIMEOUT).value == 0x21
                assert vm.memory.read_u32(COUNTED) == 2 * ROUNDS
        finally:
            for snap in snaps:
                snap.close()


def test_a_snapshot_of_another_machine_is_refused(accel):
    with stopped_at(accel, 100) as vm, vm.snapshot() as snap:
        for options, why in (
            ({"memory": "1M"}, "laid out otherwise"),
            ({"memory": "2M", "serial": "null"}, "only this machine has 'serial'"),
            ({"memory": "2M", "machine": "microvm", "smp": 2}, "has 1 vCPUs, and this machine 2"),
        ):
            with Machine(accel=accel, **options) as other, pytest.raises(ConfigError, match=why):
                other.reset_to(snap)


# Folders.

OTHER_PROCESS = """
import sys
from vmexit import Snapshot
with Snapshot.load(sys.argv[1]) as snap, snap.clone() as vm:
    print(vm.memory.read_u16(0x3000), vm.run(30).reason.value, vm.memory.read_u16(0x3000))
"""


def test_a_saved_one_goes_on_in_another_process(accel, tmp_path):
    folder = tmp_path / "snap"
    with stopped_at(accel, 100) as vm, vm.snapshot() as snap:
        snap.save(folder)
    assert os.listdir(tmp_path) == ["snap"]
    assert os.stat(folder / "memory").st_size == 2 << 20
    assert os.stat(folder / "memory").st_blocks * 512 < 1 << 16  # holes for the rest
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", OTHER_PROCESS, folder],
            env=os.environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.split() == ["100", "halt", "1000"], done.stderr


def test_a_loaded_one_is_as_the_one_that_was_saved(accel, tmp_path):
    counts = SMP.read_bytes().index(bytes.fromhex("f0ff0508600000"))  # lock inc dword ptr [0x6008]
    with smp(accel) as vm:
        vm.add_breakpoint(Point(counts))
        assert vm.run(TIMEOUT).reason is StopReason.DEBUG
        vm.remove_breakpoint(Point(counts))
        with vm.snapshot() as snap:
            snap.save(tmp_path / "a")
            with Snapshot.load(tmp_path / "a") as again:
                assert (again.config, again.taken) == (
                    snap.config._replace(image=str(SMP)),
                    snap.taken,
                )
                again.save(tmp_path / "b")
                vm.reset_to(again)
            assert vm.run(TIMEOUT).value == 0x21
    for name in ("memory", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_a_program_has_loaded_may_be_large(tmp_path):
    data = os.urandom(1 << 20) * 200
    with Machine("256M", "soft") as vm:
        vm.load_bytes(COUNTER, at=0x1000)
        vm.load_bytes(data, at=0x100000)
        vm.memory.write(0x100000, b"the guest")
        with vm.snapshot() as snap:
            snap.save(tmp_path / "snap")
    assert (tmp_path / "snap/state.json").stat().st_size < 1 << 20
    with Snapshot.load(tmp_path / "snap") as snap, snap.clone() as twin:
        assert twin.memory.read(0x100000, 9) == b"the guest"
        twin.reset()
        assert twin.memory.read(0x100000, len(data)) == data


@pytest.fixture
def chain(tmp_path):
    """Three in a row, the memory of each, and how much its folder takes."""
    memories, sizes = [], []
    with Machine("64M", "soft") as vm:
        vm.load_bytes(COUNTER, at=0x1000)
        vm.memory.write(16 << 20, os.urandom(8 << 20))
        vm.memory.write(32 << 20, b"goes away" * 1000)
        for number in range(3):
            vm.memory.write((17 << 20) + number * 8192, b"of this one")
            if number == 1:
                vm.memory.write(32 << 20, bytes(9000))
            parent = tmp_path / f"snap{number - 1}" if number else None
            with vm.snapshot() as snap:
                snap.save(tmp_path / f"snap{number}", parent=parent)
            memories.append(vm.memory.read(0, 64 << 20))
            sizes.append((tmp_path / f"snap{number}/memory").stat().st_blocks * 512)
    return tmp_path, memories, sizes


def test_a_child_has_what_has_changed_only(chain, tmp_path):
    folder, memories, sizes = chain
    assert sizes[0] >= 8 << 20 and max(sizes[1:]) <= 64 << 10
    (tmp_path / "elsewhere").mkdir()
    for number, memory in enumerate(memories):
        (folder / f"snap{number}").rename(tmp_path / f"elsewhere/snap{number}")
        with Snapshot.load(tmp_path / f"elsewhere/snap{number}") as snap, snap.clone() as twin:
            assert twin.memory.read(0, 64 << 20) == memory
            twin.on_pio(0x10, write=lambda access: None)
            assert twin.run(TIMEOUT).reason is StopReason.HALT


def test_progress_with_a_parent_ends_with_all_of_it(chain):
    """What only the parent has is to be written, too, as zeros."""
    folder, _, _ = chain
    told = []
    with Machine("64M", "soft") as vm, vm.snapshot() as snap:
        snap.save(folder / "zeros", lambda *now: told.append(now), parent=folder / "snap2")
    done, total = told[-1]
    assert done == total >= 8 << 20
    with Snapshot.load(folder / "zeros") as snap, snap.clone() as twin:
        assert not any(twin.memory.read(0, 64 << 20))


def test_a_child_without_its_parent_is_refused(chain, tmp_path):
    folder, _, _ = chain
    (folder / "snap0").rename(folder / "gone")
    with pytest.raises(ConfigError, match=r"snap1.* needs its parent .*snap0.*No such file"):
        Snapshot.load(folder / "snap2")
    with Machine("64M", "soft") as vm, vm.snapshot() as snap:
        snap.save(folder / "snap0")
        with pytest.raises(ConfigError, match=r"snap0.* is not the parent that .*snap1"):
            Snapshot.load(folder / "snap1")
    with Machine("32M", "soft") as vm, vm.snapshot() as snap:
        with pytest.raises(ConfigError, match="use a parent of the same machine"):
            snap.save(folder / "other", parent=folder / "gone")
        with pytest.raises(ConfigError, match="cannot be read as a snapshot"):
            snap.save(folder / "other", parent=folder / "nothing")
    assert not (folder / "other").exists()


def test_a_snapshot_that_is_its_own_parent_ends(saved, tmp_path):
    folder = forged(saved, tmp_path / "snap", parent={"path": "snap", "sha256": "0" * 64})
    with pytest.raises(ConfigError, match="is not the parent that"):
        Snapshot.load(folder)
    for parent in (5, {}, {"path": 5, "sha256": ""}, {"path": "a\0", "sha256": ""}):
        folder = forged(saved, tmp_path / f"snap{len(list(tmp_path.iterdir()))}", parent=parent)
        with pytest.raises(ConfigError):
            Snapshot.load(folder)


def test_what_is_there_already_is_left_alone(accel, tmp_path):
    (tmp_path / "there").mkdir()
    with stopped_at(accel, 100) as vm, vm.snapshot() as snap:
        with pytest.raises(ConfigError, match="exists already; use another path"):
            snap.save(tmp_path / "there")
        with pytest.raises(VmexitError, match="No such file or directory; use another path"):
            snap.save(tmp_path / "no" / "such")
    assert os.listdir(tmp_path) == ["there"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "snap"
    with Machine("2M", "soft") as vm:
        vm.load_bytes(COUNTER, at=0x1000)
        with vm.snapshot() as snap:
            snap.save(folder)
    return folder


def damage(saved: Path, to: Path, name: str, change) -> Path:
    to.mkdir()
    for file in saved.iterdir():
        data = file.read_bytes()
        (to / file.name).write_bytes(change(data) if file.name == name else data)
    return to


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("state.json", lambda d: d[:-9], "damaged: state.json is not what was written"),
        ("state.json", lambda d: d.replace(b'"soft"', b'"SOFT"'), "damaged: state.json"),
        ("state.json", lambda d: b"", "cannot be read as a snapshot: its state.json is damaged"),
        ("loaded", lambda d: d[:-1], "damaged: loaded is not what was written"),
        ("loaded", lambda d: d[::-1], "damaged: loaded is not what was written"),
        ("state.json", lambda d: b"\x7fELF" + d, "cannot be read as a snapshot"),
        ("state.json", lambda d: b"[" * 500, "cannot be read as a snapshot"),
        ("state.json", lambda d: b"{}\n{}", "is no snapshot of vmexit"),
        ("state.json", lambda d: d.replace(b'"version": 2', b'"version": 1', 1), "an older vmexit"),
        ("state.json", lambda d: d.replace(b'"version": 2', b'"version": 3', 1), "has version 3"),
        ("memory", lambda d: d[:0x1000], "damaged: memory is not what was written"),
        ("memory", lambda d: d.replace(COUNTER[:5], b"OTHER"), "damaged: memory"),
    ],
)
def test_what_is_damaged_or_foreign_is_refused(saved, tmp_path, name, change, why):
    with pytest.raises(ConfigError, match=why) as found:
        Snapshot.load(damage(saved, tmp_path / "bad", name, change))
    assert "\n" not in str(found.value) and ";" in str(found.value)


def forged(saved: Path, to: Path, **fields: object) -> Path:
    """With a right checksum, by somebody who means it."""
    import hashlib

    def change(data: bytes) -> bytes:
        head, _, text = data.partition(b"\n")
        text = json.dumps(json.loads(text) | fields).encode()
        start = json.loads(head) | {"sha256": hashlib.sha256(text).hexdigest()}
        return json.dumps(start).encode() + b"\n" + text

    return damage(saved, to, "state.json", change)


@pytest.mark.parametrize(
    "fields",
    [
        {"config": 5}, {"config": {"memory": "x"}}, {"config": {"nothing": 1}}, {"vcpus": {}},
        {"config": {"memory": -4096}}, {"memory": [[0, 1 << 40, 0]]}, {"memory": [[-4096, 1, 0]]},
        {"memory": [[0, 1]]}, {"memory": 7}, {"disks": {"../x": {}}}, {"disks": {"disk0": {}}},
        {"loaded": {}}, {"taken": "now"}, {"devices": []}, {"roms": {"0x0": 1}},
        {"loaded": {"pieces": [[0, 1]], "entry": 0, "mode": "real", "image": [0, 0]}},
    ],
)  # fmt: skip
def test_what_nobody_has_saved_is_refused(saved, tmp_path, fields):
    with pytest.raises(VmexitError) as found:
        Snapshot.load(forged(saved, tmp_path / "bad", **fields))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "fields",
    [{"vcpus": []}, {"vcpus": [{}]}, {"vm": {}}, {"devices": {}}, {"roms": {"0x0": "00"}},
     {"accel": "kvm"}, {"accel": "none"}, {"devices": {"disk0": {}}}],
)  # fmt: skip
def test_a_state_that_no_machine_has_is_refused(saved, tmp_path, fields):
    snap = Snapshot.load(forged(saved, tmp_path / "bad", **fields))
    with snap, pytest.raises(VmexitError) as found:
        snap.clone()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"shares": ["x=/tmp,virtiofsd=/bin/true"]}, {"drives": ["vhost-user:/tmp/s"]},
        {"debugcon": []}, {"kernel": 5}, {"firmware": {}}, {"image": 1.5},
    ],
)  # fmt: skip
def test_a_machine_that_nobody_can_have_saved_is_refused(saved, tmp_path, changes):
    """Above all one that would start somebody's program."""
    config = json.loads((saved / "state.json").read_text().partition("\n")[2])["config"]
    if "shares" in changes or "drives" in changes:
        config["machine"] = "microvm"
    folder = forged(saved, tmp_path / "bad", config=config | changes)
    with pytest.raises(ConfigError, match=r"damaged: state\.json"):
        Snapshot.load(folder)
    assert_one_line(vmexit("run", "--restore", folder), 2, "damaged: state.json")


def test_a_pipe_in_the_place_of_a_file_waits_for_nobody(tmp_path):
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(ConfigError, match="cannot be read as a snapshot"):
        Snapshot.load(tmp_path)


def test_a_machine_that_is_half_of_another_one_does_not_run(saved, tmp_path):
    with (
        Snapshot.load(forged(saved, tmp_path / "bad", vm={})) as bad,
        Snapshot.load(saved) as good,
        Machine("2M", "soft") as vm,
    ):
        vm.load_bytes(COUNTER, at=0x1000)
        vm.on_pio(0x10, write=lambda access: None)
        for again in (lambda: vm.reset_to(good), vm.reset):
            with pytest.raises(ConfigError):
                vm.reset_to(bad)
            with pytest.raises(VmexitError, match="going back failed half-way; reset"):
                vm.run(TIMEOUT)
            again()
            assert vm.run(TIMEOUT).reason is StopReason.HALT


def test_who_asks_what_memory_is_in_use_is_not_disturbed(accel):
    with stopped_at(accel, 100) as vm, vm.snapshot() as snap:
        region, done, errors = vm.memory.regions[0], threading.Event(), []

        def ask():
            while not done.is_set():
                try:
                    vm.memory.in_use(region)
                except OSError as error:
                    errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        for _ in range(200):
            vm.reset_to(snap)
        done.set()
        asking.join()
        assert not errors


def test_where_a_machine_had_stopped_is_no_matter_after_going_back(accel):
    ways = []
    with Machine("2M", accel) as vm:
        vm.load_bytes(COUNTER, at=0x1000)
        vm.on_pio(0x10, write=lambda access: None)
        vm.add_breakpoint(Point(0x1006))
        assert vm.run(TIMEOUT).reason is StopReason.DEBUG
        with vm.snapshot() as snap:
            for elsewhere in (False, True):
                if elsewhere:
                    vm.remove_breakpoint(Point(0x1006))
                    assert vm.run(TIMEOUT).reason is StopReason.HALT
                    vm.add_breakpoint(Point(0x1006))
                vm.reset_to(snap)
                assert vm.run(TIMEOUT).reason is StopReason.DEBUG
                ways.append(vm.vcpus[0].regs.rax)
    assert ways[0] == ways[1]


# Disks and other devices.


def test_what_was_written_to_a_disk_goes_back_or_is_asked_for(tmp_path):
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    options = {"machine": "microvm", "memory": "16M", "accel": "soft"}
    own, aside = [f"file={disk}"], [f"file={copy(disk)},snapshot=on"]
    with (
        Machine(drives=own, **options) as vm,
        vm.snapshot() as snap,
        snap.clone(drives=aside) as twin,
    ):
        overlay = twin._parts.overlays["disk0"]
        overlay.write_from([memoryview(b"ZZZZ" * 128)], 0)
        twin.reset_to(snap)
        read = bytearray(512)
        overlay.read_into([memoryview(read)], 0)
        assert read == bytes(512)
    with Machine(drives=aside, **options) as vm:
        vm._parts.overlays["disk0"].write_from([memoryview(b"ZZZZ" * 128)], 0)
        with vm.snapshot() as snap, pytest.raises(ConfigError, match="use snapshot=on for it"):
            snap.clone(drives=own)


def test_a_disk_of_another_size_is_refused_before_anything_changes(tmp_path):
    disk, other = tmp_path / "disk.img", tmp_path / "other.img"
    disk.write_bytes(bytes(1 << 20))
    other.write_bytes(bytes(2 << 20))
    options = {"machine": "microvm", "memory": "16M", "accel": "soft"}
    with (
        Machine(drives=[f"file={disk},readonly=on"], **options) as vm,
        Machine(drives=[f"file={other},readonly=on"], **options) as larger,
        vm.snapshot() as snap,
    ):
        larger.load_bytes(COUNTER, at=0x1000)
        with pytest.raises(ConfigError, match=r"disk0.* 2097152 bytes, and had 1048576"):
            larger.reset_to(snap)
        with pytest.raises(ConfigError, match="disk0"):
            snap.clone(drives=[f"file={other},readonly=on"])
        assert larger.memory.read(0x1000, len(COUNTER)) == COUNTER
        larger.on_pio(0x10, write=lambda access: larger.stop())
        assert larger.run(TIMEOUT).reason is StopReason.STOPPED


def test_a_disk_of_another_program_is_refused_before_anything_changes(tmp_path):
    disk, qcow2 = tmp_path / "disk.img", tmp_path / "disk.qcow2"
    disk.write_bytes(bytes(1 << 20))
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", qcow2, "1M"], check=True)
    options = {"machine": "microvm", "memory": "16M", "accel": "soft"}
    with (
        Machine(drives=[f"file={disk},snapshot=on"], **options) as vm,
        Machine(drives=[f"file={qcow2},readonly=on"], **options) as other,
        vm.snapshot() as snap,
    ):
        other.load_bytes(COUNTER, at=0x1000)
        with pytest.raises(ConfigError, match=r"disk0 cannot be restored: .*use a raw image"):
            other.reset_to(snap)
        assert not other.memory.private
        other.on_pio(0x10, write=lambda access: other.stop())
        assert other.run(TIMEOUT).reason is StopReason.STOPPED


def test_a_disk_that_the_guest_writes_to_is_refused(tmp_path):
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    options = {"machine": "microvm", "memory": "16M", "accel": "soft"}
    with Machine(drives=[f"file={disk}"], **options) as vm, vm.snapshot() as snap:
        for go_back in (snap.clone, lambda: vm.reset_to(snap)):
            with pytest.raises(ConfigError, match=r"disk0 is not as it was.*snapshot=on"):
                go_back()
        with pytest.raises(ConfigError, match="in use"):  # it is the user's to give a copy
            snap.clone(drives=[f"file={disk}"])
        snap.clone(drives=[f"file={copy(disk)}"]).close()
    for more in ("readonly=on", "snapshot=on"):
        with Machine(drives=[f"file={disk},{more}"], **options) as vm, vm.snapshot() as snap:
            vm.reset_to(snap)
            snap.clone().close()


def copy(disk: Path) -> Path:
    other = disk.with_suffix(".copy")
    other.write_bytes(disk.read_bytes())
    return other


# The command, and where a clone speaks.

HELLO = SMP.with_name("hello.bin")


def test_a_clone_speaks_where_it_is_told_to(accel, tmp_path):
    first, other = tmp_path / "first", tmp_path / "other"
    with Machine("2M", accel, image=HELLO, serial=f"file:{first}") as vm, vm.snapshot() as snap:
        with snap.clone() as silent:
            assert silent.run(TIMEOUT).reason is StopReason.HALT
        assert first.read_text() == ""
        with snap.clone(serial=f"file:{other}") as clone:
            assert clone.run(TIMEOUT).reason is StopReason.HALT
        vm.run(TIMEOUT)
    assert first.read_text() == other.read_text() != ""


def test_the_command_goes_on_from_a_folder(accel, tmp_path):
    with Machine("2M", accel, image=HELLO, serial="null") as vm, vm.snapshot() as snap:
        snap.save(tmp_path / "snap")
    plain = vmexit("run", HELLO, "--accel", accel)
    done = vmexit("run", "--restore", tmp_path / "snap", "--stats")
    assert (done.status, done.out) == (plain.status, plain.out) and plain.out
    other = "kvm" if accel == "soft" else "soft"
    done = vmexit("run", "--restore", tmp_path / "snap", "--accel", other)
    assert_one_line(done, 2, f"is of a machine on {accel}; use --accel {accel}")


# 16-bit: mov edx, 0x608 (ACPI's timer); in eax, dx; out 0x10, eax; mov al, 0; out 0xf4, al
READS_TIME = bytes.fromhex("66ba08060000 66ed 66e710 b000 e6f4")


def test_the_command_can_catch_up_with_the_time(tmp_path):
    with Machine("2M", "soft", machine="microvm", serial="null") as vm:
        vm.load_bytes(READS_TIME, at=0x1000)
        with vm.snapshot() as snap:
            snap.save(tmp_path / "snap")
    time.sleep(0.5)
    values = []
    for options in ([], ["--catch-up"]):
        trace = tmp_path / "trace"
        done = vmexit("run", "--restore", tmp_path / "snap", *options, "--trace", trace)
        assert done.status == 1
        found = map(json.loads, trace.read_text().splitlines())
        (data,) = (one["data"] for one in found if one.get("port") == 0x10)
        values.append(int.from_bytes(bytes.fromhex(data), "little"))
    assert values[1] - values[0] > 0.4 * 3_579_545
    assert_one_line(vmexit("run", "--catch-up", HELLO), 2, "give one with --restore DIR")


def test_an_observer_sees_what_a_clone_does(accel):
    trace = io.StringIO()
    with (
        stopped_at(accel, 100) as vm,
        vm.snapshot() as snap,
        snap.clone(observer=JsonTrace(trace)) as clone,
    ):
        assert finish(clone) == 1000
    exits = [json.loads(line) for line in trace.getvalue().splitlines()]
    assert [exit.get("data") for exit in exits[:2]] == ["65", "66"]  # 101, 102
    assert (len(exits), exits[-1]["exit"]) == (900 + 1, "hlt")


def test_a_snapshot_from_within_an_access_is_refused(accel):
    seen = []

    def access(_access: object) -> None:
        with pytest.raises(VmexitError, match="within its own access"):
            vm.snapshot()
        seen.append(1)

    with Machine("2M", accel) as vm:
        vm.load_bytes(bytes.fromhex("e610 f4"), at=0x1000)
        vm.on_pio(0x10, write=access)
        assert vm.run(TIMEOUT).reason is StopReason.HALT
        assert seen == [1]
