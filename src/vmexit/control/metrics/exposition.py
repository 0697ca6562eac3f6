"""The text format in which Prometheus reads metrics, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_NO_LABELS: Mapping[str, str] = {}


class Kind(Enum):
    """What a scraper may do with a value: the difference of counters, the gauge as it is."""

    COUNTER = "counter"
    GAUGE = "gauge"


class Sample(NamedTuple):
    """One value, of one combination of labels."""

    value: int | float
    labels: Mapping[str, str] = _NO_LABELS


class Family(NamedTuple):
    """A metric: its samples differ in their labels. `help` is one line for people."""

    name: str
    kind: Kind
    help: str
    samples: Iterable[Sample]


def counter(name: str, text: str, samples: Iterable[Sample]) -> Family:
    """What only grows; its name ends in `_total`."""
    return Family(name, Kind.COUNTER, text, samples)


def gauge(name: str, text: str, samples: Iterable[Sample]) -> Family:
    """What goes up and down."""
    return Family(name, Kind.GAUGE, text, samples)


def exposition(families: Iterable[Family]) -> bytes:
    """All of them as text; a family without samples is left out."""
    return "".join(_lines(families)).encode("utf-8", "backslashreplace")


def _lines(families: Iterable[Family]) -> Iterator[str]:
    for name, kind, text, samples in families:
        head = f"# HELP {name} {_escaped(text)}\n# TYPE {name} {kind.value}\n"
        for value, labels in samples:
            yield f"{head}{name}{_labels(labels)} {value!r}\n"
            head = ""


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = [f'{name}="{_quotable(value)}"' for name, value in labels.items()]
    return f"{{{','.join(pairs)}}}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quotable(text: str) -> str:
    return _escaped(text).replace('"', '\\"')
