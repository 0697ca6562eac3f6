"""JSON values in a stream of bytes: where each ends, and what it says.

As in QEMU a value ends where its last bracket closes, whatever lines there are. After what is no
JSON the next line is looked at.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

MAX_MESSAGE = 1 << 20  # bytes
MAX_DEPTH = 128  # brackets within brackets; well within what the parser's recursion takes

# Any JSON value.
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class Malformed(NamedTuple):
    """Something came that is no message; `reason` says why."""

    reason: str


# What matters outside of strings: brackets, the beginning of a string, and bytes that no JSON has.
_OUTSIDE = re.compile(rb'["{}\[\]]|[^\t\n\r -~]')
# Within one: its end, a backslash, and control characters, which have to be written as \uXXXX.
_WITHIN = re.compile(rb'["\\\x00-\x1f]')
_SPACE = b" \t\r\n"
_SURROGATE = re.compile("[\ud800-\udfff]")


class MessageReader:
    """Cuts a stream into messages. It holds `MAX_MESSAGE` bytes of an unfinished one at most."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._seen = 0  # so many bytes of it belong to the message under way
        self._depth = 0
        self._in_string = False
        self._skipping = False  # until the end of the line

    def feed(self, data: bytes) -> Iterator["Json | Malformed"]:
        """The messages that `data` completes, in order."""
        self._buffer += data
        while self._buffer:
            if self._skipping and not self._skip():
                return
            if not self._depth:
                self._drop_space()
                if not self._buffer:
                    return
                if self._buffer[0] not in b"{[":
                    yield self._fail(_stray(self._buffer))
                    continue
            why = self._scan()
            if why is None:  # it is not complete
                return
            yield self._take() if not why else self._fail(why)

    def _drop_space(self) -> None:
        kept = self._buffer.lstrip(_SPACE)
        del self._buffer[: len(self._buffer) - len(kept)]

    def _skip(self) -> bool:
        """Drop the rest of the line; False if its end is still to come."""
        end = self._buffer.find(b"\n")
        del self._buffer[: end + 1 or len(self._buffer)]
        self._skipping = end < 0
        return not self._skipping

    def _fail(self, reason: str) -> Malformed:
        """Forget the message under way, and the line where it turned out to be none."""
        # What was scanned is dropped first: its lines are not looked at again.
        del self._buffer[: self._seen]
        self._restart()
        self._skipping = True
        return Malformed(reason)

    def _restart(self) -> None:
        self._seen = self._depth = 0
        self._in_string = False

    def _scan(self) -> str | None:
        """Go on to the end of the message: empty there, None before, else why it is none."""
        while True:
            pattern = _WITHIN if self._in_string else _OUTSIDE
            found = pattern.search(self._buffer, self._seen, MAX_MESSAGE)
            if found is None:
                self._seen = min(len(self._buffer), MAX_MESSAGE)
                return f"it is longer than {MAX_MESSAGE} bytes" if self._is_long() else None
            byte = self._buffer[found.start()]
            if byte == 0x5C:  # a backslash: what follows is no end
                if found.end() >= MAX_MESSAGE:
                    return f"it is longer than {MAX_MESSAGE} bytes"
                if found.end() == len(self._buffer):
                    self._seen = found.start()
                    return None
                self._seen = found.end() + 1
                continue
            if byte < 0x20 or byte > 0x7E:
                self._seen = found.start()
                return f"stray byte 0x{byte:02x}"
            self._seen = found.end()
            if byte == 0x22:
                self._in_string = not self._in_string
            elif byte in b"{[":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    return f"it is nested more than {MAX_DEPTH} levels deep"
            else:
                self._depth -= 1
                if not self._depth:
                    return ""

    def _is_long(self) -> bool:
        return len(self._buffer) >= MAX_MESSAGE

    def _take(self) -> "Json | Malformed":
        text = bytes(self._buffer[: self._seen])
        try:
            value = _parse(text)
        except (ValueError, RecursionError) as error:
            return self._fail(_reason(error))
        del self._buffer[: self._seen]
        self._restart()
        return value


def _stray(buffer: bytearray) -> str:
    byte = buffer[0]
    return f"stray {chr(byte)!r}" if 0x20 <= byte <= 0x7E else f"stray byte 0x{byte:02x}"


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return str(error)


def _parse(text: bytes) -> Json:
    """Raises ValueError for what RFC 8259, or QEMU, does not allow."""
    decoded = text.decode("utf-8")
    value: Json = json.loads(
        decoded,
        object_pairs_hook=_object,
        parse_int=_integer,
        parse_float=_number,
        parse_constant=_constant,
    )
    if "\\u" in decoded and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half of a surrogate pair")
    return value


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _integer(text: str) -> int:
    if len(text) > 20:  # -2^63 and 2^64 - 1 have no more
        raise ValueError(f"the number {text[:20]}... is out of range")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"there is no {name} in JSON")


def encode(value: Json) -> bytes:
    """One line. Everything that is not ASCII is escaped, as QEMU does it."""
    return json.dumps(value).encode("ascii") + b"\r\n"
