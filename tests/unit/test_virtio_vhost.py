"""A device that another program serves, where that program is hostile, or ends."""

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from vhost_back_end import BackEnd
from virtio_driver import Driver

from vmexit.abi import virtio as v
from vmexit.backends import vhost_user
from vmexit.backends.storage_daemon import serve_image
from vmexit.backends.vhost_ring import SLOTS
from vmexit.backends.vhost_user import Shared, VhostUser
from vmexit.core.errors import ConfigError, HostError
from vmexit.core.loop import EventLoop
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.vhost import Vhost

FULL = (1 << 64) - 2  # of an eventfd's counter
USED = SLOTS * 16 + 0x1000  # of a ring of ours
SOON = 20


class Rig:
    """A guest with one device, and back ends that come one after the other."""

    def __init__(self, connect: Callable[[], socket.socket] | None = None) -> None:
        self.memory = GuestMemory([(0, 1 << 20)])
        self.failures: list[BaseException] = []
        self.failed = threading.Event()
        self.loop = EventLoop(self.fail)
        self.back_ends: list[BackEnd] = []
        self.refuses = False
        self.refused = threading.Event()
        self.asked_again = threading.Semaphore(0)
        memory = [
            Shared(r.gpa, r.size, r.hva, self.memory.fd, at) for r, at in self.memory.shared()
        ]
        self.backend = VhostUser(
            "the back end", connect or self.connect, self.loop, memory, 1, 1 << 40
        )
        self.device = Vhost(
            v.BLOCK, self.backend, 0, bytes(60), [256], self.loop, self.fail, patience=600
        )
        self.driver = Driver(self.device, self.memory)
        self.told = threading.Semaphore(0)
        enter = self.driver.registers.enter

        def entered(function):
            enter(function)
            (self.asked_again if function is self.device._again else self.told).release()

        self.driver.registers.enter = entered
        self.driver.start(size=256)

    def fail(self, error: BaseException) -> None:
        self.failures.append(error)
        self.failed.set()

    def connect(self) -> socket.socket:
        if self.refuses:
            self.refused.set()
            raise ConnectionRefusedError(111, "refused")
        ours, theirs = socket.socketpair()
        self.back_ends.append(BackEnd(theirs))
        return ours

    @property
    def back_end(self) -> BackEnd:
        return self.back_ends[-1]

    def ask(self, count: int) -> None:
        ring = self.driver.rings[0]
        for number in range(count):
            ring.offer(ring.chain([(0x8_0000, 16)], [], first=number))
        self.driver.kick()

    def use(self, *entries: tuple[int, int]) -> None:
        """The back end says that it has done these."""
        rings = self.back_end.rings()
        for number, entry in enumerate(entries):
            struct.pack_into("<II", rings, USED + 4 + 8 * number, *entry)
        struct.pack_into("<H", rings, USED + 2, len(entries))
        os.eventfd_write(self.back_end.calls[0], 1)

    def lose_and_find(self) -> None:
        """The back end ends, and another one is there at once."""
        while self.asked_again.acquire(timeout=0):
            pass  # of what was before
        self.back_end.hang_up()
        assert self.asked_again.acquire(timeout=SOON) and self.backend.connected

    def done(self, count: int) -> bool:
        """Whether so many requests have come back; waits for it."""
        found = self.driver.rings[0].done()
        while len(found) < count and self.told.acquire(timeout=SOON):
            found += self.driver.rings[0].done()
        return len(found) == count

    def close(self) -> None:
        self.loop.close()
        self.backend.close()
        for back_end in self.back_ends:
            back_end.close()
        self.memory.close()


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.close()


def test_a_back_end_that_fills_the_eventfd_for_requests(rig):
    os.eventfd_write(rig.back_end.kicks[0], FULL)
    rig.ask(1)
    assert not rig.failures and not rig.driver.broken


def test_a_back_end_that_takes_back_what_it_has_told(rig):
    """Between the event and the look at it: as if the loop's thread had been late."""
    rig.loop._watched[rig.backend._calls[0]]()
    assert not rig.failures


