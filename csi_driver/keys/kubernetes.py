"""What key sources need of the Kubernetes API: secrets, ConfigMaps, tokens of service accounts.

The driver's pod has a token only where an administrator gave it one (the components of deploy/kubernetes/kms). What a
verb needs the roles there grant.
"""

import base64
import binascii
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from csi_driver.keys.http import HttpService, Tls, shaped
from csi_driver.model.errors import FailedPrecondition

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
FINALIZER: Final = "luks.csi.internal/volume-key"
_EXTRA: Final = "kubernetes"
_WHERE: Final = "the Kubernetes API"
_TOKEN_SECONDS: Final = 600  # the least that the API takes
_RIGHTS: Final = "a component of deploy/kubernetes/kms gives such a right (docs/kms.md, 'In a cluster')"


class _Entries(msgspec.Struct):
    """A secret or a ConfigMap."""

    data: dict[str, str] | None = None


class _Token(msgspec.Struct):
    token: str


class _TokenRequest(msgspec.Struct):
    status: _Token


class _Version(msgspec.Struct):
    gitVersion: str = "of an unknown version"  # noqa: N815 - Kubernetes' name


class Kubernetes:
    """The API at `host`:`port`, "" without one, with the credentials that kubelet mounts in `folder`."""

    def __init__(self, host: str, port: str, folder: Path = SERVICE_ACCOUNT) -> None:
        self._host = f"[{host}]" if ":" in host else host
        self._port = port
        self._folder = folder
        self._made: dict[str, HttpService] = {}

    @property
    def is_here(self) -> bool:
        """Whether this runs in a cluster, with a token."""
        return bool(self._host) and (self._folder / "token").exists()

    @property
    def namespace(self) -> str:
        """The driver's own. Raises FailedPrecondition without credentials."""
        return self._read("namespace")

    def token(self) -> str:
        """The driver's own token; kubelet renews the file."""
        return self._read("token")

    def secret(self, namespace: str, name: str) -> dict[str, str]:
        """The entries of a secret that are text. Raises FailedPrecondition when it is not there."""
        found = self.find_secret(namespace, name)
        if found is None:
            raise FailedPrecondition(
                f"there is no secret {namespace}/{name}; make it, as the KMS configuration names it"
            )
        return found

    def find_secret(self, namespace: str, name: str) -> dict[str, str] | None:
        """As `secret`; None when it is not there."""
        found = self._get(namespace, "secrets", name)
        if found is None:
            return None
        texts = {entry: _text(value) for entry, value in (found.data or {}).items()}
        return {entry: text for entry, text in texts.items() if text is not None}

    def config_map(self, namespace: str, name: str) -> Mapping[str, str] | None:
        """The entries of a ConfigMap; None when there is none of that name."""
        found = self._get(namespace, "configmaps", name)
        return None if found is None else found.data or {}

    def service_account_token(self, namespace: str, name: str, audience: str | None) -> str:
        """A token of that service account for ten minutes (TokenRequest). Raises FailedPrecondition without one."""
        spec: dict[str, object] = {"expirationSeconds": _TOKEN_SECONDS}
        if audience:
            spec["audiences"] = [audience]
        path = f"api/v1/namespaces/{_safe(namespace)}/serviceaccounts/{_safe(name)}/token"
        made = self._ask("POST", path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec})
        if made is None:
            raise FailedPrecondition(f"there is no service account {namespace}/{name}; make it for the KMS")
        return shaped(_WHERE, made, _TokenRequest).status.token

    def keep_secret(
        self, namespace: str, name: str, entries: Mapping[str, str], owner: str, announce: Callable[[], None]
    ) -> None:
        """Make an immutable secret of ours for `owner`; one of that name that is there already stays as it is.

        `announce` is called before it is made. A finalizer keeps it from being deleted by mistake: `drop_secret` takes
        that away.
        """
        data = {entry: base64.b64encode(value.encode()).decode() for entry, value in entries.items()}
        document = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "immutable": True,
            "metadata": {
                "name": name,
                "labels": {"app.kubernetes.io/managed-by": "luks-csi"},
                "annotations": {"luks.csi.internal/volume": owner},
                "finalizers": [FINALIZER],
            },
            "data": data,
        }
        path = f"api/v1/namespaces/{_safe(namespace)}/secrets"
        if self._get(namespace, "secrets", name) is not None:
            return
        announce()
        made = self._ask("POST", path, document, quotes=False)
        if made is None:
            raise FailedPrecondition(f"there is no namespace {namespace}; make it for the keys of volumes")

    def drop_secret(self, namespace: str, name: str) -> None:
        """Delete such a secret; absent is fine."""
        path = f"api/v1/namespaces/{_safe(namespace)}/secrets/{_safe(name)}"
        patch = {"metadata": {"finalizers": None}}
        if self._ask("PATCH", path, patch, kind="application/merge-patch+json") is not None:
            self._ask("DELETE", path)

    def check(self) -> str:
        """Ask for the API's version; what was found."""
        return f"Kubernetes {shaped(_WHERE, self._ask('GET', 'version') or {}, _Version).gitVersion}"

    def close(self) -> None:
        """Close the connections."""
        made, self._made = self._made, {}
        for each in made.values():
            each.close()

    def _get(self, namespace: str, kind: str, name: str) -> _Entries | None:
        found = self._ask("GET", f"api/v1/namespaces/{_safe(namespace)}/{kind}/{_safe(name)}")
        return None if found is None else shaped(_WHERE, found, _Entries)

    def _ask(
        self, method: str, path: str, document: object = None, *, kind: str = "", quotes: bool = True
    ) -> dict[str, Any] | None:
        headers = {"Authorization": f"Bearer {self.token()}"} | ({"Content-Type": kind} if kind else {})
        return self._service().ask(method, path, document, headers, quotes=quotes)

    def _service(self) -> HttpService:
        """By the CA that kubelet shows now; one by an earlier CA is closed with us, as others may be asking by it."""
        authority, made = self._read("ca.crt"), self._made
        if authority not in made:
            trust = (
                f"{self._folder / 'ca.crt'} is not its CA: kubelet takes it from the ConfigMap kube-root-ca.crt of the "
                f"driver's namespace within minutes of a change, so look what that says"
            )
            base = f"https://{self._host}:{self._port}"
            # Its address is one of the cluster, which a proxy out of it has no way to.
            service = HttpService(_WHERE, _EXTRA, base, Tls(ca=authority), trust=trust, rights=_RIGHTS, by_proxy=False)
            made.setdefault(authority, service)
        return made[authority]

    def _read(self, name: str) -> str:
        path = self._folder / name
        if not self._host:
            raise FailedPrecondition(
                "this runs outside a cluster (KUBERNETES_SERVICE_HOST is not set), so no secret can be had from "
                "Kubernetes"
            )
        try:
            return path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise FailedPrecondition(
                f"{path} cannot be read, so no secret can be had from Kubernetes; install the driver with the "
                f"component deploy/kubernetes/kms, or kms/central where its controller makes volumes: it gives a token"
            ) from None


def _safe(name: str) -> str:
    """A name as one part of a path. An empty one would mean the whole collection."""
    if not name or name in (".", ".."):
        raise FailedPrecondition("the KMS configuration names an object of Kubernetes by an empty name; correct it")
    return quote(name, safe="")


def _text(value: str) -> str | None:
    try:
        return base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
