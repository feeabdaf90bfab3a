"""Many volumes at once: a StatefulSet scaled up and down again."""

import statistics
import time
from collections.abc import Callable
from datetime import datetime

import pytest

from tests.cluster.api import Json
from tests.cluster.driver import BUSYBOX, CHEAP, claim
from tests.cluster.leftovers import left_on
from tests.cluster.pods import Pods

_VOLUMES = 100
_SECONDS_EACH = 30  # patience alone: on two cores to themselves a volume took 5
_SETTLE_SECONDS = 120
_PAUSE_SECONDS = 1.0


def _stateful_set(replicas: int, node: str) -> Json:
    labels = {"app": "many"}
    container = {
        "name": "main",
        "image": BUSYBOX,
        "command": ["sh", "-c", "hostname > /data/name; trap exit TERM; sleep infinity & wait"],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "resources": {"requests": {"cpu": "1m", "memory": "1Mi"}},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "many"},
        "spec": {
            "serviceName": "many",
            "replicas": replicas,
            "podManagementPolicy": "Parallel",
            "persistentVolumeClaimRetentionPolicy": {"whenScaled": "Delete", "whenDeleted": "Delete"},
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "terminationGracePeriodSeconds": 5,
                    "nodeSelector": {"kubernetes.io/hostname": node},
                    "containers": [container],
                },
            },
            "volumeClaimTemplates": [claim("data", "32Mi", CHEAP)],
        },
    }


def _memory_mib(pods: Pods) -> int:
    """What the driver's container takes: the proportional sets of the server and of what it started."""
    script = """
        server=$(pgrep -o -f 'luks-csi serve')
        for pid in $(pgrep -s $(ps -o sid= -p $server)); do cat /proc/$pid/smaps_rollup; done; true
    """
    lines = pods.node.run(script).text.splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) >> 10


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _seconds_to_ready(pods: Pods) -> list[float]:
    """Of each pod, from its claim's creation to the moment that it was Ready; kept in whole seconds by Kubernetes."""
    claims = {one["metadata"]["name"]: one for one in pods.cluster.items("PersistentVolumeClaim", pods.namespace)}
    found = []
    for one in pods.cluster.items("Pod", pods.namespace):
        (ready,) = (c for c in one["status"]["conditions"] if c["type"] == "Ready")
        made = claims[f"data-{one['metadata']['name']}"]["metadata"]["creationTimestamp"]
        found.append(_time(ready["lastTransitionTime"]) - _time(made))
    return sorted(found)


@pytest.mark.timeout(7200)
def test_many_volumes_come_and_go(pods: Pods, tell: Callable[[str], None]) -> None:
    pods.claim()
    pods.start("first")  # the server has loaded all it needs
    pods.end("first")
    pods.cluster.delete([claim()], pods.namespace)
    count = _VOLUMES
    before = _memory_mib(pods)
    begin = time.monotonic()
    pods.cluster.apply([_stateful_set(1, pods.node.name)], pods.namespace)
    pods.cluster.api.patch("StatefulSet", "many", pods.namespace, {"spec": {"replicas": count}})
    pods.cluster.wait_rolled_out("StatefulSet", "many", pods.namespace, count * _SECONDS_EACH + 60)
    up = time.monotonic() - begin
    full, times = _memory_mib(pods), _seconds_to_ready(pods)
    assert len(times) == count
    for number in (0, count - 1):
        assert pods.sh(f"many-{number}", "cat /data/name") == f"many-{number}"
    begin = time.monotonic()
    pods.cluster.api.patch("StatefulSet", "many", pods.namespace, {"spec": {"replicas": 0}})

    def gone() -> bool:
        assert not (left := pods.cluster.items("PersistentVolume")), f"{len(left)} volumes"
        return True

    pods.cluster.wait("end of the volumes", gone, count * _SECONDS_EACH + 60)
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (left := left_on(pods.node)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
    down = time.monotonic() - begin
    after = _memory_mib(pods)
    tell(
        f"cluster scale: volumes={count} failed=0 up_seconds={up:.0f} down_seconds={down:.0f} "
        f"per_pod_seconds={up / count:.2f} ready_median={statistics.median(times):.0f} "
        f"ready_p90={times[count * 9 // 10]:.0f} memory_mib before={before} full={full} after={after} left={len(left)}"
    )
    assert not left
    # What a volume leaves in the server's memory: nothing that grows with their number.
    assert after < before + 16, f"{before} MiB before, {after} MiB after"
