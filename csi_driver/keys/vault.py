"""Vault: the way to a server, who we are there, and the configuration that Ceph-CSI gave names.

HTTP API: https://developer.hashicorp.com/vault/api-docs. A login is never repeated on an error: some auth methods count
failures, and five of them lock a role for everybody.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from csi_driver.keys.base import Entry, EntryReader
from csi_driver.keys.fields import SKIP_VERIFY, STANDARD, TENANTS, TYPE_FIELDS
from csi_driver.keys.http import HttpService, NotTaken, Tls, shaped
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.model.errors import DriverError, FailedPrecondition, PermissionDenied

EXTRA: Final = "vault"
_TENANT_OPTIONS: Final = frozenset(
    {
        "vaultAddress", "vaultBackend", "vaultBackendPath", "vaultAuthNamespace", "vaultNamespace", "vaultDestroyKeys",
        "vaultTLSServerName", "vaultCAFromSecret", "vaultCAVerify",
    }
)  # fmt: skip
"""What a ConfigMap in the namespace of a claim may set."""
_TENANT_SA_OPTIONS: Final = _TENANT_OPTIONS | {"tenantSAName", "vaultAuthPath", "vaultRole"}

_EARLY: Final = 0.7  # of a token's life, after which there is a new login


def plain_entry(entry: Entry) -> Entry:
    """An entry by Ceph-CSI's names, whichever it has."""
    if TYPE_FIELDS[1] not in entry:
        return entry
    plain: dict[str, object] = {STANDARD[name]: value for name, value in entry.items() if name in STANDARD}
    skip = str(entry.get(SKIP_VERIFY, "")).lower()
    return plain | ({"vaultCAVerify": "false"} if skip in ("1", "t", "true") else {})


def tenant_entry(where: str, entry: Entry, tenant: str, kubernetes: Kubernetes, *, service_account: bool) -> Entry:
    """An entry as it is for the claims of a namespace.

    What the entry says of it in `tenants` comes before the entry, and of the namespace's own ConfigMap what it may say
    comes before both.
    """
    tenants = entry.get(TENANTS)
    own = tenants.get(tenant, {}) if isinstance(tenants, dict) else {}
    if not isinstance(own, dict):
        raise FailedPrecondition(f"what {where} says of the tenant {tenant} is no JSON object; correct it")
    merged = {**entry, **own}
    name = EntryReader(where, merged).text("tenantConfigName", "ceph-csi-kms-config")
    theirs = (kubernetes.config_map(tenant, name) if tenant else None) or {}
    allowed = _TENANT_SA_OPTIONS if service_account else _TENANT_OPTIONS
    return {**merged, **{option: value for option, value in theirs.items() if option in allowed}}


def tls_of(reader: EntryReader, find: Callable[[str, str], str]) -> Tls:
    """How the server is trusted; `find` gets a secret's name and its entry and returns the PEM text."""

    def pem(field: str, entry: str) -> str | None:
        name = reader.text(field, "")
        return find(name, entry) if name else None

    return Tls(
        ca=pem("vaultCAFromSecret", "cert"),
        certificate=pem("vaultClientCertFromSecret", "cert"),
        key=pem("vaultClientCertKeyFromSecret", "key"),
        verify=reader.truth("vaultCAVerify", default=True),
        server_name=reader.text("vaultTLSServerName", "") or None,
    )


def secret_finder(reader: EntryReader, kubernetes: Kubernetes, *namespaces: str) -> Callable[[str, str], str]:
    """Finds the entry of a secret in the first of the namespaces that has it."""

    def find(name: str, entry: str) -> str:
        for namespace in namespaces:
            if namespace and (found := kubernetes.find_secret(namespace, name)) is not None:
                if not (text := found.get(entry)):
                    raise FailedPrecondition(
                        f"the secret {namespace}/{name} that {reader.where} names has no entry {entry}; add it"
                    )
                return text
        raise FailedPrecondition(
            f"the secret {name} that {reader.where} names is in none of the namespaces {', '.join(namespaces)}; make it"
        )

    return find


class _Health(msgspec.Struct):
    version: str = "of an unknown version"


