"""Linux goes on from a snapshot in another process: shell, clocks, disk, network, processors."""

import hashlib
import os
import subprocess
import time
from pathlib import Path

import pytest
from command import SLOW, VMEXIT, assert_one_line, vmexit
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, PROMPT, SECONDS, Guest
from qmp_client import Client
from test_linux_net import Sender, needs_passt
from test_linux_virtio import ext4

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300 * SLOW)]

FLAVOUR = "cloud-amd64"
BROKEN = ("kernel BUG", "Oops", "unable to handle", "general protection")
# In the lab that is so without any snapshot: two vCPUs share one emulated processor.
STARVED = ("soft lockup", "stall")
MODULES = ("virtio_blk", "ext4", "virtio_net", "virtio_rng")


class Restored(Guest):
    """`vmexit run --restore DIR`."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.output = b""
        self.process = subprocess.Popen(
            [*VMEXIT, "run", "--restore", str(folder), "--timeout", str(SECONDS), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )


def uptime(guest: Guest) -> float:
    return float(guest.run("cut -d' ' -f1 /proc/uptime"))


def date(guest: Guest) -> int:
    return int(guest.run("date +%s"))


def ticks(guest: Guest) -> list[int]:
    """What each processor was busy with programs, in hundredths of a second (proc(5))."""
    lines = guest.run("grep '^cpu[0-9]' /proc/stat").splitlines()
    return [int(line.split()[1]) for line in lines]


def works(guest: Guest, smp: int) -> None:
    """Each processor has its share of the work, and time goes by as it should."""
    assert guest.run("nproc") == str(smp)
    before, began, end = ticks(guest), uptime(guest), time.monotonic() + SECONDS
    guest.run(f"for i in $(seq {smp}); do while :; do :; done & done")
    now = before
    while any(new - old < 20 for new, old in zip(now, before, strict=True)):
        assert time.monotonic() < end, (before, now)
        guest.run("sleep 1")
        now = ticks(guest)
    guest.run("kill $(jobs -p)")
    guest.run("sleep 1")
    assert uptime(guest) - began >= 1
    said = guest.run("dmesg")
    assert not [word for word in BROKEN + (() if SLOW > 1 else STARVED) if word in said], said


@pytest.mark.parametrize(("smp", "net"), [(1, False), pytest.param(2, True, marks=needs_passt)])
def test_linux_goes_on_in_another_process(tmp_path, smp, net):
    disk, data = ext4(tmp_path / "disk", 16), os.urandom(1 << 20)
    qmp, options = tmp_path / "qmp.sock", ["--smp", str(smp), "--rng", "-m", "256M"]
    options += ["--drive", f"file={disk},snapshot=on", "--qmp", f"unix:{qmp}"]
    options += ["--net", "user"] if net else []

    def fetches(guest: Guest) -> bool:
        got = guest.run(f"nc 10.0.2.2 {sender.port} | sha256sum") if net else ""
        return not net or got.split()[0] == hashlib.sha256(data).hexdigest()

    with Sender(data) as sender:
        kernel, initrd = debian_kernel(FLAVOUR), initrd_with(FLAVOUR, *MODULES)
        with Guest(kernel, initrd, "quiet", *options, accel=ACCEL) as guest:
            guest.boot()
            assert not net or "eth0 has 10.0.2.15" in guest.run("udhcpc -n -q")
            assert fetches(guest)
            guest.run("mount /dev/vda /mnt; echo before >/mnt/file; sync; x=5")
            with Client(str(qmp)) as client:
                guest.type("sleep 3; echo =slept=\n")  # it is asleep when it is saved
                guest.expect(b"\n")
                client.execute("x-snapshot-save", path=str(tmp_path / "snap1"))
            guest.expect(b"=slept=\r\n")
            guest.expect(PROMPT)
            guest.run("echo after >/mnt/file; sync")
            up, day = uptime(guest), date(guest)
            done = vmexit("snapshot", qmp, tmp_path / "snap2")
            assert done.status == 0, done.err
            works(guest, smp)
            assert fetches(guest)
            guest.power_off()
        saved = [("snap1", "before"), ("snap2", "after"), ("snap1", "before")]
        for name, said in saved[: 2 if SLOW > 1 else 3]:
            with Restored(tmp_path / name) as guest:
                if name == "snap1":
                    guest.expect(b"=slept=\r\n")
                guest.type("\n")
                guest.expect(PROMPT)
                assert guest.run("echo $x; cat /mnt/file").split() == ["5", said]
                if name == "snap2":
                    assert up <= uptime(guest) < up + SECONDS
                    assert day <= date(guest) < time.time() + SECONDS
                works(guest, smp)
                assert fetches(guest)
                guest.run("head -c 3000000 /dev/urandom >/mnt/new; sync; sum=$(md5sum /mnt/new)")
                guest.run("echo 3 >/proc/sys/vm/drop_caches")
                assert guest.run('[ "$(md5sum /mnt/new)" = "$sum" ] && echo same') == "same"
                guest.power_off()


def test_the_command_tells_what_does_not_go_with_a_snapshot(tmp_path):
    assert_one_line(vmexit("run", "--restore", str(tmp_path / "none")), 2, "No such file")
    for words, option in (
        (["--smp", "2"], "--smp"),
        (["x.bin"], "an IMAGE"),
        (["--load-address", "0"], "--load-address"),
        (["-m", "1G"], "--memory"),
    ):
        done = vmexit("run", "--restore", str(tmp_path), *words)
        assert_one_line(done, 2, f"leave out {option}")
