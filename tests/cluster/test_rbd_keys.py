"""A key of its own for each image of a real Ceph: the controller makes it and ends it, the nodes open by it."""

import json
import os
from collections.abc import Iterator

import pytest

from tests.backends.ceph import Ceph
from tests.cluster.api import Json
from tests.cluster.ceph import NAMESPACE, SECRETS, ceph_class, ceph_installed, ceph_secret, ciphertext, on_ceph
from tests.cluster.cluster import Cluster
from tests.cluster.documents import applied
from tests.cluster.settings import CLUSTER_CEPH, CSI_ADDONS_BIN

_USER = "csi-rbd-user"
pytestmark = pytest.mark.timeout(900)


def _ours(kind: str, name: str, **fields: object) -> Json:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}, **fields}


@pytest.fixture(scope="module")
def ceph(cluster: Cluster) -> Iterator[Ceph]:
    """A Ceph, and the driver for it with a KMS, on two nodes; classes whose secret has no passphrase."""
    if not (os.environ.get(CSI_ADDONS_BIN) and os.environ.get(CLUSTER_CEPH)):
        pytest.skip("make cluster-test has csi-attacher and an image with Ceph's programs")
    cluster.node(2)
    entry = {"encryptionKMSType": "metadata", "secretName": "storage-encryption", "secretNamespace": NAMESPACE}
    config = _ours("ConfigMap", "ceph-csi-encryption-kms-config", data={"config.json": json.dumps({"one": entry})})
    passphrase = _ours("Secret", "storage-encryption", stringData={"encryptionPassphrase": "one for all volumes"})
    classes = [
        ceph_class("kms", _USER, {"encryptionKMSID": "one"}),
        ceph_class("generated", _USER, {"generateKey": "true"}),
    ]
    with ceph_installed(cluster, "kms/central", "kms/generate") as made:
        user = ceph_secret(_USER, SECRETS, made.key)
        with applied(cluster, config, passphrase, user, *classes):
            yield made


def _kept(cluster: Cluster) -> list[str]:
    names = [one["metadata"]["name"] for one in cluster.items("Secret", NAMESPACE)]
    return [name for name in names if name.startswith("luks-csi-key-")]


@pytest.mark.parametrize(("name", "secrets"), [("kms", 0), ("generated", 1)])
def test_a_volume_with_a_key_of_its_own_goes_where_its_pod_goes(
    cluster: Cluster, ceph: Ceph, name: str, secrets: int
) -> None:
    with on_ceph(cluster, ceph, name) as used:
        used.create(node="node-1")
        text = used.write()
        assert len(_kept(cluster)) == secrets
        content = ciphertext(ceph, used.id())
        assert content.startswith(b"LUKS\xba\xbe\x00\x02")
        assert text.encode() not in content
        used.scale(0)
        used.create(node="node-2")
        used.scale(1)
        assert used.reads() == text
    assert _kept(cluster) == []
