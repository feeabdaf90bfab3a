"""Each type of key source against a real server of its kind: made, fetched, wrapped anew, forgotten, and refused."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kmip.core import enums

from csi_driver.keys.base import KeyRequest
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.keys.secret import read_secret
from csi_driver.keys.sources import GENERATED, KeySources
from csi_driver.keys.types import BUILDERS
from csi_driver.model.errors import DriverError, KeyLost, PermissionDenied
from csi_driver.model.volume import KeyTrail
from tests.keys import servers, softhsm
from tests.keys.apiserver import ACCOUNT, NAMESPACE, ApiServer
from tests.keys.conftest import AWS_CREDENTIALS, Make
from tests.keys.program import program

TENANT = "team-a"
NAME = "pvc-1.0a1b2c3d.1"
REQUEST = KeyRequest("pvc-1", TENANT, read_secret({"encryptionPassphrase": "a passphrase of the class"}))


@dataclass
class Case:
    """A source of one type, by the id `kms`; `kms_id` None is a key without a KMS."""

    sources: KeySources
    kind: str
    kms_id: str | None = "kms"

    def create(self, name: str = NAME) -> KeyTrail:
        return self.sources.create(self.kms_id, name, REQUEST, "test")

    def fetch(self, trail: KeyTrail) -> bytes:
        return self.sources.fetch(trail, REQUEST, "test").reveal()

    def check(self) -> None:
        """As `keys check` does, but raising."""
        self.sources._source(self.kms_id, REQUEST)[1].check()  # noqa: SLF001 - it tells an error as text


@pytest.fixture(scope="module")
def tenant(api: ApiServer, vault: servers.Vault) -> str:
    """A namespace with what its claims need, and Vault's roles for service accounts of the cluster."""
    api.namespace(TENANT)
    api.account(TENANT, "ceph-csi-vault-sa")
    reviewer = api.account(NAMESPACE, "vault-reviewer")
    api.review_tokens(NAMESPACE, "vault-reviewer")
    vault.ask("POST", "sys/auth/kubernetes", {"type": "kubernetes"})
    config = {"kubernetes_host": api.address, "kubernetes_ca_cert": api.ca, "token_reviewer_jwt": reviewer}
    vault.ask("POST", "auth/kubernetes/config", config)
    policy = 'path "secret/*" { capabilities = ["create","read","update","delete"] }\n'
    policy += 'path "old/*" { capabilities = ["create","read","update","delete"] }\n'
    policy += 'path "transit/*" { capabilities = ["create","read","update"] }'
    vault.ask("PUT", "sys/policies/acl/csi", {"policy": policy})
    for role, account, namespace in (("node", ACCOUNT, NAMESPACE), ("csi-kubernetes", "ceph-csi-vault-sa", TENANT)):
        bound = {"bound_service_account_names": account, "bound_service_account_namespaces": namespace}
        vault.ask("POST", f"auth/kubernetes/role/{role}", {**bound, "token_policies": "csi", "ttl": "1h"})
    api.secret(TENANT, "ceph-csi-kms-token", token=vault.token(("secret/*", "create,read,update,delete")))
    api.secret(TENANT, "vault-ca", cert=vault.ca or "")
    api.secret(NAMESPACE, "vault-ca", cert=vault.ca or "")
    vault.ask("POST", "transit/keys/csi", {"derived": True})
    return TENANT


@pytest.fixture(scope="module")
def kmip_key(kmip: servers.KmipServer) -> str:
    with servers.kmip_client(kmip) as client:
        uses = [enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT]
        made = client.create(enums.CryptographicAlgorithm.AES, 256, cryptographic_usage_mask=uses)
        client.activate(made)
        return str(made)


