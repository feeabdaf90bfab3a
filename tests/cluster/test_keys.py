"""Keys from key management systems in a real cluster: a secret's passphrase (metadata), Vault, a secret per volume."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.commands import ClusterError
from tests.cluster.documents import MANIFESTS, Workload, applied, workload
from tests.cluster.driver import NAMESPACE, Driver, installed, storage_class
from tests.cluster.settings import HOST
from tests.keys import servers

_ACCOUNT = "luks-csi-node"
_REVIEWER = "vault-reviewer"
_CONFIG = "ceph-csi-encryption-kms-config"
_MOUNTED_SECONDS = 180  # kubelet renews what a ConfigMap shows once a minute or so

_OF_A_SECRET: Json = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "storage-encryption", "namespace": NAMESPACE},
    "stringData": {"encryptionPassphrase": "a passphrase for all volumes"},
}


@pytest.fixture(scope="module")
def vault(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Vault]:
    """A Vault on the host's side, over TLS, that has the cluster's API review tokens."""
    pki = cluster.control_plane.pki
    with servers.vault(tmp_path_factory.mktemp("vault"), pki, HOST) as vault:
        vault.ask("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": "2"}})
        vault.ask("POST", "sys/auth/kubernetes", {"type": "kubernetes"})
        yield vault


@pytest.fixture(scope="module", autouse=True)
def kms(cluster: Cluster, vault: servers.Vault) -> Iterator[Driver]:
    """The driver with a token and this configuration, and its classes."""
    entries = {
        "of-a-secret": {
            "encryptionKMSType": "metadata",
            "secretName": "storage-encryption",
            "secretNamespace": NAMESPACE,
        },
        "vault-1": {
            "encryptionKMSType": "vault",
            "vaultAddress": vault.address,
            "vaultAuthPath": "/v1/auth/kubernetes/login",
            "vaultRole": "csi-kubernetes",
            "vaultPassphraseRoot": "/v1/secret",
            "vaultPassphrasePath": "ceph-csi/",
            "vaultCAFromSecret": "vault-ca",
        },
    }
    config: Json = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": _CONFIG, "namespace": NAMESPACE},
        "data": {"config.json": json.dumps(entries)},
    }
    ca: Json = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "vault-ca", "namespace": NAMESPACE},
        "stringData": {"cert": Path(cluster.control_plane.pki.certificate).read_text()},
    }
    classes = [_class("kms-secret", encryptionKMSID="of-a-secret"), _class("kms-vault", encryptionKMSID="vault-1")]
    classes.append(_class("generated", generateKey="true"))
    with installed(cluster, MANIFESTS / "kms"), applied(cluster, config, ca, _OF_A_SECRET, *_reviewer(), *classes):
        _let_in(cluster, vault)
        driver = Driver(cluster)

        def both_work() -> bool:
            try:
                said = driver.exec(cluster.node(), ["luks-csi", "keys", "check", "-o", "json"])
            except ClusterError:
                return False  # it is not mounted yet, or one of them fails
            return [(one["kms"], one["ok"]) for one in json.loads(said)] == [("of-a-secret", True), ("vault-1", True)]

        cluster.wait("configuration of the KMS in the driver's pod", both_work, _MOUNTED_SECONDS)
        yield driver


def _class(name: str, **parameters: str) -> Json:
    """A class that names no secret."""
    made = storage_class(name)
    made["parameters"] = {"encrypted": "true", **parameters}
    return made


def _reviewer() -> list[Json]:
    """The service account by which Vault asks the API what a token is."""
    group = "rbac.authorization.k8s.io"
    account: Json = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": _REVIEWER, "namespace": NAMESPACE},
    }
    binding: Json = {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": _REVIEWER},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "system:auth-delegator"},
        "subjects": [{"kind": "ServiceAccount", "namespace": NAMESPACE, "name": _REVIEWER}],
    }
    return [account, binding]


def _let_in(cluster: Cluster, vault: servers.Vault) -> None:
    path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{_REVIEWER}/token"
    jwt = json.loads(cluster.api.raw("POST", path, {"spec": {"expirationSeconds": 3600}}))["status"]["token"]
    ca = Path(cluster.control_plane.pki.certificate).read_text()
    config = {"kubernetes_host": f"https://{HOST}", "kubernetes_ca_cert": ca, "token_reviewer_jwt": jwt}
    vault.ask("POST", "auth/kubernetes/config", config)
    policy = 'path "secret/*" { capabilities = ["create", "read", "update", "delete"] }'
    vault.ask("PUT", "sys/policies/acl/csi", {"policy": policy})
    bound = {"bound_service_account_names": _ACCOUNT, "bound_service_account_namespaces": NAMESPACE}
    vault.ask("POST", "auth/kubernetes/role/csi-kubernetes", {**bound, "token_policies": "csi", "ttl": "1h"})


def _keys(driver: Driver, used: Workload, *words: str) -> Json:
    volume = used.volume()
    said = driver.exec(volume.node, ["luks-csi", "keys", *words, volume.id, "-o", "json"])
    found = json.loads(said)
    one: Json = found[0] if isinstance(found, list) else found
    return one


@pytest.mark.parametrize(
    ("name", "kind"), [("kms-secret", "metadata"), ("kms-vault", "vault"), ("generated", "kubernetes-secret")]
)
def test_the_life_of_a_claim_with_a_key_of_its_own(
    cluster: Cluster, kms: Driver, vault: servers.Vault, name: str, kind: str
) -> None:
    with workload(cluster, name) as used:
        used.create()
        used.wait_running()
        volume, text = used.volume(), used.write()
        found = {device: volume.lines_with(text, device) for device in (volume.mapping, volume.file)}
        assert list(found.values()) == [1, 0]
        before = _keys(kms, used, "status")
        assert before["type"] == kind
        assert _keys(kms, used, "rotate", "--yes")["changed"]
        assert used.reads() == text
        used.scale(0)
        used.scale(1)
        assert used.reads() == text
        if kind == "vault":
            kept = vault.ask("LIST", "secret/metadata/ceph-csi")["data"]["keys"]
            assert len([each for each in kept if each.startswith(volume.id)]) == 1
        if kind == "kubernetes-secret":
            _refuse_deletion(cluster, volume.id)
    left = [one["metadata"]["name"] for one in cluster.items("Secret", NAMESPACE)]
    assert not [each for each in left if each.startswith("luks-csi-key-")]
    if kind == "vault":
        with pytest.raises(AssertionError, match="404"):
            vault.ask("LIST", "secret/metadata/ceph-csi")


def _refuse_deletion(cluster: Cluster, volume_id: str) -> None:
    """Who deletes a volume's secret by mistake is kept waiting, and the secret stays."""
    (name,) = (
        one["metadata"]["name"]
        for one in cluster.items("Secret", NAMESPACE)
        if one["metadata"]["name"].startswith(f"luks-csi-key-{volume_id}")
    )
    cluster.api.delete("Secret", name, NAMESPACE)
    kept = cluster.api.get("Secret", name, NAMESPACE)
    assert "deletionTimestamp" in kept["metadata"]
    assert kept["data"]["encryptionPassphrase"]


def test_a_vault_that_refuses_is_told_in_the_claims_events_and_the_claim_goes_on_when_it_lets_us_in(
    cluster: Cluster, vault: servers.Vault
) -> None:
    policy = 'path "secret/*" { capabilities = ["create", "read", "update", "delete"] }'
    vault.ask("PUT", "sys/policies/acl/csi", {"policy": 'path "nothing" { capabilities = ["read"] }'})
    try:
        with workload(cluster, "kms-vault") as used:
            used.create()
            used.wait_claim_event("code = PermissionDenied", "KMS vault-1 (vault)", "our policy allows nothing there")
            vault.ask("PUT", "sys/policies/acl/csi", {"policy": policy})
            used.wait_running()
    finally:
        vault.ask("PUT", "sys/policies/acl/csi", {"policy": policy})
