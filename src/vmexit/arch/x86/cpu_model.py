"""What a user asks of a processor: `--cpu`. Names of features are loaded only if one is given."""

from typing import TYPE_CHECKING, NamedTuple

from vmexit.core.errors import ConfigError

if TYPE_CHECKING:
    from vmexit.arch.x86.cpuid import Table


class CpuModel(NamedTuple):
    """All that the accelerator has, but for some features; others it must have."""

    required: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "CpuModel":
        """`host` or `max`, which are the same here, then `,+feature` and `,-feature`.

        Raises ConfigError.
        """
        base, *changes = text.split(",")
        if base not in ("host", "max"):
            raise ConfigError(
                f"there is no processor {base!r}; use host or max, with ,+feature or ,-feature"
            )
        named: dict[str, list[str]] = {"+": [], "-": []}
        for change in changes:
            sign = change[:1]
            if sign not in named:
                raise ConfigError(f"{change!r} of --cpu is neither +feature nor -feature")
            named[sign].append(_feature(change[1:]))
        return cls(tuple(named["+"]), tuple(named["-"]))

    def applied(self, table: "Table") -> "Table":
        """`table`, with all that the accelerator has, without what is left out.

        Raises ConfigError for a feature that it has not.
        """
        self.require(table)
        return self.without(table)

    def require(self, table: "Table") -> None:
        """Raises ConfigError for a feature that is required and not in `table`."""
        from vmexit.arch.x86.cpu_features import FEATURES

        for name in self.required:
            if not FEATURES[name].is_in(table):
                raise ConfigError(
                    f"the accelerator cannot offer {name} on this host; leave +{name} out"
                )

    def without(self, table: "Table") -> "Table":
        """`table` without what is left out."""
        from vmexit.arch.x86.cpu_features import FEATURES

        new = dict(table)
        for name in self.left_out:
            FEATURES[name].put_into(new, False)
        return new


def _feature(name: str) -> str:
    """The one name of a feature. Raises ConfigError."""
    from vmexit.arch.x86.cpu_features import FEATURES, canonical

    if known := canonical(name):
        return known
    import difflib

    close = difflib.get_close_matches(name, FEATURES, 3)
    hint = f"is it {' or '.join(close)}?" if close else "see vmexit doctor --cpuid"
    raise ConfigError(f"there is no CPU feature {name!r}; {hint}")