@dataclass
class Lab:
    """Makes a source of each type; servers start when a type needs them."""

    get: Callable[[str], Any]
    make: Make
    folder: Path

    def kubernetes(self) -> Kubernetes:
        found: Kubernetes = self.get("kubernetes")
        return found

    def secret(self, **entries: str) -> str:
        """A secret in the driver's namespace; its name."""
        name = f"kms-{self.folder.name.replace('_', '-').lower()}"[:60].rstrip("-")
        self.get("api").secret(NAMESPACE, name, **entries)
        return name

    def metadata(self) -> Case:
        return Case(self.make(encryptionKMSType="metadata"), "metadata")

    def metadata_of_a_secret(self) -> Case:
        fields = {"secretName": self.secret(encryptionPassphrase="of the secret"), "secretNamespace": NAMESPACE}
        return Case(self.make(self.kubernetes(), encryptionKMSType="metadata", **fields), "metadata")

    def vault(self, kind: str = "vault", root: str = "/v1/secret") -> Case:
        self.get("tenant")
        fields = {"vaultAddress": self.get("vault").address, "vaultRole": "node", "vaultCAFromSecret": "vault-ca"}
        fields |= {"vaultAuthPath": "/v1/auth/kubernetes/login"}
        if kind == "vaulttransit":
            fields |= {"vaultTransitKey": "csi"}
        fields |= {"vaultTokenPath": str(self.folder / "serviceaccount" / "token")}
        fields |= {"vaultPassphraseRoot": root, "vaultPassphrasePath": "ceph"}
        return Case(self.make(self.kubernetes(), encryptionKMSType=kind, **fields), kind)

    def vault_version_1(self) -> Case:
        return self.vault(root="/v1/old")

    def vaulttransit(self) -> Case:
        return self.vault("vaulttransit")

    def vaulttokens(self, kind: str = "vaulttokens") -> Case:
        self.get("tenant")
        fields = {"vaultAddress": self.get("vault").address, "vaultCAFromSecret": "vault-ca"}
        return Case(self.make(self.kubernetes(), encryptionKMSType=kind, vaultBackendPath="secret/", **fields), kind)

    def vaulttenantsa(self) -> Case:
        return self.vaulttokens("vaulttenantsa")

    def vaulttokens_by_kms_provider(self) -> Case:
        self.get("tenant")
        fields = {"VAULT_ADDR": self.get("vault").address, "VAULT_CACERT": "vault-ca", "VAULT_BACKEND_PATH": "secret/"}
        return Case(self.make(self.kubernetes(), KMS_PROVIDER="vaulttokens", **fields), "vaulttokens")

    def aws_metadata(self, server: str = "aws") -> Case:
        name = self.secret(AWS_CMK_ARN=self.get(f"{server}_key"), **AWS_CREDENTIALS)
        fields = {"KMS_SECRET_NAME": name, "AWS_REGION": servers.REGION, "AWS_ENDPOINT_URL": self.get(server)}
        return Case(self.make(self.kubernetes(), encryptionKMSType="aws-metadata", **fields), "aws-metadata")

    def aws_metadata_of_local_kms(self) -> Case:
        return self.aws_metadata("local_kms")

    def aws_sts_metadata(self) -> Case:
        self.get("tenant")
        role = "arn:aws:iam::123456789012:role/csi"
        name = f"sts-{self.folder.name.replace('_', '-').lower()}"[:60].rstrip("-")
        entries = {"awsRoleARN": role, "awsCMKARN": self.get("aws_key"), "awsRegion": servers.REGION}
        self.get("api").secret(TENANT, name, **entries)
        token = self.folder / "oidc-token"
        token.write_text("a web identity")
        fields = {"secretName": name, "AWS_ENDPOINT_URL": self.get("aws"), "tokenPath": str(token)}
        return Case(self.make(self.kubernetes(), encryptionKMSType="aws-sts-metadata", **fields), "aws-sts-metadata")

    def kmip(self) -> Case:
        server = self.get("kmip")
        name = self.secret(UNIQUE_IDENTIFIER=self.get("kmip_key"), **server.entries)
        fields = {"KMIP_SECRET_NAME": name, "KMIP_ENDPOINT": server.endpoint}
        return Case(self.make(self.kubernetes(), encryptionKMSType="kmip", **fields), "kmip")

    def azure_kv(self) -> Case:
        self.get("trusted")
        cloud = self.get("azure_service")
        name = self.secret(CLIENT_CERT=cloud.certificate)
        fields = {
            "AZURE_CERT_SECRET_NAME": name,
            "AZURE_VAULT_URL": cloud.address,
            "AZURE_CLIENT_ID": cloud.application,
        }
        fields |= {"AZURE_TENANT_ID": cloud.tenant, "AZURE_AUTHORITY_HOST": cloud.address}
        return Case(self.make(self.kubernetes(), encryptionKMSType="azure-kv", **fields), "azure-kv")

    def ibmkeyprotect(self) -> Case:
        self.get("trusted")
        cloud = self.get("ibm_service")
        name = self.secret(IBM_KP_SERVICE_API_KEY=cloud.api_key, IBM_KP_CUSTOMER_ROOT_KEY=cloud.root_key())
        fields = {"IBM_KP_SECRET_NAME": name, "IBM_KP_SERVICE_INSTANCE_ID": cloud.instance}
        fields |= {"IBM_KP_BASE_URL": cloud.address, "IBM_KP_TOKEN_URL": f"{cloud.address}/oidc/token"}
        return Case(self.make(self.kubernetes(), encryptionKMSType="ibmkeyprotect", **fields), "ibmkeyprotect")

    def gcp_kms(self) -> Case:
        cloud = self.get("google_service")
        name = self.secret(**{"credentials.json": cloud.credentials})
        fields = {"secretName": name, "keyName": cloud.new_key(), "endpoint": cloud.endpoint}
        fields["endpointCA"] = Path(self.get("authority").certificate).read_text()
        return Case(self.make(self.kubernetes(), encryptionKMSType="gcp-kms", **fields), "gcp-kms")

    def kms_plugin(self) -> Case:
        return Case(self.make(encryptionKMSType="kms-plugin", endpoint=self.get("plugin")[1]), "kms-plugin")

    def exec(self) -> Case:
        made = Case(self.make(encryptionKMSType="exec", program="wrap-key"), "exec")
        program(self.folder / "programs")
        return made

    def exec_pkcs11(self) -> Case:
        token = softhsm.soft_hsm(self.folder / "hsm", self.folder / "programs")
        return Case(self.make(**token.entry), "exec")

    def generated(self) -> Case:
        return Case(self.make(self.kubernetes()), GENERATED, None)


