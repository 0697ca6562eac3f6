"""Linux's balloon driver: memory that the guest does not use goes back to the host."""

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL

from vmexit import Machine

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]

MIB = 1 << 20


class Shell:
    """A guest in this process, its console on a pair of pipes."""

    def __init__(self, tmp_path: Path, **options: object) -> None:
        flavour = "cloud-amd64"
        self.log = tmp_path / "log"
        self.vm = Machine(
            memory="256M",
            accel=ACCEL,
            kernel=debian_kernel(flavour),
            initrd=initrd_with(flavour, "virtio_balloon"),
            append="console=ttyS0 quiet",
            serial=f"unix:{tmp_path / 'console'}",
            **options,  # type: ignore[arg-type]
        )
        self.thread = threading.Thread(target=lambda: self.vm.run(timeout=250))

    def __enter__(self) -> "Shell":
        self.thread.start()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(self.vm.serial_where.removeprefix("unix:"))
        self.output = b""
        self.expect(b"/root # ")
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()
        self.vm.stop()
        self.thread.join()
        self.vm.close()

    def expect(self, text: bytes) -> None:
        self.socket.settimeout(200)
        while text not in self.output:
            data = self.socket.recv(4096)
            assert data, self.output
            self.output += data
        self.output = self.output.partition(text)[2]

    def run(self, command: str) -> None:
        self.socket.sendall(f"{command}; echo re''ady\n".encode())
        self.expect(b"ready")
        self.expect(b"/root # ")

    def resident(self) -> int:
        """Bytes of the guest's memory that the host holds."""
        return os.stat(f"/proc/self/fd/{self.vm.memory.fd}").st_blocks * 512


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.05)


def resident_set() -> int:
    """Bytes of shared memory in the process's resident set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssShmem:"))


def test_what_the_balloon_takes_the_host_has_back(tmp_path):
    with Shell(tmp_path, balloon=0) as guest:
        # All of it was used once. (Free pages are reported, but only in larger pieces, and later.)
        guest.run("dd if=/dev/zero of=/tmp/a bs=1M count=160; rm /tmp/a")
        before, resident = guest.resident(), resident_set()
        guest.vm.balloon.set_target(128 * MIB)
        until(lambda: guest.vm.balloon.actual == 128 * MIB)
        assert guest.resident() < 256 * MIB - 128 * MIB
        assert before - guest.resident() > 64 * MIB or before < 128 * MIB
        assert resident_set() <= resident
        guest.run("free -m")
        guest.vm.balloon.set_target(0)
        until(lambda: guest.vm.balloon.actual == 0)
        guest.run("dd if=/dev/zero of=/tmp/a bs=1M count=160")  # it can be used again
        assert guest.resident() > 160 * MIB


def test_free_pages_are_reported_and_go_back(tmp_path):
    with Shell(tmp_path, balloon="0") as guest:
        guest.run("dd if=/dev/zero of=/tmp/a bs=1M count=160")
        full, resident = guest.resident(), resident_set()
        assert full > 160 * MIB
        guest.run("rm /tmp/a")
        until(lambda: guest.resident() < full - 64 * MIB)
        assert resident_set() < resident - 64 * MIB


def test_statistics_are_told_when_asked_for(tmp_path):
    with Shell(tmp_path, balloon=0) as guest:
        until(lambda: "total_memory" in guest.vm.balloon.statistics)
        told = guest.vm.balloon.statistics
        assert 150 * MIB < told["total_memory"] < 256 * MIB
        guest.run("dd if=/dev/zero of=/tmp/a bs=1M count=50")
        for number in range(3):  # each time anew
            before = told
            guest.vm.balloon.ask_for_statistics()
            until(lambda before=before: guest.vm.balloon.statistics != before)
            told = guest.vm.balloon.statistics
            guest.run(f"dd if=/dev/zero of=/tmp/a{number} bs=1M count=5")
        assert told["free_memory"] < told["total_memory"] - 50 * MIB
