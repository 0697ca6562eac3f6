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

ROUNDS = 20_000


@pytest.mark.engine
def test_no_stop_is_lost():
    """Half of them are asked for while the engine starts, which by itself forgets them."""
    accelerator = SoftAccelerator()
    memory = GuestMemory([(0, 1 << 20)])
    memory.write(0, b"\xeb\xfe")  # jmp to itself
    vm = accelerator.create_vm(memory, Bus("PIO"), Bus("MMIO"))
    vcpu = vm.create_vcpu(0)
    vcpu.set_system_registers(real_mode(0))
    vcpu.set_registers(dict.fromkeys(GENERAL, 0) | {"rflags": 2})
    processor = vm._processor
    words = processor._words
    served = threading.Event()
    end = False

    def run() -> None:
        processor.begin()
        while not end:
            if words[StopWords.ATTENTION]:
                processor.go_on(StopWords.ATTENTION)
                served.set()
            assert processor.run(vcpu, 1 << 31) is None

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for number in range(ROUNDS):
            served.clear()
            for _ in range(random.randrange(200)):
                pass
            processor.ask_to_stop(StopWords.ATTENTION)
            assert served.wait(30), f"stop {number} was lost"
    finally:
        end = True
        processor.ask_to_stop(StopWords.KICK)
        thread.join(30)
    assert not thread.is_alive()
    vm.close()
    memory.close()
