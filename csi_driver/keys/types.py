"""The types of KMS entries, each with what makes a source of one; modules and clients are loaded when asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from csi_driver.host.workers import Workers
from csi_driver.keys.base import SECONDS, Entry, EntryReader, KeyRequest, KeySource, RequestNeeded, Wrapping
from csi_driver.keys.kubernetes import SERVICE_ACCOUNT, Kubernetes
from csi_driver.keys.secret import CEPH_PASSPHRASE
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.secret import Passphrase

if TYPE_CHECKING:
    from csi_driver.keys.vault import Login, Vault

_OIDC_TOKEN: Final = Path("/run/secrets/tokens/oidc-token")  # where Ceph-CSI's manifests mount it


class Surroundings(Struct, frozen=True):
    """What a source is made of."""

    reader: EntryReader
    entry: Entry
    request: KeyRequest
    kubernetes: Kubernetes
    workers: Workers
    programs: Path


Builder = Callable[[Surroundings], KeySource]


def _metadata(made: Surroundings) -> KeySource:
    from csi_driver.keys.metadata import MetadataWrapper, passphrase_of  # noqa: PLC0415

    reader, request = made.reader, made.request
    name = reader.text("secretName", "")

    def passphrase() -> Passphrase:
        if name:
            namespace = reader.text("secretNamespace", "") or _tenant(made)
            return passphrase_of(made.kubernetes.secret(namespace, name), f"the secret {namespace}/{name}")
        if request.secret.passphrase is None:
            raise RequestNeeded(
                f"{reader.where} names no secret and the request brought no {CEPH_PASSPHRASE}; add secretName to the "
                f"KMS configuration, or the passphrase to the secret that the StorageClass names for provisioner and "
                f"node-stage"
            )
        return request.secret.passphrase

    return Wrapping(MetadataWrapper(reader.where, passphrase))


def _vault(made: Surroundings) -> KeySource:
    from csi_driver.keys.vault_kv import VaultKv  # noqa: PLC0415

    reader = made.reader
    root = reader.text("vaultPassphraseRoot", "").removeprefix("/v1/")
    mount = root or reader.text("vaultBackendPath", "secret")
    field = "vaultPassphraseRoot" if root else "vaultBackendPath"
    return VaultKv(_own_vault(made), reader, mount, reader.text("vaultPassphrasePath", ""), field)


def _vault_transit(made: Surroundings) -> KeySource:
    from csi_driver.keys.vault_transit import VaultTransit  # noqa: PLC0415

    return Wrapping(VaultTransit(_own_vault(made), made.reader))


def _own_vault(made: Surroundings) -> "Vault":
    """A Vault where the driver's own service account logs in."""
    from csi_driver.keys import vault  # noqa: PLC0415

    reader, entries = made.reader, made.request.secret.entries
    from_api = vault.secret_finder(
        reader, made.kubernetes, made.kubernetes.namespace if made.kubernetes.is_here else ""
    )

    def find(name: str, entry: str) -> str:
        return entries[name] if name in entries else from_api(name, entry)

    token = Path(reader.text("vaultTokenPath", str(SERVICE_ACCOUNT / "token")))
    login = vault.kubernetes_login(reader, "/v1/auth/kubernetes/login", lambda: vault.read_token(token))
    return vault.Vault(reader, vault.tls_of(reader, find), login)


def _vault_tokens(made: Surroundings) -> KeySource:
    from csi_driver.keys import vault  # noqa: PLC0415

    reader = _tenant_reader(made, service_account=False)
    tenant, name = made.request.tenant, reader.text("tenantTokenName", "ceph-csi-kms-token")
    token = made.kubernetes.secret(tenant, name).get("token", "").strip()
    if not token:
        raise FailedPrecondition(
            f"the secret {tenant}/{name} of {reader.where} has no entry token; put a Vault token there"
        )
    return _tenant_kv(made, reader, vault.Login(token))


