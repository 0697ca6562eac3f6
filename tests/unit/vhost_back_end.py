"""A back end of vhost-user that does as it is told, and leaves the rest to the test."""

import array
import mmap
import os
import socket
import struct
import threading

from vmexit.abi import vhost_user as u
from vmexit.abi import virtio as v

_FEATURES = (
    1 << v.F_VERSION_1 | 1 << v.F_INDIRECT_DESC | 1 << v.F_EVENT_IDX | 1 << u.F_PROTOCOL_FEATURES
)
_PROTOCOL = 1 << u.PROTOCOL_F_MQ | 1 << u.PROTOCOL_F_REPLY_ACK | 1 << u.PROTOCOL_F_CONFIG


class BackEnd:
    """Serves one connection on a thread of its own; all descriptors that it gets are kept.

    `wrong` are whole messages in place of the answers to some requests.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.wrong: dict[int, bytes] = {}
        self.messages: list[tuple[int, bytes, int]] = []
        """What came: request, data, how many descriptors."""
        self.enabled = threading.Event()
        self.kicks: dict[int, int] = {}
        self.calls: dict[int, int] = {}
        self.memory: list[int] = []
        self.sizes: list[int] = []
        self._fds: list[int] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while self._answer_one():
                pass
        except OSError:
            return  # the other side has ended in the midst of a message

    def _answer_one(self) -> bool:
        data, ancillary, _, _ = self.connection.recvmsg(u.HEADER.size, socket.CMSG_SPACE(64))
        if not data:
            return False
        fds = [fd for _, _, raw in ancillary for fd in array.array("i", raw)]
        self._fds += fds
        request, flags, size = u.HEADER.unpack(data)
        body = self.connection.recv(size, socket.MSG_WAITALL) if size else b""
        self.messages.append((request, body, len(fds)))
        if request == u.SET_VRING_KICK:
            self.kicks[body[0]] = fds[0]
        elif request == u.SET_VRING_CALL:
            self.calls[body[0]] = fds[0]
        elif request == u.SET_MEM_TABLE:
            self.memory = fds
            self.sizes = [s for _, s, _, _ in struct.iter_unpack("=QQQQ", body[u.MEMORY.size :])]
        answer = {
            u.GET_FEATURES: u.U64.pack(_FEATURES),
            u.GET_PROTOCOL_FEATURES: u.U64.pack(_PROTOCOL),
            u.GET_CONFIG: body,
            u.GET_VRING_BASE: body,
        }.get(request, u.U64.pack(0) if flags & u.NEED_REPLY else None)
        if request in self.wrong:
            self.connection.sendall(self.wrong[request])
        elif answer is not None:
            header = u.HEADER.pack(request, u.VERSION | u.REPLY, len(answer))
            self.connection.sendall(header + answer)
        if request == u.SET_VRING_ENABLE:
            self.enabled.set()
        return True

    def rings(self) -> mmap.mmap:
        """The memory that the rings are in."""
        return mmap.mmap(self.memory[-1], self.sizes[-1])

    def hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._thread.join()
        self.connection.close()
        for fd in self._fds:
            os.close(fd)
