"""Machines in asyncio programs."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from vmexit import After, EventKind, Machine, RunState, StopReason, aio
from vmexit.aio import AsyncMachine

TIMEOUT = 30
# 0: inc dword [0x3000]; jmp 0
SPIN = bytes.fromhex("66ff060030 ebf9")
# mov al, 2; mov dx, 0x505; mov cx, 100; 8: out dx, al; loop 8; out 0xf4, al
PANICS = bytes.fromhex("b002 ba0505 b96400 ee e2fd e6f4")
EXITS = PANICS[-2:]


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


@pytest.mark.parametrize("kind", [EventKind.CRASH_KERNEL, EventKind.RESET])
def test_no_guest_fills_memory_with_events(accel, monkeypatch, kind):
    monkeypatch.setattr(aio, "_MOST", 8)
    resets = iter([After.RESET] * 100 if kind is EventKind.RESET else [])

    async def main():
        options = {"machine": "microvm", "devices": ("pvpanic",), "serial": "null"}
        with Machine("1M", accel, **options) as vm, AsyncMachine(vm).events() as events:
            vm.load_bytes(EXITS if kind is EventKind.RESET else PANICS, at=0x1000)
            vm.decide(lambda stop: next(resets, After.END))
            vm.run(TIMEOUT)  # the loop makes no turn meanwhile
            told = []
            while EventKind.SHUTDOWN not in told:
                told.append((await anext(events)).kind)
            return told

    told = asyncio.run(asyncio.wait_for(main(), TIMEOUT))
    assert told == [EventKind.RESUMED, *[kind] * 7, EventKind.SHUTDOWN]


def test_several_may_wait_for_events(vm):
    async def main():
        with AsyncMachine(vm).events() as events:
            waiting = [asyncio.create_task(anext(events)) for _ in range(2)]
            await asyncio.sleep(0)
            vm.run(0.01)
            told = {(await task).kind for task in waiting}
            assert told == {EventKind.RESUMED, EventKind.PAUSED}

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