def _vault_tenant_sa(made: Surroundings) -> KeySource:
    from csi_driver.keys import vault  # noqa: PLC0415

    reader = _tenant_reader(made, service_account=True)
    kubernetes, tenant = made.kubernetes, made.request.tenant  # what is kept for long holds no secret of a request
    account = reader.text("tenantSAName", "ceph-csi-vault-sa")
    audience = reader.text("vaultAudience", "") or None

    def token() -> str:
        return kubernetes.service_account_token(tenant, account, audience)

    return _tenant_kv(made, reader, vault.kubernetes_login(reader, "kubernetes", token))


def _tenant_reader(made: Surroundings, *, service_account: bool) -> EntryReader:
    from csi_driver.keys import vault  # noqa: PLC0415

    reader, tenant = made.reader, _tenant(made)
    plain = vault.plain_entry(made.entry)
    entry = vault.tenant_entry(reader.where, plain, tenant, made.kubernetes, service_account=service_account)
    return EntryReader(f"{reader.where} for the namespace {tenant}", entry)


def _tenant_kv(made: Surroundings, reader: EntryReader, login: "Login") -> KeySource:
    from csi_driver.keys import vault  # noqa: PLC0415
    from csi_driver.keys.vault_kv import VaultKv  # noqa: PLC0415

    find = vault.secret_finder(reader, made.kubernetes, made.request.tenant, made.kubernetes.namespace)
    kept = vault.Vault(reader, vault.tls_of(reader, find), login)
    return VaultKv(kept, reader, reader.text("vaultBackendPath", "secret"), "")


def _aws(made: Surroundings) -> KeySource:
    from csi_driver.keys.aws import Account, AwsWrapper  # noqa: PLC0415

    reader, kubernetes = made.reader, made.kubernetes
    name, region = reader.text("KMS_SECRET_NAME", "ceph-csi-aws-credentials"), reader.text("AWS_REGION")
    endpoint = reader.text("AWS_ENDPOINT_URL", "") or None

    def account() -> Account:
        secret = kubernetes.secret(kubernetes.namespace, name)
        entries = EntryReader(f"the secret {kubernetes.namespace}/{name} of {reader.where}", secret)
        credentials = {
            "aws_access_key_id": entries.text("AWS_ACCESS_KEY_ID"),
            "aws_secret_access_key": entries.text("AWS_SECRET_ACCESS_KEY"),
        }
        if session := entries.text("AWS_SESSION_TOKEN", ""):
            credentials["aws_session_token"] = session
        return Account(region, entries.text("AWS_CMK_ARN"), credentials, endpoint)

    return Wrapping(AwsWrapper(reader.where, account))


def _tenant(made: Surroundings) -> str:
    if not made.request.tenant:
        raise RequestNeeded(
            f"{made.reader.where} is asked in the name of each claim's namespace, and this volume was made without "
            f"one; run csi-provisioner with --extra-create-metadata"
        )
    return made.request.tenant


def _aws_sts(made: Surroundings) -> KeySource:
    from csi_driver.keys.aws import Account, AwsWrapper, assume_role  # noqa: PLC0415
    from csi_driver.keys.vault import read_token  # noqa: PLC0415

    reader, tenant, kubernetes = made.reader, _tenant(made), made.kubernetes
    name = reader.text("secretName", "ceph-csi-aws-credentials")
    endpoint = reader.text("AWS_ENDPOINT_URL", "") or None
    token = Path(reader.text("tokenPath", str(_OIDC_TOKEN)))

    def account() -> Account:
        secret = kubernetes.secret(tenant, name)
        entries = EntryReader(f"the secret {tenant}/{name} of {reader.where}", secret)
        found = Account(entries.text("awsRegion"), entries.text("awsCMKARN"), {}, endpoint)
        credentials = assume_role(reader.where, found, entries.text("awsRoleARN"), read_token(token))
        return Account(found.region, found.key, credentials, endpoint)

    return Wrapping(AwsWrapper(reader.where, account))


