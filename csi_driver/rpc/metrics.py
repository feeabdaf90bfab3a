"""What Prometheus may ask. Imported only where an HTTP address is set."""

from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from csi_driver.host.log import log
from csi_driver.model.errors import DriverError
from csi_driver.rpc.http import Page

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

Gauges = Mapping[str, tuple[str, Callable[[], int | Mapping[str, int]]]]


class Metrics:
    """A registry with the durations of calls and `gauges`: name, meaning, what reads it: a number, or one for each KMS.

    Those whose names end in "_total" are counters.
    """

    def __init__(self, gauges: Gauges) -> None:
        self._registry = CollectorRegistry()
        self._durations = Histogram(
            "luks_csi_rpc_duration_seconds",
            "Duration of the calls of the CSI services.",
            ("method", "code"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._kms = Histogram(
            "luks_csi_kms_request_duration_seconds",
            "Duration of the requests to key management systems.",
            ("kms", "operation", "outcome"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._children: dict[tuple[str, str], Histogram] = {}
        self._registry.register(_Read(gauges))
        ProcessCollector(registry=self._registry)

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Count one call."""
        child = self._children.get((method, code))
        if child is None:
            child = self._children[method, code] = self._durations.labels(method, code)
        child.observe(seconds)

    def observe_kms(self, kms_id: str, operation: str, outcome: str, seconds: float) -> None:
        """Count one request to a key management system."""
        self._kms.labels(kms_id, operation, outcome).observe(seconds)

    def page(self) -> Page:
        """All of it in Prometheus' text format."""
        return Page(HTTPStatus.OK, generate_latest(self._registry), CONTENT_TYPE_LATEST)


class _Read(Collector):
    """Gauges that are read when they are asked for; one that cannot be read is left out."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        for name, (meaning, read) in self._gauges.items():
            try:
                family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                found = read()
                if isinstance(found, int):
                    yield family(name, meaning, value=found)
                    continue
                labelled = family(name, meaning, labels=("kms",))
                for kms_id, value in found.items():
                    labelled.add_metric((kms_id,), value)
                yield labelled
            except (DriverError, OSError) as error:
                log.warning("metric left out", metric=name, error=str(error))
