"""What is to be sent to one client, who may be slow."""

import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import NamedTuple

from vmexit.core.threads import start_without_signals

# So much may wait for a client who does not read. The longest answer, a schema, has a tenth of it.
LIMIT = 1 << 20


class _Waiting(NamedTuple):
    data: bytes
    key: str


class Outbox:
    """A bounded queue, and a thread that sends what is in it.

    Any thread may put something in, and none waits for the client: one who lets events pile up is
    cut off. Answers are given by the client's own thread, which may wait for `room()`.
    """

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._changed = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._size = 0
        self._sending = False
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="vmexit-qmp-out", daemon=True)
        start_without_signals(self._thread)

    def put(self, data: bytes, key: str = "") -> None:
        """Have `data` sent.

        Where something with the same `key` still waits, it is forgotten: a guest that makes events
        as fast as it can fills no queue with them.
        """
        with self._changed:
            if self._closed:
                return
            if key:
                for waiting in self._queue:
                    if waiting.key == key:
                        self._queue.remove(waiting)
                        self._size -= len(waiting.data)
                        break
            self._queue.append(_Waiting(data, key))
            self._size += len(data)
            if self._size > LIMIT and len(self._queue) > 1:  # an answer may be longer
                self._cut_off()
            self._changed.notify_all()

    def room(self) -> bool:
        """Wait until half of the queue is free; False once the client is gone."""
        with self._changed:
            while self._size > LIMIT // 2 and not self._closed:
                self._changed.wait()
            return not self._closed

    def flush(self, seconds: float) -> bool:
        """Wait until all is sent, or the client is gone; False after so long."""
        end = time.monotonic() + seconds
        with self._changed:
            while (self._queue or self._sending) and not self._closed:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self) -> None:
        """Forget what is not sent, cut the client off, and wait for the thread."""
        with self._changed:
            self._cut_off()
            self._changed.notify_all()
        self._thread.join()

    def _cut_off(self) -> None:
        self._closed = True
        self._queue.clear()
        self._size = 0
        with suppress(OSError):  # it has gone itself
            self._client.shutdown(socket.SHUT_RDWR)  # which ends sending and receiving

    def _main(self) -> None:
        while (data := self._next()) is not None:
            try:
                self._client.sendall(data)
            except OSError:
                with self._changed:
                    self._cut_off()
                    self._changed.notify_all()

    def _next(self) -> bytes | None:
        with self._changed:
            self._sending = False
            self._changed.notify_all()
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            data, _ = self._queue.popleft()
            self._size -= len(data)
            self._sending = True
            return data
