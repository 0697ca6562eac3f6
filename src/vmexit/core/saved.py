"""Reading a saved state that may have come from anywhere."""

from vmexit.core.bus import State
from vmexit.core.errors import ConfigError


class Saved:
    """The state of `what`, in which nothing is believed.

    Raises ConfigError at once if its version is another, and whenever a field is not as asked.
    """

    def __init__(self, state: State, what: str, version: int) -> None:
        self._state = state
        self._what = f"{what}, version {version}"
        if state.get("version") != version:
            raise self.error()

    def error(self) -> ConfigError:
        """What to raise for a field that contradicts another."""
        return ConfigError(f"this is not the state of {self._what}; save it anew")

    def number(self, key: str, top: int, least: int = 0) -> int:
        """A number from `least` to `top`."""
        value = self._state.get(key)
        if not isinstance(value, int) or not least <= value <= top:
            raise self.error()
        return int(value)

    def flag(self, key: str) -> bool:
        """A truth value."""
        return bool(self.number(key, 1))

    def optional(self, key: str, top: int, least: int = 0) -> int | None:
        """A number from `least` to `top`, or None."""
        return None if self._state.get(key, 0) is None else self.number(key, top, least)

    def numbers(self, key: str, top: int, count: int) -> list[int]:
        """So many numbers from 0 to `top`."""
        values = self._state.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise self.error()
        if not all(isinstance(value, int) and 0 <= value <= top for value in values):
            raise self.error()
        return values.copy()

    def data(self, key: str, top: int, least: int = 0) -> bytes:
        """From `least` to `top` bytes."""
        value = self._state.get(key)
        if not isinstance(value, bytes) or not least <= len(value) <= top:
            raise self.error()
        return value

    def part(self, key: str) -> "Saved":
        """The state of a part, of the same version."""
        value = self._state.get(key)
        if not isinstance(value, dict):
            raise self.error()
        part = Saved.__new__(Saved)
        part._state, part._what = value, self._what
        return part
