"""A machine in an asyncio program: what takes time is awaited, and events are iterated over.

>>> async def watch(vm):
...     machine = AsyncMachine(vm)
...     running = asyncio.create_task(machine.run(timeout=60))
...     await machine.pause()
...     print(vm.vcpus[0].regs)
...     await machine.resume()
...     stop = await running
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeVar

from vmexit.machine.events import Event

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine
    from vmexit.machine.stop import Stop


T = TypeVar("T")


def _in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """`call` in a thread of its own: a few machines that run would take all that the loop has."""
    executor = ThreadPoolExecutor(1, "vmexit-aio")
    try:
        return asyncio.wrap_future(executor.submit(copy_context().run, call))
    finally:
        executor.shutdown(wait=False)


class AsyncMachine:
    """`machine` for coroutines; its other methods are of use as they are.

    It does not belong to it: the machine is closed by whoever made it.
    """

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine

    async def run(self, timeout: float | None = None) -> "Stop":
        """As `Machine.run()`, in a thread; a task that is cancelled ends the run, too."""
        running = _in_thread(lambda: self.machine.run(timeout))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():  # it may just begin
                self.machine.stop()
                await asyncio.wait((running,), timeout=0.05)
            raise

    async def pause(self) -> None:
        """As `Machine.pause()`: once this is over no vCPU runs."""
        await _in_thread(self.machine.pause)

    async def resume(self, *, step: int | None = None) -> None:
        """As `Machine.resume()`."""
        await _in_thread(lambda: self.machine.resume(step=step))

    async def reset(self) -> None:
        """As `Machine.reset()`."""
        await _in_thread(self.machine.reset)

    def events(self) -> "EventStream":
        """What happens from now on: `async for event in machine.events()`."""
        return EventStream(self.machine)


class EventStream:
    """Events in their order, without end, until `close()`, which `with` calls.

    To be made in the event loop that iterates over it.
    """

    def __init__(self, machine: "Machine") -> None:
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._queue.put_nowait, event)

        self.close = machine.subscribe(tell)

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> Event:
        return await self._queue.get()

    def __enter__(self) -> "EventStream":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
