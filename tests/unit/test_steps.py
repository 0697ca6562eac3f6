"""Lists of ioctls, copies and comparisons: in Python, and compiled."""

import os
import struct
import termios
import threading
import weakref

import pytest

from vmexit.core import steps
from vmexit.core.steps import PythonSteps

pytestmark = pytest.mark.engine

FIONREAD = termios.FIONREAD  # an old request: its number says nothing of a size
NS_GET_NSTYPE, CLONE_NEWUSER = 0xB703, 0x1000_0000  # ioctl_ns(2)
OF_EIGHT = 0x8008_0000  # one that says that it has eight bytes


@pytest.fixture(params=["python", "compiled"])
def new(request):
    if request.param == "python":
        return PythonSteps
    if not steps.COMPILED:
        pytest.skip("it was installed without a compiler")
    return steps.Steps


@pytest.fixture
def pipe():
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def test_none_are_none(new):
    assert (len(new()), new().run()) == (0, 0)


def test_all_are_taken_in_order_again_and_again(new, pipe):
    read, write = pipe
    memory, count = memoryview(bytearray(16)), bytearray(4)
    todo = new()
    todo.copy(memory, slice(4, 8), b"abcd")
    todo.copy(memory, slice(6, 8), memoryview(memory)[4:6])
    todo.call(read, FIONREAD, count)
    todo.copy(memory, slice(12, 16), count)
    assert len(todo) == 4
    for written in (0, 5, 12):
        if written:
            os.write(write, b"x" * (written - struct.unpack("i", memory[12:16])[0]))
        memory[4:8] = b"...."
        assert todo.run() == 4
        assert bytes(memory) == bytes(4) + b"abab" + bytes(4) + struct.pack("i", written)


def test_the_first_that_fails_ends_it(new, pipe):
    memory, same = memoryview(bytearray(b"a..")), bytearray(b"same")
    todo = new()
    todo.copy(memory, slice(1, 2), b"b")
    todo.compare(same, b"same")
    todo.call(pipe[0], termios.TIOCGWINSZ, bytearray(8))  # no terminal
    todo.copy(memory, slice(2, 3), b"c")
    assert (todo.run(), bytes(memory)) == (2, b"ab.")
    same[:] = b"late"
    memory[1] = 0
    assert (todo.run(), bytes(memory)) == (1, b"ab.")


def test_a_request_is_to_return_what_it_is_said_to(new):
    user, nothing = os.open("/proc/self/ns/user", os.O_RDONLY), bytearray(1)
    try:
        todo = new()
        todo.call(user, NS_GET_NSTYPE, nothing, CLONE_NEWUSER)
        todo.call(user, NS_GET_NSTYPE, nothing)
        assert todo.run() == 1
    finally:
        os.close(user)


@pytest.mark.parametrize("size", [0, 7])
def test_a_buffer_that_is_too_short_is_refused(new, size):
    with pytest.raises(ValueError, match=f"{size} bytes are too few for request 0x80080000"):
        new().call(0, OF_EIGHT, bytearray(size))
    new().call(0, OF_EIGHT, bytearray(8))


def test_lengths_that_differ_are_refused(new):
    memory, todo = memoryview(bytearray(8)), new()
    with pytest.raises(ValueError, match="3 bytes do not fill 4"):
        todo.copy(memory, slice(0, 4), b"abc")
    with pytest.raises(ValueError, match="4 bytes do not fill 2"):
        todo.copy(memory, slice(6, 10), b"abcd")  # the end is that of the memory
    with pytest.raises(ValueError, match="3 bytes are never the same as 4"):
        todo.compare(b"abcd", b"abc")
    assert len(todo) == 0


def test_what_cannot_be_written_to_is_no_place_to_copy_to(new):
    with pytest.raises((TypeError, BufferError, ValueError)):
        todo = new()
        todo.copy(memoryview(b"constant"), slice(0, 1), b"C")
        todo.run()


def test_what_they_work_on_stays_where_it_is(new):
    data = bytearray(8)
    todo = new()
    todo.call(0, OF_EIGHT, data)
    with pytest.raises(BufferError):
        data.extend(bytes(1 << 20))
    del todo
    data.extend(bytes(1 << 20))


def test_nothing_is_held_once_they_are_gone(new):
    class Held(bytearray):
        pass

    held = Held(8)
    gone = weakref.ref(held)
    todo = new()
    todo.copy(memoryview(held), slice(0, 8), b"12345678")
    del held
    assert gone() is not None
    assert todo.run() == 1
    del todo
    assert gone() is None


def test_other_threads_do_not_come_between(new, pipe):
    """A thread that is always busy gets its turn at each `fcntl.ioctl()`, and not here."""
    turns, busy = 0, True

    def work() -> None:
        nonlocal turns
        while busy:
            turns += 1

    todo = new()
    for _ in range(200):
        todo.call(pipe[0], FIONREAD, bytearray(4))
    thread = threading.Thread(target=work)
    thread.start()
    try:
        seen = set()
        for _ in range(20):
            before = turns
            assert todo.run() == 200
            seen.add(turns - before)
    finally:
        busy = False
        thread.join()
    assert min(seen) == 0