@pytest.mark.parametrize(
    "entries", [[(0xFFFF_FFFF, 5)], [(SLOTS - 1, 0), (SLOTS - 1, 0)], [(3, 0)]]
)
def test_a_back_end_that_has_done_what_nobody_has_asked_for(rig, entries):
    rig.ask(1)
    rig.use(*entries)
    assert rig.failed.wait(SOON)
    assert isinstance(rig.failures[0], HostError)
    assert rig.driver.rings[0].done() == []


def test_a_back_end_that_takes_memory_away(rig):
    """It would be a SIGBUS for us."""
    for fd in rig.back_end.memory:
        for size in (0, 1 << 40):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)


def test_a_back_end_that_comes_and_goes_while_the_device_is_held(rig):
    """What is to be asked again are more requests than there are slots left."""
    rig.ask(SLOTS // 2 + 1)
    rig.refuses = True
    rig.back_end.hang_up()
    assert rig.refused.wait(SOON)
    rig.driver.registers.hold(True)
    rig.refuses = False
    assert rig.asked_again.acquire(timeout=SOON) and rig.backend.connected
    rig.refused.clear()
    rig.refuses = True
    rig.back_end.hang_up()
    assert rig.refused.wait(SOON) and not rig.backend.connected
    rig.driver.registers.hold(False)
    assert rig.asked_again.acquire(timeout=0)
    rig.refuses = False
    assert rig.asked_again.acquire(timeout=SOON)
    rig.use(*((SLOTS - 1 - number, 0) for number in range(SLOTS // 2 + 1)))
    assert rig.done(SLOTS // 2 + 1) and not rig.failures


def test_what_waits_for_a_held_device_does_not_grow_with_each_connection(rig):
    rig.driver.registers.hold(True)
    for _ in range(5):
        rig.lose_and_find()
    assert len(rig.driver.registers._waiting) == 1


def test_the_loop_does_not_wait_for_an_answer_that_another_thread_has_taken(rig):
    """It was told of the answer, and is late."""
    rig.backend._ended()
    rig.driver.start(size=256)
    rig.backend._ended()
    rig.ask(1)
    rig.use((SLOTS - 1, 0))
    assert rig.done(1) and rig.backend.connected and len(rig.back_ends) == 1


def test_a_back_end_that_says_what_nobody_has_asked_for_is_left(rig):
    rig.back_end.connection.send(b"hello")
    assert rig.asked_again.acquire(timeout=SOON)
    assert len(rig.back_ends) == 2 and not rig.failures


def finish(rig: Rig, count: int) -> threading.Thread:
    """The back end does all that it was asked for, though not at once."""
    done = [(SLOTS - 1 - number, 0) for number in range(count)]
    thread = threading.Thread(target=lambda: (time.sleep(0.05), rig.use(*done)))
    thread.start()
    return thread


def test_a_pause_waits_for_what_is_under_way(rig):
    rig.ask(3)
    thread = finish(rig, 3)
    rig.driver.registers.hold(True)
    assert rig.driver.rings[0].done() == [(0, 0), (1, 0), (2, 0)]
    thread.join()
    assert not rig.failures


def test_a_reset_waits_for_what_is_under_way(rig):
    rig.ask(3)
    thread = finish(rig, 3)
    rig.driver.set(v.MMIO_STATUS, 0)
    assert struct.unpack_from("<H", rig.back_end.rings(), USED + 2) == (3,)
    thread.join()
    assert not rig.failures


def test_a_pause_does_not_wait_for_a_back_end_that_has_ended(rig):
    rig.ask(2)
    rig.refuses = True
    rig.back_end.hang_up()
    rig.driver.registers.hold(True)
    assert rig.refused.wait(SOON)
    rig.refuses = False
    assert rig.asked_again.acquire(timeout=SOON)
    rig.driver.registers.hold(False)
    rig.use((SLOTS - 1, 0), (SLOTS - 2, 0))
    assert rig.done(2) and not rig.failures


def test_a_back_end_that_never_ends_is_not_waited_for_for_ever(rig, monkeypatch):
    monkeypatch.setattr(vhost_user, "_LONG", 0.05)
    rig.ask(1)
    rig.driver.registers.hold(True)
    assert "requests take more than" in str(rig.failures[0])


needs_qemu = pytest.mark.skipif(
    not shutil.which("qemu-storage-daemon") or not shutil.which("qemu-img"),
    reason="no qemu-storage-daemon; apt-get install qemu-system-common qemu-utils",
)


@needs_qemu
def test_pauses_lose_nothing_and_resets_leave_nothing(tmp_path):
    """A disk of QEMU's storage daemon, in the midst of requests."""
    image = str(tmp_path / "image")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    program = serve_image(image, "qcow2", readonly=False, direct=False, queues=1)
    rig = Rig(program.connect)
    memory, size = rig.memory, 16 << 10

    def request(kind: int, number: int) -> None:
        header, data, status = 0x7_0000 + 64 * number, 0x8_0000 + size * number, 0x7_8000 + number
        memory.write(header, struct.pack("<IIQ", kind, 0, number * size // 512))
        into = [(status, 1)] if kind == v.BLK_T_OUT else [(data, size), (status, 1)]
        out = [(header, 16), (data, size)] if kind == v.BLK_T_OUT else [(header, 16)]
        ring = rig.driver.rings[0]
        ring.offer(ring.chain(out, into, first=4 * number))
        rig.driver.kick()

    count = 20
    content = os.urandom(count * size)
    for turn in range(10):
        kind = v.BLK_T_IN if turn % 2 else v.BLK_T_OUT
        memory.write(0x8_0000, bytes(count * size) if kind == v.BLK_T_IN else content)
        for number in range(count):
            request(kind, number)
            if number % 3 == turn % 3:
                rig.driver.registers.hold(True)
                rig.driver.registers.hold(False)
        assert rig.done(count) and not any(memory.read(0x7_8000, count))
        assert memory.read(0x8_0000, count * size) == content
    for _ in range(20):
        for number in range(count):
            request(v.BLK_T_IN, number)
        rig.driver.set(v.MMIO_STATUS, 0)
        memory.write(0x8_0000, bytes(count * size))
        rig.driver.start(size=256)
        assert not any(memory.read(0x8_0000, count * size))
    request(v.BLK_T_IN, 1)
    assert rig.done(1) and memory.read(0x8_0000 + size, size) == content[size : 2 * size]
    assert not rig.failures
    rig.close()
    program.close()


@needs_qemu
def test_a_program_finds_its_socket_whatever_its_number(tmp_path):
    """Of a program without standard input, the third file that it opens is number 3, too."""
    image = str(tmp_path / "image")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    script = """
import os, socket, sys
from vmexit.backends.storage_daemon import serve_image
os.closerange(3, 20)
program = serve_image(sys.argv[1], "qcow2", readonly=False, direct=False, queues=1)
client = program.connect()
client.send(bytes((1, 0, 0, 0) * 2) + bytes(4))
print(len(client.recv(20, socket.MSG_WAITALL)))
client.close()
program.close()
"""
    done = subprocess.run([sys.executable, "-c", script, image], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("20\n", "")


def test_a_queue_that_was_taken_away_is_not_written_to(rig):
    rig.ask(1)
    rig.driver.set(v.MMIO_QUEUE_SEL, 0)
    rig.driver.set(v.MMIO_QUEUE_READY, 0)
    rig.use((SLOTS - 1, 0))
    assert rig.told.acquire(timeout=SOON)
    while rig.device._under_way[0]:
        assert rig.told.acquire(timeout=SOON)
    assert rig.driver.rings[0].done() == [] and not rig.failures


def test_its_state_is_another_programs(rig):
    """No snapshot has it, so that none is made."""
    with pytest.raises(ConfigError, match="the back end keeps a state of its own; use"):
        rig.driver.registers.state()
