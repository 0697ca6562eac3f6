"""The indices of rings, as a processor sees them that looks all the time: a driver that polls."""

import mmap
import struct
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.queue import Chain, Queue

SIZE = 256
DESC, AVAIL, USED, STOP = 0x1_0000, 0x2_0000, 0x3_0000, 0x4_0000
SECONDS = 2

# Looks at a word of a file until another one is set; prints how often, and how often it was 0.
WATCH = """
import mmap, sys
fd, size, at, stop = map(int, sys.argv[1:])
words = memoryview(mmap.mmap(fd, size)).cast("H")
print("looks", flush=True)
looks = zeros = 0
while not words[stop // 2]:
    for _ in range(1000):
        zeros += words[at // 2] == 0
    looks += 1000
print(looks, zeros, flush=True)
"""


@contextmanager
def watched(fd: int, size: int, at: int, stop: int, found: list[int]):
    """Another process looks at the word at `at` meanwhile, until that at `stop` is set."""
    words = [sys.executable, "-c", WATCH, str(fd), str(size), str(at), str(stop)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, pass_fds=[fd]) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "looks\n"
            yield
            with mmap.mmap(fd, size) as pages:
                pages[stop] = 1
            found.extend(map(int, process.communicate(timeout=30)[0].split()))
        finally:
            process.kill()


def for_a_while():
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        yield from range(100)


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 1 << 20)])
    yield memory
    memory.close()


def ready_queue(memory: GuestMemory) -> Queue:
    queue = Queue(memory, SIZE, lambda: None, lambda when: None)
    queue.size, queue.desc, queue.driver, queue.device = SIZE, DESC, AVAIL, USED
    queue.enable(event_idx=True)
    return queue


def test_a_used_index_is_never_0_in_between(memory):
    queue, found = ready_queue(memory), []
    queue.push(Chain(0, [], [], [], []), 0)
    with watched(memory.fd, 1 << 20, USED + 2, STOP, found):
        for _ in for_a_while():
            queue.push_all(())  # the index as it was
    looks, zeros = found
    assert looks > 1000 and zeros == 0


def test_nor_is_the_index_from_which_a_notification_is_wanted(memory):
    queue, found = ready_queue(memory), []
    memory.write(DESC, struct.pack("<QIHH", 0x5_0000, 16, 0, 0))
    memory.write_u16(AVAIL + 2, 1)
    while queue.pop() is not None:
        pass
    with watched(memory.fd, 1 << 20, USED + 4 + 8 * SIZE, STOP, found):
        for _ in for_a_while():
            assert queue.pop() is None
    looks, zeros = found
    assert looks > 1000 and zeros == 0
