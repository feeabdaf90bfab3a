"""What the tests of other drivers' documents share: the documents' manifests, and a claim that a pod uses, as the API
and its node show it.
"""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.commands import Output
from tests.cluster.driver import claim, folder_of, mapping_of, node_of, pod, volume_id, volume_of
from tests.cluster.leftovers import assert_clean, opened
from tests.cluster.node import Node

MANIFESTS = Path(__file__).parent / "manifests"

_NAME = "data"
_END_SECONDS = 60


def read(cluster: Cluster, file: str) -> Json:
    """The one object of a manifest, as it was written."""
    one: Json = json.loads(
        cluster.kubectl("create", "--dry-run=client", "-o", "json", "-f", str(MANIFESTS / file)).stdout
    )
    return one


@contextmanager
def applied(cluster: Cluster, *manifests: Json | Path) -> Iterator[None]:
    """Have these objects in the cluster; at the end they are gone."""
    try:
        for manifest in manifests:
            cluster.apply(manifest)
        yield
    finally:
        for manifest in reversed(manifests):
            cluster.delete(manifest)


class Volume:
    """An encrypted volume, as its node shows it: its `file`, and the `mapping` while it is staged."""

    def __init__(self, node: Node, volume: Json) -> None:
        self.node = node
        self.id = volume_id(volume)
        self.file = f"{folder_of(volume)}/disk.img"
        self.mapping = mapping_of(volume)

    def loops(self) -> list[str]:
        """The loop devices on its file."""
        return self.node.run(f"losetup --noheadings --output NAME --associated {self.file}").text.split()

    def opened(self) -> list[str]:
        """What of it is open on the node: mapping, loop devices, mounts, volume key, in words."""
        return opened(self.node, self.id)

    def header(self, device: str) -> str:
        """What luksDump shows of it."""
        return self.node.run(f"cryptsetup luksDump {device}").text

    def luks_open(self, device: str, passphrase: str) -> Output:
        """An administrator's try to open it once more, as the mapping `second`."""
        script = f"timeout 20 cryptsetup luksOpen --key-file - {device} second"
        return self.node.run(script, stdin=passphrase.encode(), check=False)

    def lines_with(self, pattern: str, device: str) -> int:
        """How many lines of a file or device hold the pattern, past all caches."""
        script = f"sync; dd if={device} bs=1M iflag=direct status=none | LC_ALL=C grep -a -c -F {pattern}; true"
        counted = self.node.run(script, timeout=60)
        assert not counted.stderr, counted.said  # dd has read it all
        return int(counted.text)


class Workload:
    """A claim of a class and a Deployment of one pod that uses it, the only ones in their namespace.

    The pod has a file system or, with `block`, a device. Both are there from `create` on.
    """

    def __init__(self, cluster: Cluster, namespace: str, storage_class: str, *, block: bool = False) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.claim_name = _NAME
        self.storage_class = storage_class
        self._block = block
        self._place = "/dev/data" if block else "/data/text"

    def create(self) -> None:
        """Claim and Deployment, without waiting for anything."""
        mode = "Block" if self._block else "Filesystem"
        labels = {"app": _NAME}
        template = pod(_NAME, _NAME, block=self._block, node="")
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": _NAME},
            "spec": {
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": template["spec"]},
            },
        }
        self.cluster.apply([claim(_NAME, "64Mi", self.storage_class, volumeMode=mode), deployment], self.namespace)

    @property
    def claim(self) -> Json:
        return self.cluster.api.get("PersistentVolumeClaim", _NAME, self.namespace)

    def wait_claim_event(self, *words: str) -> str:
        """Until an event of the claim says all these, and that event."""
        return self.cluster.wait_event("PersistentVolumeClaim", _NAME, self.namespace, *words)

    @property
    def pods(self) -> list[Json]:
        return self.cluster.items("Pod", self.namespace)

    def wait_pod(self) -> Json:
        """Until the Deployment has made its pod, and that pod."""
        return self.cluster.wait("pod of the Deployment", lambda: next(iter(self.pods), None))

    def wait_running(self, timeout: float = 90) -> Json:
        """Until its pod is up and healthy, and that pod."""
        return self.cluster.pod_running(self.wait_pod()["metadata"]["name"], self.namespace, timeout)

    def run(self, script: str) -> str:
        """What a script of sh says in the running pod."""
        name = self.wait_running()["metadata"]["name"]
        return self.cluster.pod_exec(name, ["sh", "-c", script], self.namespace).decode()

    def write(self) -> str:
        """Have the pod write something nobody knows, fsynced; that text."""
        text = secrets.token_hex(32)
        self.run(f"echo {text} | dd of={self._place} conv=fsync 2>/dev/null")
        return text

    def reads(self) -> str:
        """What `write` has written, read by the pod from the device."""
        self.volume().node.run("echo 1 > /proc/sys/vm/drop_caches")
        return self.run(f"dd if={self._place} bs=64 count=1 2>/dev/null")

    def volume(self) -> Volume:
        """Its volume, on the node that has it."""
        volume = volume_of(self.cluster, _NAME, self.namespace)
        return Volume(next(node for node in self.cluster.nodes if node.name == node_of(volume)), volume)

    def scale(self, replicas: int) -> None:
        """To 1: without waiting; to 0: until the pod is gone and the volume unstaged."""
        self.cluster.api.patch("Deployment", _NAME, self.namespace, {"spec": {"replicas": replicas}})
        if replicas:
            return
        volume = self.volume()

        def ended() -> bool:
            assert not self.pods
            assert not volume.opened(), volume.opened()
            return True

        self.cluster.wait("end of the pod and its stage", ended, _END_SECONDS)


@contextmanager
def workload(cluster: Cluster, storage_class: str, *, block: bool = False) -> Iterator[Workload]:
    """A workload in a namespace of its own. At the end it is gone, and nothing of it is left on any node."""
    others = {volume_id(volume) for volume in cluster.items("PersistentVolume")}
    with cluster.namespace() as namespace:
        yield Workload(cluster, namespace, storage_class, block=block)
    for node in cluster.nodes:
        assert_clean(node, others)
