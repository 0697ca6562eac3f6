"""Interleaved rounds, their medians, and a row of the table."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

T = TypeVar("T")


class Unavailable(Exception):
    """This host lacks what a measurement needs; the message says what."""


@dataclass(frozen=True)
class Spread:
    """The quartiles of a number of measurements."""

    low: float
    median: float
    high: float

    def around(self, value: float) -> bool:
        """Whether `value` lies between the quartiles."""
        return self.low <= value <= self.high

    def text(self, unit: str, digits: int = 2, sign: str = "") -> str:
        """The median with its unit, and the quartiles."""
        low, median, high = (f"{v:{sign}.{digits}f}" for v in (self.low, self.median, self.high))
        return f"{median}{unit} ({low} to {high})"


def spread(values: Sequence[float]) -> Spread:
    """The quartiles of `values`; a single value is all three."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def differences(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of `ours - theirs`, round by round: what disturbs both sides of a round falls out."""
    return spread([a - b for a, b in zip(ours, theirs, strict=True)])


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of `ours / theirs`, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def interleave(rounds: int, sides: Sequence[Callable[[], T]]) -> list[list[T]]:
    """Call each side once a round, every other round in reverse; the results of each side."""
    results: list[list[T]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            results[side].append(sides[side]())
    return results


@dataclass(frozen=True)
class Row:
    """One comparison. `met` is None where there is no target or nothing was measured; `close`
    says that the target lies between the quartiles, so that another run may say otherwise.
    """

    name: str
    compared: str
    rounds: int = 0
    ours: str = "-"
    theirs: str = "-"
    result: str = "not measured"
    target: str = "-"
    met: bool | None = None
    close: bool = False
    figures: dict[str, object] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The target's column in words."""
        word = {True: "met", False: "MISSED", None: "-"}[self.met]
        return f"{word} (within the noise)" if self.close else word

    def as_json(self) -> dict[str, object]:
        """Plain data, quartiles included."""
        return asdict(self)


def attempt(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """What `rows` gives, then, if it comes to Unavailable, a row `name` that says why."""
    try:
        yield from rows
    except Unavailable as why:
        yield Row(name, f"not measured: {why}")


def table(rows: Sequence[Row]) -> str:
    """All rows side by side, and below what each compares."""
    head = ("row", "rounds", "vmexit", "against", "difference or ratio", "target", "")
    lines = [head] + [
        (r.name, str(r.rounds), r.ours, r.theirs, r.result, r.target, r.verdict) for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    notes = [f"{row.name}: {row.compared}" for row in rows]
    return "\n".join([*(line.rstrip() for line in text), "", *notes])
