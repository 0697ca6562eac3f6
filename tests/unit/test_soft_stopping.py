"""The software CPU stops for whoever asks, at whatever moment."""

import random
import threading

import pytest

from vmexit.accel.soft.engine import SoftAccelerator
from vmexit.accel.soft.stubs import StopWords
from vmexit.arch.x86.registers import GENERAL
from vmexit.arch.x86.segments import real_mode
from vmexit.core.bus import Bus
from vmexit.core.memory import GuestMemory

ROUNDS = 10_000
PORT, ANSWER = 0x10, 0x5A


class Constant:
    """A device that always gives the same, and calls `written` at a write."""

    widths = (1, 2, 4)

    def __init__(self) -> None:
        self.written = lambda: None

    def read(self, offset: int, size: int) -> int:
        return ANSWER

    def write(self, offset: int, size: int, value: int) -> None:
        self.written()


@pytest.mark.engine
@pytest.mark.parametrize(
    "code",
    [
        "ebfe",  # l: jmp l
        "ec 3c5a 74fb f4",  # l: in al, dx; cmp al, 0x5a; je l; hlt
        "ee ec 3c5a 74fa f4",  # l: out dx, al; in al, dx; cmp al, 0x5a; je l; hlt
        "a10008 3d5a00 74f8 f4",  # l: mov ax, [0x800]; cmp ax, 0x5a; je l; hlt
        # l: out dx, al; eax = 0x40000000; cpuid; cmp ebx, "vmex"; mov dx, 0x10; je l; hlt
        "ee 66b800000040 0fa2 6681fb766d6578 ba1000 74eb f4",
    ],
)
def test_no_stop_is_lost_and_nothing_goes_without_its_answer(code):
    """Half of them are asked for while the engine starts, which by itself forgets them.

    Any wrong answer makes the guest halt.
    """
    accelerator = SoftAccelerator()
    memory = GuestMemory([(0, 1 << 12), (1 << 20, 1 << 20)])
    memory.write(0, bytes.fromhex(code))
    pio, mmio = Bus("port"), Bus("MMIO")
    device = Constant()
    pio.attach(PORT, 1, device)
    mmio.attach(0x8000, 16, Constant())
    vm = accelerator.create_vm(memory, pio, mmio)
    vcpu = vm.create_vcpu(0)
    system = real_mode(0)
    vcpu.set_system_registers(system._replace(ds=system.ds._replace(base=0x7800)))
    vcpu.set_registers(dict.fromkeys(GENERAL, 0) | {"rflags": 2, "rdx": PORT})
    processor = vm._processor
    words = processor._words
    device.written = lambda: processor.ask_to_stop(StopWords.ATTENTION)
    served = threading.Event()
    end = False
    exits = []

    def run() -> None:
        processor.begin()
        while not end:
            if words[StopWords.ATTENTION]:
                processor.go_on(StopWords.ATTENTION)
                served.set()
            exit = processor.run(vcpu, 1 << 31)
            if exit is not None:
                exits.append(exit)
                break

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for number in range(ROUNDS):
            served.clear()
            for _ in range(random.randrange(200)):
                pass
            processor.ask_to_stop(StopWords.ATTENTION)
            assert served.wait(30), f"stop {number} was lost: {exits}"
    finally:
        end = True
        processor.ask_to_stop(StopWords.KICK)
        thread.join(30)
    assert not thread.is_alive() and not exits
    vm.close()
    memory.close()
