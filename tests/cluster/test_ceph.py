"""Ceph-CSI's document on encrypted claims: its StorageClass, with the two placeholders filled as
manifests/ceph-rbd-filled.patch.yaml lists, and the passphrase in the class's secret.
"""

import json
from collections.abc import Iterator

import pytest

from tests.cluster.api import ApiError, Json
from tests.cluster.cluster import Cluster
from tests.cluster.documents import MANIFESTS, Workload, applied, workload
from tests.cluster.driver import DEPLOY, installed

_SECRET: Json = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "csi-rbd-secret", "namespace": "default"},
    # The document's class names one secret for everything: what Ceph wants is in it too.
    "stringData": {"userID": "kubernetes", "userKey": "AQD…==", "encryptionPassphrase": "a passphrase for all volumes"},
}
_EXPAND_SECONDS = 90


def _filled(cluster: Cluster) -> Json:
    """The document's class with its placeholders filled."""
    document, patch = MANIFESTS / "ceph-rbd.yaml", MANIFESTS / "ceph-rbd-filled.patch.yaml"
    output = cluster.kubectl(
        "patch", "--local", "--type=merge", "-o", "json", "-f", str(document), "--patch-file", str(patch)
    )
    filled: Json = json.loads(output.stdout)
    return filled


@pytest.fixture(scope="module", autouse=True)
def ceph(cluster: Cluster) -> Iterator[None]:
    """The driver under Ceph-CSI's name, the class and its secret."""
    with installed(cluster, DEPLOY / "names/ceph"), applied(cluster, _SECRET, _filled(cluster)):
        yield


@pytest.fixture(scope="module")
def running(cluster: Cluster) -> Iterator[Workload]:
    """A pod on an encrypted volume of the class."""
    with workload(cluster, "csi-rbd") as used:
        used.create()
        used.wait_running()
        yield used


def test_data_survives_a_restart_of_the_pod_and_is_encrypted_on_disk(running: Workload) -> None:
    volume = running.volume()
    text = running.write()
    found = {device: volume.lines_with(text, device) for device in (volume.mapping, *volume.loops(), volume.file)}
    assert list(found.values()) == [1, 0, 0]
    assert "Version:       \t2\n" in volume.header(volume.file)
    running.scale(0)
    running.scale(1)
    assert running.reads() == text


def test_expansion_wants_the_class_to_allow_it_and_then_uses_its_secret(cluster: Cluster, running: Workload) -> None:
    larger = {"spec": {"resources": {"requests": {"storage": "96Mi"}}}}
    # The document's class does not say allowVolumeExpansion: the apiserver itself refuses.
    with pytest.raises(ApiError, match="the storageclass that provisions the pvc must support resize"):
        cluster.api.patch("PersistentVolumeClaim", running.claim_name, running.namespace, larger)
    cluster.api.patch("StorageClass", "csi-rbd", "", {"allowVolumeExpansion": True})
    cluster.api.patch("PersistentVolumeClaim", running.claim_name, running.namespace, larger)
    cluster.wait("claim of 96 MiB", lambda: running.claim["status"]["capacity"]["storage"] == "96Mi", _EXPAND_SECONDS)
    volume = running.volume()
    assert volume.node.run(f"blockdev --getsize64 {volume.mapping}").text == str(96 << 20)
    blocks, size = running.run("stat -f -c '%b %S' /data").split()
    assert int(blocks) * int(size) > 80 << 20
    readers = [
        event["user"].get("username", "")
        for event in cluster.control_plane.audit()
        if event["verb"] == "get" and event.get("objectRef", {}).get("name") == "csi-rbd-secret"
    ]
    assert "system:serviceaccount:luks-csi:luks-csi-controller" in readers


def test_a_class_that_names_a_kms_of_nowhere_is_told_in_the_claims_events(cluster: Cluster) -> None:
    named = _filled(cluster)
    named["metadata"]["name"] = "csi-rbd-kms"
    named["parameters"]["encryptionKMSID"] = "vault-1"
    with applied(cluster, named), workload(cluster, "csi-rbd-kms") as used:
        used.create()
        used.wait_claim_event("code = FailedPrecondition", "no KMS is configured")
        assert used.claim["status"]["phase"] == "Pending"
