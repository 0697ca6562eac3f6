"""`MetricsServer`: a machine that Prometheus scrapes."""

import socket

from vmexit.control.metrics import http
from vmexit.control.metrics.exposition import CONTENT_TYPE, exposition
from vmexit.control.metrics.families import families
from vmexit.control.server import Address, Server, Service
from vmexit.core.exit_stats import ExitStats
from vmexit.machine.machine import Machine

PATH = "/metrics"
MOST_CLIENTS = 16
_METHODS = "GET, HEAD"


class MetricsServer(Service):
    """Answers `GET /metrics` from now until `close()`, also while vCPUs run.

    >>> with Machine(memory="1M") as vm, MetricsServer(vm, "unix:metrics.sock"):
    ...     vm.run()
    """

    def __init__(self, vm: Machine, address: str, stats: ExitStats | None = None) -> None:
        """`address` is `unix:PATH` or `tcp:HOST:PORT`; `stats` is an observer of the machine.

        Without `stats` nothing is told of exits. Raises ConfigError for an address that cannot be.
        """
        self._machine = vm
        self._stats = stats
        where = Address.parse(address, "--metrics")
        self._server = Server(where, self._serve, "metrics", most=MOST_CLIENTS, refuse=_refuse)

    def _serve(self, client: socket.socket) -> None:
        try:
            request = http.receive(client)
        except http.RefusedError as error:
            http.send(client, error.response)
            return
        if request is not None:
            http.send(client, self._answer(request), with_body=request.method != "HEAD")

    def _answer(self, request: http.Request) -> http.Response:
        if request.path != PATH:
            return http.Response(404, f"there is only {PATH}\n".encode())
        if request.method not in ("GET", "HEAD"):
            return http.Response(405, f"use {_METHODS}\n".encode(), allow=_METHODS)
        return http.Response(200, exposition(families(self._machine, self._stats)), CONTENT_TYPE)


def _refuse(client: socket.socket) -> None:
    """One client too many, who is not waited for."""
    client.setblocking(False)
    client.send(http.Response(503, b"too many clients; try again\n").encode(with_body=True))
