"""Clients of `--metrics`: HTTP over a Unix socket, and Prometheus's own parser of what comes."""

import http.client
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families


class UnixConnection(http.client.HTTPConnection):
    """The standard library's client over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def ask(path: Path, target: str = "/metrics", method: str = "GET") -> Answer:
    connection = UnixConnection(path)
    connection.request(method, target)
    response = connection.getresponse()
    answer = Answer(response.status, response.headers, response.read())
    connection.close()
    return answer


def raw(path: Path, data: bytes) -> bytes:
    """What comes back for these bytes, to the end; empty if the server has cut it off."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        with suppress(OSError):  # it is not listened to any more
            client.sendall(data)
        answer = b""
        with suppress(ConnectionResetError):
            while piece := client.recv(1 << 16):
                answer += piece
        return answer


class Metrics(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """Values by name and labels: `metrics.value("vmexit_exits_total", reason="hlt")`."""

    def value(self, name: str, **labels: str) -> float:
        """The one that has at least these labels."""
        wanted = set(labels.items())
        found = [value for (n, have), value in self.items() if n == name and wanted <= have]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    def named(self, name: str) -> list[tuple[dict[str, str], float]]:
        return [(dict(have), value) for (n, have), value in self.items() if n == name]


def parse(text: str) -> Metrics:
    metrics = Metrics()
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("counter", "gauge"), family
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            key = sample.name, frozenset(sample.labels.items())
            assert key not in metrics, key
            metrics[key] = sample.value
    return metrics


def scrape(path: Path) -> Metrics:
    answer = ask(path)
    while answer.status == 503:  # too many at once: threads of those before have yet to end
        answer = ask(path)
    assert answer.status == 200
    return parse(answer.body.decode())
