"""What a user asks of a processor: `--cpu`. Names of features are loaded only if one is given."""

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from vmexit.core.errors import ConfigError, HostError, quoted

if TYPE_CHECKING:
    from vmexit.arch.x86.cpuid import Table

_LONGEST = 64  # what is compared with the names of features


class CpuModel(NamedTuple):
    """All that the accelerator has, but for some features; others it must have."""

    required: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    @lru_cache(maxsize=64)
    def parse(cls, text: str) -> "CpuModel":
        """`host` or `max`, which are the same here, then `,+feature` and `,-feature`.

        Raises ConfigError.
        """
        base, *changes = text.split(",")
        if base not in ("host", "max"):
            raise ConfigError(
                f"--cpu: there is no processor {quoted(base)}; use host or max, with ,+feature or "
                ",-feature"
            )
        named: dict[str, dict[str, None]] = {"+": {}, "-": {}}
        for change in changes:
            sign = change[:1]
            if not sign:
                raise ConfigError(
                    "--cpu has a comma with no feature behind it; use ,+feature or ,-feature"
                )
            if sign not in named:
                raise ConfigError(
                    f"--cpu: {quoted(change)} is neither +feature nor -feature; "
                    "begin it with + or -"
                )
            named[sign][_feature(change[1:])] = None
        model = cls(tuple(named["+"]), tuple(named["-"]))
        model._check()
        return model

    def _check(self) -> None:
        """Raises ConfigError for a feature that is both required and left out."""
        if not self.required or not self.left_out:
            return
        from vmexit.arch.x86.cpu_features import with_dependents

        for name in self.left_out:
            for lost in with_dependents([name]):
                if lost in self.required:
                    why = f", without which there is no {lost}" if lost != name else ""
                    raise ConfigError(
                        f"--cpu asks for +{lost} and leaves out {name}{why}; give one of them"
                    )

    def applied(self, table: "Table", accelerator: str) -> "Table":
        """`table`, with all that the accelerator has, without what is left out.

        Raises HostError for a feature that it has not.
        """
        self.require(table, accelerator)
        return self.without(table)

    def require(self, table: "Table", accelerator: str) -> None:
        """Raises HostError for a feature that is required and not in `table`."""
        from vmexit.arch.x86.cpu_features import FEATURES

        for name in self.required:
            if not FEATURES[name].is_in(table):
                raise HostError(
                    f"{accelerator} cannot offer {name} on this host; leave +{name} out"
                )

    def without(self, table: "Table") -> "Table":
        """`table` without what is left out and what depends on it."""
        from vmexit.arch.x86.cpu_features import without

        return without(table, self.left_out)


def _feature(name: str) -> str:
    """The one name of a feature. Raises ConfigError."""
    from vmexit.arch.x86.cpu_features import FEATURES, canonical

    if known := canonical(name):
        return known
    import difflib

    close = difflib.get_close_matches(name[:_LONGEST], FEATURES, 3)
    hint = f"is it {' or '.join(close)}?" if close else "see vmexit doctor --cpuid"
    raise ConfigError(f"--cpu: there is no CPU feature {quoted(name)}; {hint}")
