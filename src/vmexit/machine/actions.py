"""What a user wants to come after the guest's end: `--action reboot=reset,shutdown=pause`."""

from typing import NamedTuple

from vmexit.core.errors import ConfigError, quoted
from vmexit.machine.lifecycle import After
from vmexit.machine.options import Options
from vmexit.machine.stop import Stop, StopReason

_WORDS = {"exit": After.END, "pause": After.HOLD, "reset": After.RESET}
# These are a debugger's, and nobody else's.
_NO_END = (StopReason.DEBUG, StopReason.UNTIL, StopReason.IRQ_WINDOW)


class Actions(NamedTuple):
    """What comes after a shutdown of the guest, after a reboot, and after a crash."""

    shutdown: After = After.END
    reboot: After = After.END
    panic: After = After.END

    @classmethod
    def parse(cls, texts: list[str]) -> "Actions":
        """`EVENT=exit|pause|reset,…`, any number of times. Raises ConfigError."""
        found = {}
        for text in texts:
            options = Options("--action", text, cls._fields)
            for event in cls._fields:
                for word in options.all(event):
                    if word not in _WORDS:
                        raise ConfigError(
                            f"--action {event}={quoted(word)[1:-1]} cannot be; use exit, pause or "
                            "reset"
                        )
                    found[event] = _WORDS[word]
        return cls(**found)

    def decide(self, stop: Stop) -> After:
        """For `Machine.decide()`."""
        if stop.reason in _NO_END:
            return After.END
        if stop.crashed:
            return self.panic
        return self.reboot if stop.reason is StopReason.RESET else self.shutdown
