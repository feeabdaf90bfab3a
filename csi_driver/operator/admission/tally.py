"""What was reviewed: counted for Prometheus, and when last, as an API that cannot reach us says nothing of it."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

ALLOWED: Final = "allowed"
REFUSED: Final = "refused"
FAILED: Final = "failed"


class Tally(Collector):
    """Counts by webhook and outcome; safe for many threads."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._last: dict[str, float] = {}

    def count(self, webhook: str, outcome: str) -> None:
        """One review more."""
        with self._guard:
            self._counts[webhook, outcome] += 1
            self._last[webhook] = self._clock()

    def counts(self) -> dict[tuple[str, str], int]:
        """How many, by webhook and outcome."""
        with self._guard:
            return dict(self._counts)

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """For Prometheus."""
        with self._guard:
            counts, last = dict(self._counts), dict(self._last)
        reviews = CounterMetricFamily(
            "luks_csi_operator_admission_reviews", "Requests that the Kubernetes API has had reviewed.",
            labels=("webhook", "outcome"),
        )  # fmt: skip
        for labels, value in counts.items():
            reviews.add_metric(labels, value)
        times = GaugeMetricFamily(
            "luks_csi_operator_admission_last_review_seconds", "When a webhook was asked last, in Unix time.",
            labels=("webhook",),
        )  # fmt: skip
        for webhook, at in last.items():
            times.add_metric((webhook,), at)
        return reviews, times
