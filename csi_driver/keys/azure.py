"""KMS type `azure-kv`: DEKs kept as secrets of an Azure Key Vault, as Ceph-CSI keeps them.

A secret there has a name of letters, digits and '-', in which upper and lower case are the same. A name that is fit is
used as it is, so that each finds the other's; of any other one, and ours have dots, the secret has the SHA-256, and the
name is its tag. A deleted secret can be had back as long as the Key Vault says, and keeps its name so long.

The client asks once and follows no redirect; we ask again.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any, Final

from csi_driver.keys.base import SECONDS, Announce, nobody, require_name
from csi_driver.keys.clients import KeptClient, causes, unreachable, unreadable
from csi_driver.keys.extras import load
from csi_driver.model.errors import DriverError, FailedPrecondition, KeyLost, PermissionDenied, Unavailable
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

EXTRA: Final = "azure"
_TAG: Final = "luks-csi-volume"
_CHECKED: Final = "luks-csi-check"
_LONGEST_TAG: Final = 256
_FIT: Final = re.compile(r"[0-9a-zA-Z-]{1,127}")
_PASSING: Final = frozenset({408, 429})
_CLOSED: Final = frozenset({"SecretDisabled", "SecretExpired", "SecretNotYetValid"})


@dataclass(frozen=True)
class Account:
    """A Key Vault and the application that may use it; `certificate` is PEM text, with the private key (RSA).

    `authority` is the host of Microsoft Entra ID where it is not the public cloud's.
    """

    vault: str
    tenant: str
    application: str
    certificate: str = field(repr=False)
    authority: str | None = None
    seconds: float = SECONDS

    def client(self, where: str) -> "_Client":
        """A client. Raises FailedPrecondition when the certificate or an address cannot be used."""
        identity = load("azure.identity", where, EXTRA)
        secrets = load("azure.keyvault.secrets", where, EXTRA)
        once: dict[str, Any] = {"retry_total": 0, "permit_redirects": False}
        once |= {"connection_timeout": self.seconds, "read_timeout": self.seconds}
        # The hosts of other clouds are looked up at the public one, where nobody knows a private one.
        elsewhere = {"authority": self.authority, "disable_instance_discovery": True} if self.authority else {}
        try:
            credential = identity.CertificateCredential(
                self.tenant,
                self.application,
                certificate_data=self.certificate.encode(),
                raw_response_hook=_busy,
                **elsewhere,
                **once,
            )
        except (ValueError, TypeError):  # it may quote what it was given
            raise FailedPrecondition(
                f"the certificate, the tenant or the authority of {where} cannot be used; CLIENT_CERT in its secret "
                f"must be PEM text of an RSA certificate and its private key"
            ) from None
        return _Client(credential, secrets.SecretClient(self.vault, credential, **once))


@dataclass(frozen=True)
class _Client:
    """The client of a Key Vault and the one that gets tokens for it."""

    credential: Any
    secrets: Any

    def close(self) -> None:
        self.secrets.close()
        self.credential.close()


class KeyVault:
    """A source that keeps DEKs in the Key Vault of an account, which `account` finds when a client is made."""

    keeps = True

    def __init__(self, where: str, account: Callable[[], Account]) -> None:
        self._where = where
        self._client = KeptClient(where, EXTRA, lambda: account().client(where), lambda: _told(where))
        self._absent = load("azure.core.exceptions", where, EXTRA).ResourceNotFoundError
        for logger in ("azure", "msal"):  # what fails is told by us, without what the server said
            logging.getLogger(logger).setLevel(logging.CRITICAL + 1)

    def create(self, name: str, announce: Announce = nobody) -> KeyTrail:
        """What a cut call has left is used: nothing was encrypted with it, or with nothing else."""
        kept = _kept_name(name)
        found = self._read(kept)
        if found is None:
            announce()
            made = Passphrase.random().reveal().decode()
            found = self._client.ask(
                lambda client: _read(client.secrets.set_secret(kept, made, tags={_TAG: name[:_LONGEST_TAG]}))
            )
        return KeyTrail(kms_id="", type="", name=name, key_id=kept, key_version=found[1])

    def fetch(self, trail: KeyTrail) -> Passphrase:
        """Of the version that was recorded: a newer one is somebody else's doing and opens nothing."""
        require_name(self._where, trail)
        kept = _kept_name(trail.name)
        found = self._read(kept, trail.key_version)
        if found is None:
            version = f" in version {trail.key_version}" if trail.key_version else ""
            raise KeyLost(
                f"{self._where} has no secret {kept}{version}, which is the key of {trail.name}; restore it there (az "
                f"keyvault secret recover, or from a backup), without it the volume cannot be opened"
            )
        if not found[0]:
            raise KeyLost(f"the secret {kept} of {self._where} is empty; restore what was there")
        return Passphrase(found[0].encode())

    def rewrap(self, trail: KeyTrail) -> KeyTrail:
        """Azure keeps it, under keys of its own."""
        return trail

    def destroy(self, trail: KeyTrail) -> None:
        kept = _kept_name(trail.name)

        def ask(client: _Client) -> None:
            with contextlib.suppress(self._absent):
                client.secrets.begin_delete_secret(kept)

        self._client.ask(ask)

    def check(self) -> str:
        """Read a secret that is not there: that takes the login and the right to read."""
        self._read(_CHECKED)
        return "it takes our login and lets us read secrets"

    def close(self) -> None:
        self._client.close()

    def _read(self, kept: str, version: str = "") -> tuple[str, str] | None:
        """A secret and its version; None where there is none."""

        def ask(client: _Client) -> tuple[str, str] | None:
            try:
                return _read(client.secrets.get_secret(kept, version or None))
            except self._absent:
                return None

        return self._client.ask(ask)