KINDS = (
    Lab.metadata, Lab.metadata_of_a_secret, Lab.vault, Lab.vault_version_1, Lab.vaulttokens,
    Lab.vaulttokens_by_kms_provider, Lab.vaulttenantsa, Lab.vaulttransit, Lab.aws_metadata,
    Lab.aws_metadata_of_local_kms, Lab.aws_sts_metadata, Lab.azure_kv, Lab.ibmkeyprotect, Lab.gcp_kms, Lab.kmip,
    Lab.kms_plugin, Lab.exec, Lab.exec_pkcs11, Lab.generated,
)  # fmt: skip


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def case(request: pytest.FixtureRequest, sources: Make, tmp_path: Path) -> Case:
    made: Case = request.param(Lab(request.getfixturevalue, sources, tmp_path))
    return made


def test_every_type_is_here() -> None:
    assert {name.replace("_", "-") for name in vars(Lab)} >= set(BUILDERS)


def test_a_key_is_made_once_and_found_again(case: Case, tmp_path: Path) -> None:
    name = f"{NAME}{abs(hash(str(tmp_path)))}"
    trail = case.create(name)
    assert (trail.kms_id, trail.type, trail.tenant) == (case.kms_id or "", case.kind, TENANT)
    key = case.fetch(trail)
    assert len(base64.urlsafe_b64decode(key + b"=")) == 32
    assert case.fetch(trail) == key
    assert key.decode() not in msgspec.json.encode(trail).decode()
    again = case.create(name)  # as after a kill, before anything was recorded
    if not trail.wrapped:
        assert case.fetch(again) == key
    other = case.create(f"{name}.other")
    assert case.fetch(other) != key
    case.sources.destroy(trail, REQUEST, "test")
    case.sources.destroy(trail, REQUEST, "test")
    if not trail.wrapped:
        with pytest.raises(KeyLost, match=name):
            case.fetch(trail)
    assert case.fetch(other)


