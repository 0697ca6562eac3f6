"""Linux goes on from a snapshot in another process: its shell, its clocks, its disk."""

import subprocess
import sys
from pathlib import Path

import pytest
from command import SLOW, VMEXIT, assert_one_line, vmexit
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, PROMPT, SECONDS, Guest
from test_linux_virtio import ext4

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300 * SLOW)]

MODULES = ("virtio_blk", "ext4")

# Boots, and saves itself for each line that it reads: the end of the name of the folder.
SAVED = """
import sys
from vmexit import Machine
folder, kernel, initrd, smp, drive, accel = sys.argv[1:]
with Machine("256M", accel, kernel=kernel, initrd=initrd, append="console=ttyS0 quiet",
             smp=int(smp), drives=[drive], rng=True, serial="unix:" + folder + ".sock") as vm:
    vm.start()
    print("up", flush=True)
    for line in sys.stdin:
        with vm.snapshot() as snap:
            snap.save(folder + line.strip())
        print("saved", flush=True)
    vm.stop()
    vm.wait()
"""


class Saving(Guest):
    """The same guest in a program that makes snapshots; its console is a socket."""

    def __init__(self, folder: Path, smp: int, drive: str) -> None:
        import socket

        kernel, initrd = debian_kernel("cloud-amd64"), initrd_with("cloud-amd64", *MODULES)
        words = [str(folder), str(kernel), str(initrd), str(smp), drive, ACCEL]
        self.program = subprocess.Popen(
            [sys.executable, "-c", SAVED, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._say() == b"up\n"
        self.output = b""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(f"{folder}.sock")

    def _say(self) -> bytes:
        assert self.program.stdout is not None
        return self.program.stdout.readline()

    def __exit__(self, *exc: object) -> None:
        self.program.kill()
        self.program.communicate()
        self.socket.close()

    def type(self, text: str) -> None:
        self.socket.sendall(text.encode())

    def _read(self, seconds: float) -> bool:
        self.socket.settimeout(max(seconds, 0.01))
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return True
        self.output += data
        return bool(data)

    def save(self, name: str) -> None:
        assert self.program.stdin is not None
        self.program.stdin.write(f"{name}\n".encode())
        assert self._say() == b"saved\n"


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


@pytest.mark.parametrize("smp", [1, 2])
def test_linux_goes_on_in_another_process(tmp_path, smp):
    disk = ext4(tmp_path / "disk", 16)
    folder = tmp_path / "snap"
    with Saving(folder, smp, f"file={disk},snapshot=on") as guest:
        guest.boot()
        guest.run("mount /dev/vda /mnt; echo before >/mnt/file; sync; x=5")
        guest.type("sleep 2; echo =slept=\n")  # it is asleep when it is saved
        guest.expect(b"\n")
        guest.save("1")
        guest.expect(b"=slept=\r\n")
        guest.expect(PROMPT)
        guest.run("echo after >/mnt/file; sync")
        uptime = float(guest.run("cut -d' ' -f1 /proc/uptime"))
        guest.save("2")
    for name, said in (("1", "before"), ("1", "before"), ("2", "after")):
        with Restored(tmp_path / f"snap{name}") as guest:
            if name == "1":
                guest.expect(b"=slept=\r\n")
            guest.type("\n")
            guest.expect(PROMPT)
            assert guest.run("echo $x; cat /mnt/file").split() == ["5", said]
            assert guest.run("nproc") == str(smp)
            begin = float(guest.run("cut -d' ' -f1 /proc/uptime"))
            assert name == "1" or uptime <= begin < uptime + SECONDS
            guest.run("sleep 1")
            assert float(guest.run("cut -d' ' -f1 /proc/uptime")) - begin >= 1
            guest.run("head -c 3000000 /dev/urandom >/mnt/new; sync; sum=$(md5sum /mnt/new)")
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            assert guest.run('[ "$(md5sum /mnt/new)" = "$sum" ] && echo same') == "same"
            said_by_kernel = guest.run("dmesg")
            assert "BUG" not in said_by_kernel and "stall" not in said_by_kernel
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