def _read(secret: Any) -> tuple[str, str]:
    return str(secret.value or ""), str(secret.properties.version or "")


def _kept_name(name: str) -> str:
    """The name of the secret for a key; no other key has it."""
    return name if _FIT.fullmatch(name) else f"luks-csi-{hashlib.sha256(name.encode()).hexdigest()}"


def _busy(response: Any) -> None:
    """Tell an overloaded Entra ID before the client makes a refusal of it."""
    status = response.http_response.status_code
    if status in _PASSING or status >= 500:
        raise Unavailable(f"Microsoft Entra ID is overloaded or broken (HTTP {status}); the call may be repeated")


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Errors of Azure's clients as ours."""
    exceptions = load("azure.core.exceptions", where, EXTRA)
    try:
        yield
    except DriverError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the client makes of an answer, or of an address, that is none
        if isinstance(cause := error.__cause__, DriverError):
            raise type(cause)(f"{where}: {cause}") from None
        raise unreachable(where, EXTRA, error) or _refusal(where, error, exceptions) from None


def _refusal(where: str, error: Exception, exceptions: Any) -> DriverError:
    status = getattr(error, "status_code", None) or 0
    if (code := _inner_code(error)) in _CLOSED:
        return KeyLost(f"{where} does not give the key ({code}); enable the secret there, and set its dates right")
    if status in (401, 403):
        return PermissionDenied(
            f"{where} refuses (HTTP {status}); check that the application may get, set and delete secrets there"
        )
    if status == 409:
        return FailedPrecondition(
            f"{where} keeps a deleted secret of the key's name that can be had back; recover it, or purge it (az "
            f"keyvault secret purge)"
        )
    if status in _PASSING or status >= 500:
        return Unavailable(f"{where} is overloaded or broken (HTTP {status}); the call may be repeated")
    if status >= 300:
        return FailedPrecondition(f"{where} does not take the request (HTTP {status}); check its entry")
    is_read = not any(isinstance(cause, JSONDecodeError) for cause in causes(error))
    if isinstance(error, exceptions.ClientAuthenticationError) and is_read:
        return PermissionDenied(
            f"Microsoft Entra ID gives no token for {where}; check the tenant, the application and its certificate"
        )
    return unreadable(where, error)


def _inner_code(error: Any) -> str:
    """Azure's own word for what is wrong: {"error": {"innererror": {"code": …}}}."""
    inner = getattr(getattr(error, "error", None), "innererror", None)
    return str(inner.get("code", "")) if isinstance(inner, dict) else ""
