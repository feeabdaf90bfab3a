"""Pods with claims of one test on one node, and what they see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.documents import Volume
from tests.cluster.driver import STATE, Driver, claim, pod, secret, volume_of
from tests.cluster.leftovers import assert_clean, assert_closed
from tests.cluster.node import Node

_POD_SECONDS = 120
_RESIZE_SECONDS = 90


@contextmanager
def filled(node: Node, left: int) -> Iterator[None]:
    """Have a node's disk so full that `left` bytes can be written to it; volumes may have that less the floor."""
    filler = f"{STATE}/filler"
    node.run(f"set -- $(stat -f -c '%a %S' {STATE}); fallocate -l $(($1 * $2 - {left})) {filler}")
    try:
        yield
    finally:
        node.run(f"rm {filler}")


class Pods:
    """The pods and claims of one test on one node, and their secret."""

    def __init__(self, cluster: Cluster, driver: Driver, namespace: str, node: Node) -> None:
        self.cluster = cluster
        self.driver = driver
        self.namespace = namespace
        self.node = node
        cluster.apply([secret()], namespace)

    def claim(self, name: str = "data", size: str = "32Mi", **more: Any) -> None:
        """A new claim, see `claim`."""
        self.cluster.apply([claim(name, size, **more)], self.namespace)

    def start(self, name: str, claim: str = "data", **more: Any) -> Json:
        """A new pod, see `pod`, as soon as it is running."""
        self.cluster.apply([pod(name, claim, node=self.node.name, **more)], self.namespace)
        return self.cluster.pod_running(name, self.namespace, _POD_SECONDS)

    def end(self, name: str, claim: str = "data") -> None:
        """Delete the last pod of a claim, and wait until the volume is closed on the node."""
        volume = self.volume(claim)
        self.cluster.api.delete("Pod", name, self.namespace)

        self.cluster.wait(f"end of pod {name}", lambda: not self.cluster.get("Pod", name, self.namespace))
        assert_closed(self.node, volume.id)

    def sh(self, name: str, script: str, stdin: bytes = b"") -> str:
        """What a script says in a pod; ClusterError if it fails."""
        return self.cluster.pod_exec(name, ["sh", "-ec", script], self.namespace, stdin=stdin).decode().strip()

    def get(self, name: str) -> Json:
        """A pod as it is now."""
        return self.cluster.api.get("Pod", name, self.namespace)

    def status(self, claim: str = "data") -> Json:
        """What a claim tells of itself."""
        found: Json = self.cluster.api.get("PersistentVolumeClaim", claim, self.namespace)["status"]
        return found

    def volume(self, claim: str = "data") -> Volume:
        """The volume of a claim on the node, bound or soon so."""
        return Volume(self.node, volume_of(self.cluster, claim, self.namespace))

    def room(self, name: str) -> int:
        """The size in bytes of the file system that a pod sees at /data."""
        blocks, size = self.sh(name, "stat -f -c '%b %S' /data").split()
        return int(blocks) * int(size)

    def device_bytes(self, claim: str = "data") -> int:
        """The size of a claim's open device."""
        return int(self.node.run(f"blockdev --getsize64 {self.volume(claim).mapping}").text)

    def resize(self, size: str, claim: str = "data") -> None:
        """Ask for another size of a claim."""
        wish = {"spec": {"resources": {"requests": {"storage": size}}}}
        self.cluster.api.patch("PersistentVolumeClaim", claim, self.namespace, wish)

    def wait_resized(self, size: str, claim: str = "data") -> None:
        """Until a claim has that size, and nothing of a resize is pending or has failed."""

        def resized() -> bool:
            status = self.status(claim)
            assert status["capacity"]["storage"] == size, status
            assert not status.get("conditions"), status
            return True

        self.cluster.wait(f"claim {claim} of {size}", resized, _RESIZE_SECONDS)


@pytest.fixture
def pods(cluster: Cluster, driver: Driver) -> Iterator[Pods]:
    """Pods and claims of one test on node 1. Nothing of them is left on any node at the end."""
    with cluster.namespace() as namespace:
        yield Pods(cluster, driver, namespace, cluster.node(1))
    for node in cluster.nodes:
        assert_clean(node)