class Login:
    """Who we are at a Vault: a token that is given, or one that a login brings and that ends; `role` is for errors."""

    def __init__(
        self,
        token: str = "",
        path: str = "",
        document: Callable[[], Mapping[str, str]] = dict,
        role: str = "",
    ) -> None:
        self.role = role
        self._token = token
        self._until = float("inf") if token else 0.0
        self._path = path
        self._document = document
        self._lock = threading.Lock()
        # Not the error itself: it would keep the frames that it went through, and a DEK in one of them.
        self._failed: tuple[float, type[DriverError], str] | None = None

    def token(self, login: Callable[[str, Mapping[str, str]], dict[str, Any]]) -> str:
        """The token; `login` posts a document to a path of the API.

        One caller logs in for all, and those who waited for it meanwhile share its error.
        """
        came = time.monotonic()
        with self._lock:
            if self._failed is not None and self._failed[0] > came:
                raise self._failed[1](self._failed[2])
            if time.monotonic() >= self._until:
                try:
                    found = login(self._path, self._document()).get("auth")
                except DriverError as error:
                    self._failed = time.monotonic(), type(error), str(error)
                    raise
                auth = found if isinstance(found, dict) else {}
                seconds = auth.get("lease_duration")
                self._token = str(auth.get("client_token", ""))
                self._until = time.monotonic() + _EARLY * (seconds if isinstance(seconds, int | float) else 0)
            return self._token

    def forget(self, token: str) -> bool:
        """That token was refused; whether another login may bring a better one."""
        with self._lock:
            if self._path and token == self._token:
                self._until = 0.0
            return bool(self._path)


def kubernetes_login(reader: EntryReader, default_path: str | None, jwt: Callable[[], str]) -> Login:
    """A login by a service account's token (Vault's auth method kubernetes)."""
    mount = auth_mount(reader.text("vaultAuthPath", default_path))
    role = reader.text("vaultRole", "csi-kubernetes" if default_path else None)
    return Login(path=f"auth/{mount}/login", document=lambda: {"role": role, "jwt": jwt()}, role=role)


def read_token(path: Path) -> str:
    """The text of a token file. Raises FailedPrecondition."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise FailedPrecondition(
            f"the service account token {path} cannot be read; install the driver with the component "
            f"deploy/kubernetes/kms, or kms/central where its controller makes volumes: it mounts it"
        ) from None


def auth_mount(path: str) -> str:
    """The mount of an auth method: "kubernetes" of "/v1/auth/kubernetes/login", and of itself."""
    found = re.search(r"(?:^|/)auth/(.+?)(?:/login)?/?$", path)
    return "/".join(quote(part, safe="") for part in (found.group(1) if found else path).strip("/").split("/"))


class Vault:
    """A Vault server as one entry of the configuration reaches it."""

    def __init__(self, reader: EntryReader, tls: Tls, login: Login) -> None:
        address = reader.text("vaultAddress")
        if "@" in address:  # it is a part of errors
            raise FailedPrecondition(
                f"the field vaultAddress of {reader.where} must be an address alone, without a user or a password"
            )
        self.where = f"{reader.where} at {address}"
        self._namespace = reader.text("vaultNamespace", "")
        self._auth_namespace = reader.text("vaultAuthNamespace", self._namespace)
        self._login = login
        self._service = HttpService(self.where, EXTRA, address, tls)

    def ask(self, method: str, path: str, document: object = None, *, quotes: bool = True) -> dict[str, Any] | None:
        """The answer of the API below /v1; None for 404. `quotes` as in `HttpService.ask`, and errors as it.

        Raises NoRoute where nothing is mounted.
        """

        def with_token(token: str) -> dict[str, Any] | None:
            headers = {"X-Vault-Token": token, "X-Vault-Request": "true"} | _namespace(self._namespace)
            return self._service.ask(method, f"v1/{path}", document, headers, quotes=quotes, routes=True)

        token = self._login.token(self._log_in)
        try:
            return with_token(token)
        except PermissionDenied:
            if not self._login.forget(token):
                raise
        return with_token(self._login.token(self._log_in))  # the token had ended, or its role has another policy since

    def log_in(self) -> None:
        """Have a token."""
        self._login.token(self._log_in)

    def health(self) -> str:
        """What it says of itself: whether it is unsealed, and its version."""
        found = self._service.ask("GET", "v1/sys/health?standbyok=true&perfstandbyok=true", quotes=True) or {}
        version = shaped(self.where, found, _Health).version
        self.log_in()
        return f"Vault {version} takes our login"

    def close(self) -> None:
        """Close the connections."""
        self._service.close()

    def _log_in(self, path: str, document: Mapping[str, str]) -> dict[str, Any]:
        try:
            found = self._service.ask(
                "POST", f"v1/{path}", document, _namespace(self._auth_namespace), again=False, quotes=False
            )
        except (NotTaken, PermissionDenied) as error:
            # Vault says as little of a role that it does not know as of an account that the role is not bound to.
            raise type(error)(
                f"{self.where} refuses the login as role {self._login.role} at {path}; correct vaultRole or "
                f"vaultAuthPath, or have the role there bound to our service account"
            ) from None
        if found is None:
            raise FailedPrecondition(f"{self.where} has nothing at {path}; correct vaultAuthPath")
        return found


def _namespace(name: str) -> dict[str, str]:
    return {"X-Vault-Namespace": name} if name else {}


def joined(*parts: str) -> str:
    """A path of the API: each part encoded, none empty."""
    return "/".join(quote(each, safe="") for part in parts for each in part.split("/") if each)
