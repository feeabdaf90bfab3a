"""What Prometheus may ask. Imported only where a metrics address is set."""

import threading
from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIServer

import structlog
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from csi_driver.model.errors import DriverError, FailedPrecondition
from csi_driver.rpc.endpoint import host_and_port
from csi_driver.volumes.health import Health

_log = structlog.get_logger(__name__)
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """A registry with the driver's metrics, and the HTTP server that shows it at `address` (host:port)."""

    def __init__(self, address: str, health: Health) -> None:
        self._address = address
        self._registry = CollectorRegistry()
        self._durations = Histogram(
            "luks_csi_rpc_duration_seconds",
            "Duration of the calls of the CSI services.",
            ("method", "code"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._children: dict[tuple[str, str], Histogram] = {}
        self._registry.register(_State(health))
        ProcessCollector(registry=self._registry)
        self._server: tuple[WSGIServer, threading.Thread] | None = None

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Count one call."""
        child = self._children.get((method, code))
        if child is None:
            child = self._children[method, code] = self._durations.labels(method, code)
        child.observe(seconds)

    def start(self) -> None:
        """Listen. Raises FailedPrecondition when the address cannot be used."""
        host, port = host_and_port(self._address)
        try:
            self._server = start_http_server(port, host or "0.0.0.0", self._registry)  # noqa: S104 - as asked for
        except OSError as error:
            raise FailedPrecondition(
                f"the metrics address {self._address} cannot be used ({error.strerror}); choose another"
            ) from None

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None


class _State(Collector):
    """Gauges that are read when they are asked for; one that cannot be read is left out."""

    def __init__(self, health: Health) -> None:
        self._gauges: dict[str, tuple[str, Callable[[], int]]] = {
            "luks_csi_open_mappings": ("Open LUKS mappings of volumes on this node.", health.open_mappings),
            "luks_csi_free_bytes": ("Bytes that new volumes may take on this node.", health.free_bytes),
        }

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, (meaning, read) in self._gauges.items():
            try:
                yield GaugeMetricFamily(name, meaning, value=read())
            except (DriverError, OSError) as error:
                _log.warning("metric left out", metric=name, error=str(error))
