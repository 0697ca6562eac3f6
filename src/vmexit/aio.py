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
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeVar

from vmexit.machine.events import Event, EventKind

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine
    from vmexit.machine.stop import Stop

# So many events may wait for who does not iterate, before some are forgotten.
_MOST = 1024

T = TypeVar("T")


def _in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """`call` in a thread of its own: a few machines that run would take all that the loop has."""
    executor = ThreadPoolExecutor(1, "vmexit-aio")
    try:
        return asyncio.wrap_future(executor.submit(copy_context().run, call))
    finally:
        executor.shutdown(wait=False)


def _is_by_guest(event: Event) -> bool:
    """Whether a guest can make any number of these while nobody does anything."""
    if event.kind is EventKind.RESET:
        return event.stop is not None
    return event.kind in (EventKind.CRASH_KERNEL, EventKind.BALLOON)


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

    To be made in the event loop that iterates over it. Where many wait already, of what a guest can
    do at will (CRASH_KERNEL, BALLOON, RESET by itself) the oldest of the same kind is forgotten.
    """

    def __init__(self, machine: "Machine") -> None:
        self._loop = asyncio.get_running_loop()
        # A signal's handler may quit while its thread is in here already.
        self._lock = threading.RLock()
        self._waiting: deque[Event] = deque()
        self._called = False  # the loop knows that something waits, or soon will
        self._ready = asyncio.Event()
        self.close = machine.subscribe(self._tell)

    def _tell(self, event: Event) -> None:
        with self._lock:
            if len(self._waiting) >= _MOST and _is_by_guest(event):
                for waiting in self._waiting:
                    if waiting.kind is event.kind and _is_by_guest(waiting):
                        self._waiting.remove(waiting)
                        break
            self._waiting.append(event)
            called, self._called = self._called, True
        # Not for each event: a loop that is busy would have any number of calls to make.
        if not called:
            with suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._ready.set)

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> Event:
        while True:
            with self._lock:
                if self._waiting:
                    return self._waiting.popleft()
                self._called = False
                self._ready.clear()
            await self._ready.wait()

    def __enter__(self) -> "EventStream":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
