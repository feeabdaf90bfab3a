"""The driver in the cluster, the few objects that scenarios make of it, and what becomes of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.node import Node
from tests.cluster.settings import ROOT

NAMESPACE = "luks-csi"
NAME = "luks.csi.internal"
TOPOLOGY = f"topology.{NAME}/node"
STATE = "/var/lib/luks-csi"
DEPLOY = ROOT / "deploy" / "kubernetes"

BUSYBOX = "busybox:1"
KEY = "key"
PASSPHRASE = "a passphrase of the cluster tests"
CHEAP = "cheap"  # a class whose key derivation costs nothing; the passphrase is in the secret KEY beside the claim
_CHEAP_PBKDF = {"encrypted": "true", "pbkdf": "pbkdf2", "pbkdfIterations": "1000"}

_POD_SECONDS = 120


class Driver:
    """The installed driver, as it shows on a node."""

    def __init__(self, cluster: Cluster, namespace: str = NAMESPACE) -> None:
        self._cluster = cluster
        self._namespace = namespace

    def pod(self, node: Node) -> Json:
        """The driver's pod on a node; AssertionError if there is none that is Ready."""
        labels = "app.kubernetes.io/name=luks-csi,app.kubernetes.io/component=node"
        found = self._cluster.items("Pod", self._namespace, labels=labels, fields=f"spec.nodeName={node.name}")
        there = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
        assert len(there) == 1, f"{len(there)} pods of the driver on {node.name}"
        conditions = there[0]["status"].get("conditions", [])
        assert any(one["type"] == "Ready" and one["status"] == "True" for one in conditions), there[0]["status"]
        return there[0]

    def exec(self, node: Node, argv: Sequence[str], *, container: str = "driver") -> str:
        """Run a command in a container of the driver's pod on a node; ClusterError if it fails."""
        pod = self.pod(node)["metadata"]["name"]
        return self._cluster.pod_exec(pod, argv, self._namespace, container=container).decode()

    def logs(self, node: Node, container: str = "driver") -> str:
        """What a container of the driver's pod on a node has written."""
        return self._cluster.logs(self.pod(node)["metadata"]["name"], container, self._namespace)

    def delete_pod(self, node: Node) -> str:
        """Ask for the end of the driver's pod on a node, and return its uid; another one comes by itself."""
        pod = self.pod(node)
        self._cluster.api.delete("Pod", pod["metadata"]["name"], self._namespace)
        uid: str = pod["metadata"]["uid"]
        return uid

    def wait_other_pod(self, node: Node, uid: str) -> None:
        """Until the driver's pod on a node is Ready and not that one."""

        def other() -> bool:
            return bool(self.pod(node)["metadata"]["uid"] != uid)

        self._cluster.wait(f"new pod of the driver on {node.name}", other, _POD_SECONDS)


@pytest.fixture(scope="session")
def driver(cluster: Cluster) -> Iterator[Driver]:
    """The driver as users install it, once for all modules, and the class CHEAP beside its own."""
    cluster.install(DEPLOY)
    cluster.apply([storage_class(CHEAP)])
    yield Driver(cluster)
    cluster.delete([storage_class(CHEAP)])
    cluster.uninstall(DEPLOY)


@contextmanager
def installed(cluster: Cluster, folder: Path) -> Iterator[None]:
    """Have that kustomization instead of the default, for a module whose fixture this is in: all of them share one
    namespace. Claims and pods must be gone before and after.
    """
    default = cluster.get("CSIDriver", NAME) is not None
    if default:
        cluster.uninstall(DEPLOY)
    try:
        cluster.install(folder)
        try:
            yield
        finally:
            cluster.uninstall(folder)
    finally:
        if default:
            cluster.install(DEPLOY)


# Objects. A claim's secret is `secret()` in its own namespace, unless its class says otherwise.


def secret(name: str = KEY, passphrase: str = PASSPHRASE, **more: str) -> Json:
    """A secret with a passphrase and, in `more`, further entries."""
    entries = {"CRYPTO_KEY_VALUE": passphrase, **more}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": entries}


def storage_class(name: str, parameters: dict[str, str] | None = None, **fields: Any) -> Json:
    """A class like CHEAP, with more parameters and with other fields, such as `volumeBindingMode`."""
    kinds = ("provisioner", "node-stage")
    named = {f"csi.storage.k8s.io/{kind}-secret-name": KEY for kind in kinds}
    placed = {f"csi.storage.k8s.io/{kind}-secret-namespace": "${pvc.namespace}" for kind in kinds}
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": NAME,
        "allowVolumeExpansion": True,
        "volumeBindingMode": "WaitForFirstConsumer",
        "parameters": {**_CHEAP_PBKDF, **named, **placed, **(parameters or {})},
        **fields,
    }


def at_once(name: str, node: str) -> Json:
    """A class like CHEAP that binds at once, on that node."""
    where = [{"matchLabelExpressions": [{"key": TOPOLOGY, "values": [node]}]}]
    return storage_class(name, volumeBindingMode="Immediate", allowedTopologies=where)


def claim(name: str = "data", size: str = "32Mi", storage_class: str = CHEAP, **spec: Any) -> Json:
    """A claim; `spec` has further fields, such as `volumeMode`."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "storageClassName": storage_class,
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": size}},
            **spec,
        },
    }


def pod(
    name: str,
    claim: str = "data",
    *,
    block: bool = False,
    node: str = "node-1",
    container: Json | None = None,
    source: Json | None = None,
    **spec: Any,
) -> Json:
    """A pod that sleeps with the claim mounted at /data or, with `block`, as the device /dev/data.

    `container`, `source` and `spec` have further fields of the container, of the volume's source and of the pod. It
    goes to `node`, or with "" where the scheduler wants it.
    """
    place = {"volumeDevices": [{"name": "data", "devicePath": "/dev/data"}]}
    if not block:
        place = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    main = {"name": "main", "image": BUSYBOX, "command": ["sleep", "infinity"], **place, **(container or {})}
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": claim, **(source or {})}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "nodeSelector": {"kubernetes.io/hostname": node} if node else {},
            "containers": [main],
            "volumes": [volume],
            **spec,
        },
    }


# What becomes of them.


def volume_of(cluster: Cluster, claim: str, namespace: str, timeout: float = 60) -> Json:
    """Wait until a claim is bound, and return its PersistentVolume."""

    def bound() -> Json | None:
        found = cluster.api.get("PersistentVolumeClaim", claim, namespace)
        assert found["status"].get("phase") == "Bound", found["status"]
        return cluster.get("PersistentVolume", found["spec"]["volumeName"])

    return cluster.wait(f"bound claim {claim}", bound, timeout)


def node_of(volume: Json) -> str:
    """The name of the one node on which a PersistentVolume can be used."""
    (term,) = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    (expression,) = term["matchExpressions"]
    (name,) = expression["values"]
    assert (expression["key"], expression["operator"]) == (f"topology.{volume['spec']['csi']['driver']}/node", "In")
    return str(name)


def volume_id(volume: Json) -> str:
    """The driver's id of a PersistentVolume."""
    handle: str = volume["spec"]["csi"]["volumeHandle"]
    return handle


def folder_of(volume: Json) -> str:
    """The folder of a volume on its node; `disk.img` in it is the ciphertext."""
    return f"{STATE}/loopfile/volumes/{volume_id(volume)}"


def mapping_of(volume: Json) -> str:
    """The open device of a volume on its node."""
    return f"/dev/mapper/luks-{volume_id(volume)}"
