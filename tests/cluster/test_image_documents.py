"""The documents of Longhorn and Harvester on encrypted images, in a cluster: their manifests as they stand there, and
pods that read the disks. What is changed is in `_changed`: the URL and checksum of what this machine serves.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.documents import MANIFESTS
from tests.cluster.driver import DEPLOY, NAME, claim, pod
from tests.cluster.leftovers import assert_clean
from tests.cluster.settings import HOST
from tests.image_server import ImageServer, serving, sha512

_DOCUMENTS = Path(__file__).parents[1] / "operator" / "manifests"
_SIZE = 16 << 20
_SECONDS = 180
_BACKING, _MACHINE = "backingimages.longhorn.io", "virtualmachineimages.harvesterhci.io"


def _changed(web: ImageServer) -> dict[str, Json]:
    """What is changed of the documents' manifests, by kind and name."""
    return {
        "BackingImage/parrot": {"sourceParameters": {"url": web.url()}, "checksum": sha512(web.content)},
        "VirtualMachineImage/alpine-extended": {"url": web.url()},
    }


@pytest.fixture(scope="module", autouse=True)
def web(cluster: Cluster) -> Iterator[ImageServer]:
    """The driver under Longhorn's name with Images and both foreign kinds, on two nodes, and a server with a disk."""
    cluster.node(2)
    default = cluster.get("CSIDriver", NAME) is not None
    if default:
        cluster.uninstall(DEPLOY)
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "longhorn-system"}}
    # Harvester's own class, which its document takes for granted.
    plain: Json = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": "harvester-longhorn"},
        "provisioner": "driver.longhorn.io",
        "parameters": {"numberOfReplicas": "1", "staleReplicaTimeout": "30", "migratable": "true"},
    }
    try:
        cluster.apply([namespace, plain])
        for kinds in (DEPLOY / "images" / "crds.yaml", DEPLOY / "compat"):
            cluster.apply(kinds)
        cluster.install(MANIFESTS / "images-longhorn")
        try:
            with serving(os.urandom(_SIZE), host=HOST) as server:
                yield server
        finally:
            cluster.uninstall(MANIFESTS / "images-longhorn")
        for kinds in (DEPLOY / "compat", DEPLOY / "images" / "crds.yaml"):
            cluster.delete(kinds)
        cluster.delete([plain, namespace])
    finally:
        if default:
            cluster.install(DEPLOY)


def _apply(cluster: Cluster, web: ImageServer, *files: str) -> None:
    for file in files:
        read = cluster.kubectl("create", "--dry-run=client", "-o", "json", "-f", str(_DOCUMENTS / file))
        thing: Json = json.loads(read.stdout)
        thing.get("spec", {}).update(_changed(web).get(f"{thing['kind']}/{thing['metadata']['name']}", {}))
        cluster.apply([thing])


def _ready(cluster: Cluster, kind: str, name: str, namespace: str, condition: str) -> Json:
    def ready() -> Json:
        read = cluster.kubectl("get", kind, name, "-n", namespace, "-o", "json")
        status: Json = json.loads(read.stdout).get("status", {})
        told = {each["type"]: each["status"] for each in status.get("conditions", ())}
        assert told.get(condition) == "True", status
        return status

    return cluster.wait(f"{kind} {name}", ready, _SECONDS)


def _pod_reads(cluster: Cluster, class_name: str) -> str:
    """The SHA-256 of the disk that a pod sees through a volume of a class, as a block device."""
    with cluster.namespace() as namespace:
        cluster.apply([claim("data", str(_SIZE), class_name, volumeMode="Block")], namespace)
        cluster.apply([pod("vm", block=True, node="")], namespace)
        cluster.pod_running("vm", namespace, _SECONDS)
        script = f"head -c {_SIZE} /dev/data | sha256sum | cut -d' ' -f1"
        found = cluster.pod_exec("vm", ["sh", "-c", script], namespace).decode().strip()
    for node in cluster.nodes:
        assert_clean(node)
    return found


def test_longhorns_document(cluster: Cluster, web: ImageServer) -> None:
    names = ("parrot", "parrot-cloned", "parrot-cloned-encrypted", "parrot-cloned-decrypt")
    files = ("secret", "downloaded", "cloned", "encrypted", "decrypted", "storage-class")
    _apply(cluster, web, *(f"longhorn/{file}.yaml" for file in files))
    for name in names:
        _ready(cluster, _BACKING, name, "longhorn-system", "Ready")
    cluster.kubectl("delete", _BACKING, "parrot", "-n", "longhorn-system", timeout=_SECONDS)
    assert _pod_reads(cluster, "longhorn-crypto-global") == hashlib.sha256(web.content).hexdigest()
    refused = cluster.kubectl("delete", _BACKING, "parrot-cloned-encrypted", "-n", "longhorn-system", check=False)
    assert "StorageClass longhorn-crypto-global names it" in refused.said
    again: Json = {
        "apiVersion": "longhorn.io/v1beta2",
        "kind": "BackingImage",
        "metadata": {"name": "twice", "namespace": "longhorn-system"},
        "spec": {"sourceType": "clone", "sourceParameters": {
            "backing-image": "parrot-cloned-encrypted", "encryption": "encrypt",
            "secret": "longhorn-crypto", "secret-namespace": "longhorn-system",
        }},
    }  # fmt: skip
    said = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(again), check=False).said
    assert "is encrypted already and is not encrypted again" in said
    cluster.kubectl("delete", "storageclass", "longhorn-crypto-global")
    cluster.kubectl("delete", _BACKING, "--all", "-n", "longhorn-system", timeout=_SECONDS)
    cluster.kubectl("delete", "secret", "longhorn-crypto", "-n", "longhorn-system")


def test_harvesters_document(cluster: Cluster, web: ImageServer) -> None:
    wanted = hashlib.sha256(web.content).hexdigest()
    _apply(cluster, web, *(f"harvester/{file}.yaml" for file in ("secret", "storage-class", "downloaded")))
    _ready(cluster, _MACHINE, "alpine-extended", "default", "Imported")
    _apply(cluster, web, "harvester/encrypted-by-name.yaml")
    status = _ready(cluster, _MACHINE, "encrypted-alpine-extended", "default", "Imported")
    assert status["storageClassName"] == "longhorn-encrypted-alpine-extended"
    made = cluster.api.get("StorageClass", "longhorn-encrypted-alpine-extended")["parameters"]
    assert made["encrypted"] == "true"
    assert made["csi.storage.k8s.io/node-stage-secret-name"] == "longhorn-crypto"
    assert _pod_reads(cluster, "longhorn-encrypted-alpine-extended") == wanted
    cluster.kubectl("delete", _MACHINE, "alpine-extended", timeout=_SECONDS)
    kept = cluster.kubectl("delete", "secret", "longhorn-crypto", "-n", "longhorn-system", check=False).said
    assert "is used by StorageClass" in kept
    _apply(cluster, web, "harvester/decrypted.yaml")
    status = _ready(cluster, _MACHINE, "decrypt-alpine-extended", "default", "Imported")
    assert _pod_reads(cluster, status["storageClassName"]) == wanted
    cluster.kubectl("delete", _MACHINE, "--all", timeout=_SECONDS)
    cluster.kubectl("delete", "storageclass", "harvester-longhorn-encryption")
    cluster.kubectl("delete", "secret", "longhorn-crypto", "-n", "longhorn-system")
    left = cluster.kubectl("get", "images.images.luks.csi.internal,imagecopies.images.luks.csi.internal", "-o", "name")
    assert not left.text
