"""JSON that is read a value at a time, so that a trace of any size takes little memory."""

import json
from collections.abc import Callable, Iterator

from vmexit.core.errors import VmexitError

_BLOCK = 1 << 16  # characters
_LONGEST = 1 << 20  # of one value: an event has a few hundred

_SPACE = " \t\r\n"

# What may be left of a literal or a number that was cut off, and how long an escape is.
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_PARTS_OF_NUMBER = (".", "e", "E", "e+", "e-", "E+", "E-")
_ESCAPE = len("\\uXXXX")
# How much of a number may follow where it seems to be over: 1, and then e+6.
_LOOK_AHEAD = len("e+6")


class TraceError(VmexitError):
    """The trace is missing, cannot be read, or is none."""

    exit_status = 2


class JsonStream:
    """The values of a text, one after the other."""

    def __init__(self, read: Callable[[int], str]) -> None:
        """`read(n)` gives at most `n` more characters, and none at the end."""
        self._read = read
        self._buffer = ""
        self._at = 0
        self._gone = 0  # characters that were in the buffer before
        self._ended = False
        self._decode = json.JSONDecoder().raw_decode
        self.cut_off = False
        """Whether the text ended within a value, or within a list of them."""

    def _more(self) -> bool:
        """Read on; False at the end."""
        if self._ended:
            return False
        text = self._read(max(_BLOCK, len(self._buffer) - self._at))
        self._gone += self._at
        self._buffer = self._buffer[self._at :] + text
        self._at = 0
        self._ended = not text
        return not self._ended

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            buffer, at = self._buffer, self._at
            while at < len(buffer) and buffer[at] in _SPACE:
                at += 1
            self._at = at
            if at < len(buffer):
                return buffer[at]
            if not self._more():
                return ""

    def take(self, characters: str) -> str:
        """The next character, which must be one of these; empty at the end. Raises TraceError."""
        found = self.peek()
        if found and found not in characters:
            raise self.error()
        self._at += len(found)
        return found

    def value(self) -> object:
        """The next value; None, with `cut_off`, where the text ends in it. Raises TraceError."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                broken = not _is_cut_off(error)
            except (ValueError, RecursionError) as error:  # a number of thousands of digits
                raise self.error() from error
            else:
                near_end = end + _LOOK_AHEAD > len(self._buffer)
                if near_end and not self._ended:
                    self._more()
                    continue
                if not near_end or self._buffer[end:] not in _PARTS_OF_NUMBER:
                    self._at = end
                    return value
                broken = False
            if broken or len(self._buffer) - self._at > _LONGEST:
                raise self.error()
            if not self._more():
                self.cut_off = True
                self._at = len(self._buffer)
                return None

    def elements(self) -> Iterator[object]:
        """The values of a list, from its `[` on, one by one. Raises TraceError."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            value = self.value()
            if self.cut_off:
                return
            yield value
            separator = self.take(",]")
            if separator == "]":
                return
            if not separator or not self.peek():
                self.cut_off = True
                return

    def members(self) -> Iterator[str]:
        """The keys of an object, from its `{` on; the caller reads the value of each."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            key = self.value()
            if self.cut_off:
                return
            if not isinstance(key, str):
                raise self.error()
            self.take(":")
            yield key
            separator = "" if self.cut_off else self.take(",}")
            if separator == "}":
                return
            if not separator:
                self.cut_off = True
                return

    def error(self) -> TraceError:
        """That this is no JSON, and where."""
        return TraceError(f"no JSON at character {self._gone + self._at}")


def _is_cut_off(error: json.JSONDecodeError) -> bool:
    """Whether more text could have made it right."""
    if error.msg.startswith("Unterminated"):
        return True
    rest = error.doc[error.pos :].rstrip(_SPACE)
    if error.msg.startswith("Invalid \\"):
        return len(rest) < _ESCAPE
    return not rest or rest in _PARTS_OF_NUMBER or any(word.startswith(rest) for word in _LITERALS)
