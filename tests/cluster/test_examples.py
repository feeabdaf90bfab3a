"""The examples for users, applied as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.driver import DEPLOY, folder_of, mapping_of, node_of, volume_of
from tests.cluster.leftovers import assert_clean

_EXAMPLES = DEPLOY / "examples"
_SECONDS = 120
_MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("driver")


@contextmanager
def _applied(cluster: Cluster, name: str, namespace: str = "default") -> Iterator[None]:
    """Have an example in the cluster; at the end it is gone and has left nothing on the nodes."""

    def gone() -> bool:
        # As a person would, but without the half minute that a container gets which does not listen to SIGTERM.
        for kind in ("StatefulSet", "Pod", "PersistentVolumeClaim"):
            cluster.api.raw("DELETE", cluster.api.path(kind, namespace=namespace), {"gracePeriodSeconds": 1})
        there = [*cluster.items("Pod", namespace), *cluster.items("PersistentVolume")]
        assert not there, [one["metadata"]["name"] for one in there]
        return True

    try:
        cluster.apply(_EXAMPLES / name)
        yield
    finally:
        cluster.wait(f"end of {name}", gone, _SECONDS)
        cluster.delete(_EXAMPLES / name)
    for node in cluster.nodes:
        assert_clean(node)


def _run(cluster: Cluster, pod: str, script: str, namespace: str = "default") -> list[str]:
    cluster.pod_running(pod, namespace, _SECONDS)
    return cluster.pod_exec(pod, ["sh", "-ec", script], namespace).decode().split()


def _written(path: str) -> str:
    """A command that waits until the pod has written a file."""
    return f"timeout 20 sh -c 'until test -s {path}; do sleep 0.2; done'"


def _assert_encrypted(cluster: Cluster, claim: str, mib: int, namespace: str = "default") -> None:
    """A claim's volume is a LUKS2 container on its node, open, and has the size that was asked for."""
    volume = volume_of(cluster, claim, namespace)
    (node,) = (node for node in cluster.nodes if node.name == node_of(volume))
    node.run(f"cryptsetup isLuks --type luks2 {folder_of(volume)}/disk.img")
    assert int(node.run(f"blockdev --getsize64 {mapping_of(volume)}").text) == mib * _MIB


def test_all_are_tried_here() -> None:
    assert {path.name for path in _EXAMPLES.iterdir()} == {"pod.yaml", "block.yaml", "statefulset.yaml"}


def test_a_pod_writes_as_an_ordinary_user(cluster: Cluster) -> None:
    with _applied(cluster, "pod.yaml"):
        assert (
            _run(cluster, "notes", f"{_written('/notes/started')}; id -u; stat -c '%u %g' /notes/started")
            == ["1000"] * 3
        )
        _assert_encrypted(cluster, "notes", 1024)


def test_a_pod_has_a_block_device(cluster: Cluster) -> None:
    with _applied(cluster, "block.yaml"):
        assert _run(cluster, "disk", "test -b /dev/xvda; blockdev --getsize64 /dev/xvda") == [str(1024 * _MIB)]
        _assert_encrypted(cluster, "disk", 1024)


def test_a_stateful_set_has_a_volume_per_replica(cluster: Cluster) -> None:
    with _applied(cluster, "statefulset.yaml", "store"):
        for name in ("store-0", "store-1"):
            assert _run(cluster, name, f"{_written('/data/name')}; cat /data/name", "store") == [name]
            _assert_encrypted(cluster, f"data-{name}", 256, "store")
