"""A run in a thread of its own."""

import threading
from collections.abc import Callable

from vmexit.core.threads import start_without_signals
from vmexit.machine.stop import Stop


class Background:
    """Calls `run` in a thread; `wait()` has what came of it."""

    def __init__(self, run: Callable[[], Stop]) -> None:
        self._run = run
        self._stop: Stop | None = None
        self._error: BaseException | None = None
        # A daemon: a program that forgets the machine must still be able to end.
        self._thread = threading.Thread(target=self._main, name="vmexit-run", daemon=True)
        start_without_signals(self._thread)

    @property
    def alive(self) -> bool:
        """Whether it is not over."""
        return self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._stop = self._run()
        except BaseException as error:  # whatever it is, it is for who waits
            self._error = error

    def wait(self, timeout: float | None) -> Stop | None:
        """What `run` has returned or raised, once it has; None after `timeout` seconds."""
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return self._stop