def test_what_is_wrapped_is_bound_to_its_volume(case: Case, tmp_path: Path) -> None:
    trail = case.create(f"{NAME}{abs(hash(str(tmp_path)))}")
    if trail.wrapped:
        with pytest.raises((KeyLost, DriverError)):
            case.fetch(msgspec.structs.replace(trail, name="pvc-2"))
        with pytest.raises(DriverError):
            case.fetch(msgspec.structs.replace(trail, wrapped="AAAA"))


def test_a_key_is_wrapped_anew_and_stays_the_same(case: Case, tmp_path: Path) -> None:
    trail = case.create(f"{NAME}{abs(hash(str(tmp_path)))}")
    key = case.fetch(trail)
    fresh = case.sources.rewrap(trail, REQUEST)
    assert case.fetch(fresh) == key
    assert (fresh == trail) is (not trail.wrapped)


def test_each_entry_is_checked_by_its_id(case: Case) -> None:
    found = {one.kms_id: one for one in case.sources.checked()}
    if case.kms_id is None:
        return
    one = found["kms"]
    assert one.works is not False, one
    assert not one.unknown_fields
    if case.kind != "metadata":  # which may have a secret of its own, and may not
        assert (one.works is None) is (case.kind in ("vaulttokens", "vaulttenantsa", "aws-sts-metadata"))


def test_every_use_is_told_without_the_key(case: Case, tmp_path: Path) -> None:
    trail = case.create(f"{NAME}{abs(hash(str(tmp_path)))}")
    key = case.fetch(trail)
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [(each["operation"], each["purpose"], each["outcome"]) for each in told] == [
        ("create", "test", "OK"),
        ("fetch", "test", "OK"),
    ]
    assert {each["volume"] for each in told} == {"pvc-1"}
    assert key.decode() not in "".join(lines)


def test_tenants_do_not_see_each_other(
    api: ApiServer, vault: servers.Vault, tenant: str, kubernetes: Kubernetes, sources: Make
) -> None:
    api.namespace("team-b")
    api.secret("team-b", "ceph-csi-kms-token", token=vault.token(("secret/data/nothing", "read")))
    fields = {"vaultAddress": vault.address, "vaultCAFromSecret": "vault-ca", "vaultBackendPath": "secret/"}
    made = sources(kubernetes, encryptionKMSType="vaulttokens", vaultBackend="kv-v2", **fields)
    with pytest.raises(PermissionDenied, match="team-b"):
        made.create("kms", NAME, KeyRequest("pvc-9", "team-b"), "test")
    assert made.create("kms", NAME, KeyRequest("pvc-9", tenant), "test").tenant == tenant


def test_a_tenants_own_configuration_counts_as_far_as_it_may(
    api: ApiServer, vault: servers.Vault, kubernetes: Kubernetes, sources: Make
) -> None:
    api.namespace("team-c")
    api.secret("team-c", "vault-ca", cert=vault.ca or "")
    api.secret("team-c", "token-of-c", token=vault.token(("old/*", "create,read,update,delete")))
    api.config_map("team-c", "ceph-csi-kms-config", vaultBackendPath="old", tenantTokenName="not-theirs-to-say")
    fields = {"vaultAddress": vault.address, "vaultCAFromSecret": "vault-ca", "vaultBackend": "kv"}
    tenants = {"team-c": {"tenantTokenName": "token-of-c"}}
    made = sources(kubernetes, encryptionKMSType="vaulttokens", tenants=tenants, **fields)
    trail = made.create("kms", NAME, KeyRequest("pvc-c", "team-c"), "test")
    assert trail.key_id.startswith("old/")
