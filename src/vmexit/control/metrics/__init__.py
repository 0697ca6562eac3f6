"""Numbers of a running machine for Prometheus: `MetricsServer(vm, "unix:PATH", stats)`."""

from vmexit.control.metrics.server import MetricsServer

__all__ = ["MetricsServer"]
