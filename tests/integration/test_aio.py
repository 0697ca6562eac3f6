"""Machines in asyncio programs."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from vmexit import EventKind, Machine, RunState, StopReason
from vmexit.aio import AsyncMachine

TIMEOUT = 30
# 0: inc dword [0x3000]; jmp 0
SPIN = bytes.fromhex("66ff060030 ebf9")


@pytest.fixture
def vm(accel):
    with Machine(memory="1M", accel=accel) as machine:
        machine.load_bytes(SPIN, at=0x1000)
        yield machine


def test_a_run_is_awaited_and_steered(vm):
    async def main():
        machine = AsyncMachine(vm)
        with machine.events() as events:
            running = asyncio.create_task(machine.run(TIMEOUT))
            assert (await anext(events)).kind is EventKind.RESUMED
            await machine.pause()
            assert vm.state is RunState.PAUSED and not running.done()
            assert (await anext(events)).kind is EventKind.PAUSED
            before = vm.memory.read_u32(0x3000)
            await asyncio.sleep(0.02)
            assert vm.memory.read_u32(0x3000) == before
            await machine.resume()
            await machine.reset()
            seen = [(await anext(events)).kind for _ in range(2)]
            assert EventKind.RESUMED in seen
            assert vm.stop()
            assert (await running).reason is StopReason.STOPPED

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


def test_a_run_takes_none_of_the_loops_own_threads(vm):
    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        machine = AsyncMachine(vm)
        with machine.events() as events:
            running = asyncio.create_task(machine.run(TIMEOUT))
            assert (await anext(events)).kind is EventKind.RESUMED
            assert await asyncio.to_thread(lambda: 42) == 42
            await machine.pause()
        assert vm.stop()
        await running

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


def test_what_is_cancelled_stops(vm):
    async def main():
        machine = AsyncMachine(vm)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(machine.run(), 0.05)
        assert not vm.running and not vm.active
        running = asyncio.create_task(machine.run())
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not vm.active
        return (await machine.run(0.05)).reason

    assert asyncio.run(asyncio.wait_for(main(), TIMEOUT)) is StopReason.TIMEOUT
