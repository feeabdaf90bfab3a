"""The fields that an entry of the KMS configuration may have, by its type.

Another one is told and not refused: it may be one of these, misspelt, and it may be of a Ceph-CSI that knows more.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from csi_driver.keys.base import Entry

TYPE_FIELDS: Final = ("encryptionKMSType", "KMS_PROVIDER")
STANDARD: Final = {
    "VAULT_ADDR": "vaultAddress",
    "VAULT_BACKEND": "vaultBackend",
    "VAULT_BACKEND_PATH": "vaultBackendPath",
    "VAULT_DESTROY_KEYS": "vaultDestroyKeys",
    "VAULT_CACERT": "vaultCAFromSecret",
    "VAULT_TLS_SERVER_NAME": "vaultTLSServerName",
    "VAULT_CLIENT_CERT": "vaultClientCertFromSecret",
    "VAULT_CLIENT_KEY": "vaultClientCertKeyFromSecret",
    "VAULT_AUTH_NAMESPACE": "vaultAuthNamespace",
    "VAULT_NAMESPACE": "vaultNamespace",
}
"""Entries of a tenant's Vault that say KMS_PROVIDER name things as Vault's own environment variables do."""
SKIP_VERIFY: Final = "VAULT_SKIP_VERIFY"
TENANTS: Final = "tenants"

_ALL: Final = {*TYPE_FIELDS, "KMS_SERVICE_NAME"}  # the last one is Rook's
_OWN_NAMES: Final = frozenset({*_ALL, *STANDARD, SKIP_VERIFY})
_LOGIN: Final = {"vaultAuthPath", "vaultRole"}
_TENANTS: Final = {*_ALL, *STANDARD.values(), "vaultCAVerify", "tenantConfigName", "tenantTokenName", TENANTS}
_VAULT: Final = {
    *_ALL, *STANDARD.values(), *_LOGIN, "vaultCAVerify", "vaultPassphraseRoot", "vaultPassphrasePath", "vaultTokenPath",
}  # fmt: skip
FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "aws-metadata": frozenset({*_ALL, "AWS_REGION", "KMS_SECRET_NAME", "AWS_ENDPOINT_URL"}),
    "aws-sts-metadata": frozenset({*_ALL, "secretName", "tokenPath", "AWS_ENDPOINT_URL"}),
    "azure-kv": frozenset({
        *_ALL, "AZURE_VAULT_URL", "AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CERT_SECRET_NAME",
        "AZURE_AUTHORITY_HOST", "timeoutSeconds",
    }),
    "exec": frozenset({*_ALL, "program", "arguments", "timeoutSeconds"}),
    "gcp-kms": frozenset({*_ALL, "keyName", "secretName", "endpoint", "endpointCA", "timeoutSeconds"}),
    "ibmkeyprotect": frozenset({
        *_ALL, "IBM_KP_SERVICE_INSTANCE_ID", "IBM_KP_BASE_URL", "IBM_KP_TOKEN_URL", "IBM_KP_SECRET_NAME",
        "IBM_KP_REGION", "timeoutSeconds",
    }),
    "kmip": frozenset({
        *_ALL, "KMIP_ENDPOINT", "KMIP_SECRET_NAME", "TLS_SERVER_NAME", "READ_TIMEOUT", "WRITE_TIMEOUT",
    }),
    "kms-plugin": frozenset({*_ALL, "endpoint", "timeoutSeconds"}),
    "metadata": frozenset({*_ALL, "secretName", "secretNamespace"}),
    "vault": frozenset(_VAULT),
    "vaulttenantsa": frozenset({*_TENANTS, *_LOGIN, "tenantSAName", "vaultAudience"}),
    "vaulttokens": frozenset(_TENANTS),
    "vaulttransit": frozenset({*_VAULT, "vaultTransitKey", "vaultTransitPath"}),
}  # fmt: skip
"""What is read, and what Ceph-CSI's documents have beside it."""


def unknown_fields(kind: str, entry: Entry) -> list[str]:
    """What an entry of that type says and nobody reads, each with the nearest field that is read."""
    has_own_names = TYPE_FIELDS[1] in entry and TENANTS in FIELDS[kind]
    found = _unknown(entry, _OWN_NAMES if has_own_names else FIELDS[kind])
    tenants = entry.get(TENANTS) if not has_own_names else None
    for tenant, said in tenants.items() if isinstance(tenants, dict) else ():
        if isinstance(said, dict):
            found += [f"{TENANTS}.{tenant}.{each}" for each in _unknown(said, FIELDS[kind] - {TENANTS})]
    return found


def _unknown(names: Iterable[str], known: frozenset[str]) -> list[str]:
    found = []
    for name in sorted(set(names) - known):
        import difflib  # noqa: PLC0415 - for what is wrong alone

        near = difflib.get_close_matches(name, sorted(known), n=1)
        found.append(f"{name} (did you mean {near[0]}?)" if near else name)
    return found
