"""Jobs of test_pool.py, in a module of their own: worker processes import it."""

import os
import signal
import threading
import time
from pathlib import Path

import vmexit

# 16-bit: mov ax, [0x3000]; cmp ax, 0xffff; je hang; add ax, 1; hlt; hang: jmp hang
CODE = bytes.fromhex("a10030 3dffff 7404 050100 f4 ebfe")
HANG = 0xFFFF

_load = vmexit.Snapshot.load
loads = 0


def _counted(path):
    global loads
    loads += 1
    return _load(path)


vmexit.Snapshot.load = _counted


def add_one(vm, number):
    vm.memory.write_u16(0x3000, number)
    vm.run()
    return vm.vcpus[0].regs.rax


def add_one_slowly_at_first(vm, number):
    if number == 0:
        threading.Event().wait(0.5)
    return add_one(vm, number)


def where(vm, number):
    return add_one(vm, number), os.getpid(), loads


def die_at_first(vm, marker):
    """Once for each marker."""
    if marker is not None and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return add_one(vm, 1)


def crash_at_first(vm, marker):
    if not Path(marker).exists():
        Path(marker).touch()
        raise vmexit.GuestCrash("it was the guest")
    return add_one(vm, 1)


def hang_in_python(vm, number):
    if number == HANG:
        while True:
            time.sleep(1)
    return add_one(vm, number)


def run_again_and_again(vm, number):
    """Stopping it once is not enough."""
    for _ in range(3):
        assert add_one(vm, HANG)
    return number


class Unpicklable(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} {other}")
        self.lock = threading.Lock()


def fail(vm, how):
    if how == "big":
        raise ValueError("x" * 10_000_000)
    if how == "unpicklable":
        raise Unpicklable("cannot", "be sent")
    if how == "exit":
        raise SystemExit(3)
    if how == "result":
        return threading.Lock()
    return how


def tell_pid_and_hang(vm, folder):
    (Path(folder) / str(os.getpid())).touch()
    return add_one(vm, HANG)