def _kmip(made: Surroundings) -> KeySource:
    from csi_driver.keys.kmip import KmipWrapper, Server, server_of  # noqa: PLC0415

    reader, kubernetes = made.reader, made.kubernetes
    name = reader.text("KMIP_SECRET_NAME", "ceph-csi-kmip-credentials")

    def server() -> Server:
        return server_of(reader, kubernetes.secret(kubernetes.namespace, name), f"{kubernetes.namespace}/{name}")

    return Wrapping(KmipWrapper(reader.where, server))


def _azure(made: Surroundings) -> KeySource:
    from csi_driver.keys.azure import Account, KeyVault  # noqa: PLC0415

    reader, kubernetes = made.reader, made.kubernetes
    name = reader.text("AZURE_CERT_SECRET_NAME", "ceph-csi-azure-credentials")
    vault, tenant = reader.text("AZURE_VAULT_URL"), reader.text("AZURE_TENANT_ID")
    application, authority = reader.text("AZURE_CLIENT_ID"), reader.text("AZURE_AUTHORITY_HOST", "") or None
    seconds = reader.seconds("timeoutSeconds", SECONDS)
    if not vault.startswith("https://") or "@" in vault:
        raise FailedPrecondition(
            f"the field AZURE_VAULT_URL of {reader.where} must be an https address alone, such as "
            f"https://NAME.vault.azure.net"
        )

    def account() -> Account:
        secret = kubernetes.secret(kubernetes.namespace, name)
        entries = EntryReader(f"the secret {kubernetes.namespace}/{name} of {reader.where}", secret)
        return Account(vault, tenant, application, entries.text("CLIENT_CERT"), authority, seconds)

    return KeyVault(reader.where, account)


def _ibm(made: Surroundings) -> KeySource:
    from csi_driver.keys.ibm import Instance, KeyProtect, instance_of  # noqa: PLC0415

    reader, kubernetes = made.reader, made.kubernetes
    name = reader.text("IBM_KP_SECRET_NAME", "ceph-csi-kp-credentials")

    def instance() -> Instance:
        return instance_of(reader, kubernetes.secret(kubernetes.namespace, name), f"{kubernetes.namespace}/{name}")

    return Wrapping(KeyProtect(reader.where, instance))


def _gcp(made: Surroundings) -> KeySource:
    from csi_driver.keys.gcp import CREDENTIALS, Account, CloudKms, account_of  # noqa: PLC0415

    reader, kubernetes = made.reader, made.kubernetes
    name = reader.text("secretName", "")

    def account() -> Account:
        if not name:
            return account_of(reader, None)
        secret = kubernetes.secret(kubernetes.namespace, name)
        entries = EntryReader(f"the secret {kubernetes.namespace}/{name} of {reader.where}", secret)
        return account_of(reader, entries.text(CREDENTIALS))

    return Wrapping(CloudKms(reader.where, account))


def _plugin(made: Surroundings) -> KeySource:
    from csi_driver.keys.plugin import PluginWrapper  # noqa: PLC0415

    return Wrapping(PluginWrapper(made.reader))


def _exec(made: Surroundings) -> KeySource:
    from csi_driver.keys.exec import ExecWrapper  # noqa: PLC0415

    return Wrapping(ExecWrapper(made.reader, made.workers, made.programs))


NEVER_KEPT: Final = frozenset({"metadata"})
"""Types whose source holds what unwraps a DEK, the passphrase of a request, and no connection that is worth keeping."""

UNNAMED: Final = frozenset({"aws-metadata", "aws-sts-metadata", "kmip"})
"""Types whose wrapped keys Ceph-CSI binds to nothing, so that no name is to be told for one of its own."""

BUILDERS: Final[Mapping[str, Builder]] = {
    "aws-metadata": _aws,
    "aws-sts-metadata": _aws_sts,
    "azure-kv": _azure,
    "exec": _exec,
    "gcp-kms": _gcp,
    "ibmkeyprotect": _ibm,
    "kmip": _kmip,
    "kms-plugin": _plugin,
    "metadata": _metadata,
    "vault": _vault,
    "vaulttenantsa": _vault_tenant_sa,
    "vaulttokens": _vault_tokens,
    "vaulttransit": _vault_transit,
}
