"""What Prometheus gets to know of the requests to key management systems."""

import pytest

from csi_driver.keys.base import KeyRequest
from csi_driver.model.errors import KeyLost
from csi_driver.rpc.metrics import Metrics
from tests.keys.given import GivenSources
from tests.machine.keeping import KeepingKms

REQUEST = KeyRequest("pvc-1")


def test_each_request_to_a_kms_is_counted_by_operation_and_outcome() -> None:
    kms, metrics = KeepingKms(), Metrics({})
    sources = GivenSources(kms=kms)
    sources.observers.append(metrics.observe_kms)
    trail = sources.create("kms", "pvc-1.1", REQUEST, "test")
    for _ in range(2):
        sources.fetch(trail, REQUEST, "test")
    sources.destroy(trail, REQUEST, "test")
    with pytest.raises(KeyLost):
        sources.fetch(trail, REQUEST, "test")
    lines = metrics.page().body.decode().splitlines()
    for operation, outcome, count in (
        ("create", "OK", 1), ("fetch", "OK", 2), ("destroy", "OK", 1), ("fetch", "KeyLost", 1),
    ):  # fmt: skip
        labels = f'{{kms="kms",operation="{operation}",outcome="{outcome}"}}'
        assert f"luks_csi_kms_request_duration_seconds_count{labels} {count}.0" in lines
        (total,) = [each for each in lines if each.startswith(f"luks_csi_kms_request_duration_seconds_sum{labels} ")]
        assert float(total.split()[1]) >= 0
