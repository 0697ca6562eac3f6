"""As much of HTTP/1.1 as a scraper needs (RFC 9112): one request a connection, strictly bounded."""

import re
import socket
import time
from contextlib import suppress
from typing import NamedTuple

MOST_LINE = 4096
"""Bytes of a request line."""
MOST_HEAD = 16384
"""Bytes of a request line with its header."""

# Seconds for a client to send its request, to take the answer, and to close after that.
_ASKING, _TAKING, _LEAVING = 5.0, 10.0, 1.0
_PIECE = 4096
# What a client sends beyond its request is read so far, so that the answer is not lost.
_MOST_IGNORED = 1 << 20

_END = re.compile(rb"\r?\n\r?\n")
_REQUEST = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_ABSOLUTE = re.compile(r"https?://[^/?]*", re.IGNORECASE)

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class Request(NamedTuple):
    """What is asked for: `path` without what stands behind a question mark."""

    method: str
    path: str


class Response(NamedTuple):
    """What is answered; `allow` are the methods that there are, for status 405."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    allow: str = ""

    def encode(self, *, with_body: bool) -> bytes:
        """As it is sent."""
        lines = [
            f"HTTP/1.1 {self.status} {_REASONS[self.status]}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "Connection: close",
        ]
        if self.allow:
            lines.append(f"Allow: {self.allow}")
        head = "".join(f"{line}\r\n" for line in lines) + "\r\n"
        return head.encode("ascii") + (self.body if with_body else b"")


class RefusedError(Exception):
    """A request that cannot be; `response` says why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.response = Response(status, f"{why}\n".encode())


def receive(client: socket.socket) -> Request | None:
    """What the client asks for; None if it goes without. Raises RefusedError, OSError."""
    end = time.monotonic() + _ASKING
    data = bytearray()
    while (found := _END.search(data)) is None:
        if b"\n" not in data and len(data) > MOST_LINE:
            raise _line_too_long()
        if len(data) > MOST_HEAD:
            raise _too_long()
        client.settimeout(max(end - time.monotonic(), 0.001))
        try:
            piece = client.recv(_PIECE)
        except TimeoutError:
            raise RefusedError(408, "no whole request has come in time") from None
        if not piece:
            if data:
                raise RefusedError(400, "the request has no end")
            return None
        data += piece
    if found.start() > MOST_HEAD:
        raise _too_long()
    return parse(bytes(data[: found.start()]))


def _line_too_long() -> RefusedError:
    return RefusedError(431, f"a request line has {MOST_LINE} bytes at most")


def _too_long() -> RefusedError:
    return RefusedError(431, f"a request has {MOST_HEAD} bytes at most")


def parse(head: bytes) -> Request:
    """A request line and its header. Raises RefusedError."""
    line, *fields = head.replace(b"\r\n", b"\n").split(b"\n")
    if len(line) > MOST_LINE:
        raise _line_too_long()
    found = _REQUEST.fullmatch(line)
    if found is None:
        raise RefusedError(400, "this is no request of HTTP/1.1; use GET /metrics HTTP/1.1")
    method, target, major, minor = (part.decode("ascii") for part in found.groups())
    if major != "1":
        raise RefusedError(505, "this is HTTP/1.1")
    hosts = 0
    for field in fields:
        named = _FIELD.fullmatch(field)
        if named is None:
            raise RefusedError(400, "a line of the header is none")
        hosts += named[1].lower() == b"host"
    if hosts > 1 or (minor != "0" and not hosts):  # RFC 9112, 3.2
        raise RefusedError(400, "a request names its host once")
    absolute = _ABSOLUTE.match(target)  # RFC 9112, 3.2.2
    path = target[absolute.end() :] or "/" if absolute else target
    return Request(method, path.partition("?")[0])


def send(client: socket.socket, response: Response, *, with_body: bool = True) -> None:
    """Answer, and let the client take it in. Raises OSError if it does not."""
    client.settimeout(_TAKING)  # of all of it, however slowly it goes
    client.sendall(response.encode(with_body=with_body))
    with suppress(OSError):
        client.shutdown(socket.SHUT_WR)
        _ignore_the_rest(client)


def _ignore_the_rest(client: socket.socket) -> None:
    """To close with bytes unread would take the answer away from the client (RFC 9112, 9.6)."""
    end, left = time.monotonic() + _LEAVING, _MOST_IGNORED
    while left > 0 and (seconds := end - time.monotonic()) > 0:
        client.settimeout(seconds)
        size = len(client.recv(1 << 16))
        if not size:
            return
        left -= size
