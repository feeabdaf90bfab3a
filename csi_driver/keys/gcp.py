"""KMS type `gcp-kms`: DEKs wrapped by a symmetric key of Google Cloud KMS, over gRPC, as its client does by default.

The volume's name is additional authenticated data: Google unwraps for no other. What is sent and what comes back is
compared by CRC32C, as https://cloud.google.com/kms/docs/data-integrity-guidelines asks for. Each call has a deadline
and is made once; we ask again.
"""

import base64
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import msgspec

from csi_driver.keys.base import SECONDS, EntryReader, Wrapped
from csi_driver.keys.clients import KeptClient, tls_failed, unreadable
from csi_driver.keys.extras import load
from csi_driver.keys.http import Tls
from csi_driver.model.errors import DriverError, FailedPrecondition, KeyLost, PermissionDenied, Unavailable
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

EXTRA: Final = "gcp"
CREDENTIALS: Final = "credentials.json"
_TRANSPORTS: Final = "google.cloud.kms_v1.services.key_management_service.transports"
_KEY: Final = re.compile(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+")
_VERSION: Final = re.compile(rf"({_KEY.pattern})/cryptoKeyVersions/([0-9]+)")
_TLS_FAILED: Final = re.compile(r"failed to connect to all addresses.*([Hh]andshake|[Vv]erification)", re.DOTALL)
"""What gRPC 1.85 itself says of a connection; it has no code of its own for that. Read, and not repeated."""
_CHECKED: Final = "luks-csi-check"
_PASSING: Final = frozenset({408, 429})

_ERRORS: Final[dict[grpc.StatusCode, tuple[type[DriverError], str]]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: (Unavailable, "did not answer in time; the call may be repeated"),
    grpc.StatusCode.UNAVAILABLE: (Unavailable, "cannot be reached or broke off; the call may be repeated"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (Unavailable, "is overloaded, or its quota used up; the call may be repeated"),
    grpc.StatusCode.INTERNAL: (Unavailable, "is broken; the call may be repeated"),
    grpc.StatusCode.UNKNOWN: (Unavailable, "is broken; the call may be repeated"),
    grpc.StatusCode.ABORTED: (Unavailable, "broke off; the call may be repeated"),
    grpc.StatusCode.CANCELLED: (Unavailable, "broke off; the call may be repeated"),
    grpc.StatusCode.PERMISSION_DENIED: (
        PermissionDenied,
        "refuses; check that the account has the role roles/cloudkms.cryptoKeyEncrypterDecrypter on the key",
    ),
    grpc.StatusCode.UNAUTHENTICATED: (PermissionDenied, "does not take the credentials; check them"),
    grpc.StatusCode.NOT_FOUND: (KeyLost, "has no such key; correct keyName"),
    grpc.StatusCode.FAILED_PRECONDITION: (
        KeyLost,
        "cannot use the key: it is disabled, destroyed or of another purpose; enable or restore it, or name another",
    ),
}


@dataclass(frozen=True)
class Account:
    """A key, and who may use it: a service account's key as JSON, without one whom the surroundings say.

    `endpoint` and `authority`, PEM text, are for a private way to Google, which shows a certificate of its own.
    """

    key: str
    credentials: str | None = field(default=None, repr=False)
    endpoint: str | None = None
    authority: str | None = None
    seconds: float = SECONDS


def account_of(reader: EntryReader, credentials: str | None) -> Account:
    """The account that an entry names, and its secret where it names one. Raises FailedPrecondition."""
    key, endpoint = reader.text("keyName"), reader.text("endpoint", "")
    if not _KEY.fullmatch(key):
        raise FailedPrecondition(
            f"the field keyName of {reader.where} must be a key without a version, such as "
            f"projects/P/locations/L/keyRings/R/cryptoKeys/K"
        )
    if "/" in endpoint:
        raise FailedPrecondition(
            f"the field endpoint of {reader.where} must be a host, with or without a port, such as "
            f"cloudkms.example.com:443"
        )
    authority = reader.text("endpointCA", "") or None
    Tls(ca=authority).context(reader.where)  # of one that is none gRPC makes a connection that fails
    return Account(key, credentials, endpoint or None, authority, reader.seconds("timeoutSeconds", SECONDS))


class _Client:
    """Google's client for the key of an account."""

    def __init__(self, where: str, account: Account) -> None:
        self._where = where
        self._account = account
        self._crc = load("google_crc32c", where, EXTRA).value
        transports = load(_TRANSPORTS, where, EXTRA)
        authority = account.authority.encode() if account.authority else None
        self._channel = transports.KeyManagementServiceGrpcTransport.create_channel(
            account.endpoint or f"{transports.KeyManagementServiceGrpcTransport.DEFAULT_HOST}:443",
            credentials=_credentials(where, account),
            ssl_credentials=grpc.ssl_channel_credentials(authority),
            options=[("grpc.max_reconnect_backoff_ms", 1000)],  # a service that was away is found soon
        )
        transport = transports.KeyManagementServiceGrpcTransport(channel=self._channel)
        self._service = load("google.cloud.kms_v1", where, EXTRA).KeyManagementServiceClient(transport=transport)

    def encrypt(self, name: str, plaintext: bytes) -> Wrapped:
        """Wrap by the primary version of the key."""
        bound = name.encode()
        found = self._service.encrypt(
            request={
                "name": self._account.key,
                "plaintext": plaintext,
                "plaintext_crc32c": self._crc(plaintext),
                "additional_authenticated_data": bound,
                "additional_authenticated_data_crc32c": self._crc(bound),
            },
            retry=None,
            timeout=self._account.seconds,
        )
        arrived = found.verified_plaintext_crc32c and found.verified_additional_authenticated_data_crc32c
        if not arrived or found.ciphertext_crc32c != self._crc(found.ciphertext):
            raise self._damaged()
        version = _VERSION.fullmatch(found.name)
        key, number = version.groups() if version else (self._account.key, "")
        return Wrapped(base64.b64encode(found.ciphertext).decode(), key, number)

    def decrypt(self, name: str, key: str, ciphertext: bytes) -> bytes:
        """What that key wrapped, by whichever version."""
        bound = name.encode()
        found = self._service.decrypt(
            request={
                "name": key or self._account.key,
                "ciphertext": ciphertext,
                "ciphertext_crc32c": self._crc(ciphertext),
                "additional_authenticated_data": bound,
                "additional_authenticated_data_crc32c": self._crc(bound),
            },
            retry=None,
            timeout=self._account.seconds,
        )
        plaintext: bytes = found.plaintext
        if found.plaintext_crc32c != self._crc(plaintext):
            raise self._damaged()
        return plaintext

    def close(self) -> None:
        self._channel.close()

    def _damaged(self) -> Unavailable:
        return Unavailable(
            f"what was sent to {self._where}, or its answer, was damaged on the way (CRC32C); the call may be repeated"
        )


class CloudKms:
    """Wraps by the key of an account, which `account` finds when a client is made.

    What was wrapped by another key, which the record names, is unwrapped by that one.
    """

    def __init__(self, where: str, account: Callable[[], Account]) -> None:
        self._where = where
        self._client = KeptClient(where, EXTRA, lambda: _Client(where, account()), lambda: _told(where))
        logging.getLogger("google").setLevel(logging.CRITICAL + 1)  # what fails is told by us

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        return self._client.ask(lambda client: client.encrypt(name, key.reveal()))

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        try:
            ciphertext = base64.b64decode(trail.wrapped, validate=True)
        except ValueError:
            raise KeyLost(
                f"the wrapped key in the volume's record is none of {self._where}; restore the record from a backup"
            ) from None

        def ask(client: _Client) -> bytes:
            with _told_of(self._where, trail.name):
                return client.decrypt(trail.name, trail.key_id, ciphertext)

        return Passphrase(self._client.ask(ask))

    def check(self) -> str:
        """Wrap and unwrap a word: to look at the key takes another right than to use it."""
        made = self._client.ask(lambda client: client.encrypt(_CHECKED, _CHECKED.encode()))
        trail = KeyTrail(kms_id="", type="", name=_CHECKED, wrapped=made.text, key_id=made.key_id)
        self.unwrap(trail)
        return f"its key wraps and unwraps, in version {made.key_version}"

    def close(self) -> None:
        self._client.close()


def _credentials(where: str, account: Account) -> Any:
    """Who we are to Google, with a token that was got just now: a channel would tell a refused one as a broken line."""
    auth = load("google.auth", where, EXTRA)
    exceptions = load("google.auth.exceptions", where, EXTRA)
    scopes = load(_TRANSPORTS, where, EXTRA).KeyManagementServiceGrpcTransport.AUTH_SCOPES[:1]
    plain = load("google.auth.transport.requests", where, EXTRA).Request()

    def request(*args: Any, **options: Any) -> Any:
        """As Google's own, for as long as a call may take, and with an overloaded server told from one that refuses."""
        response = plain(*args, **{"timeout": account.seconds, **options})
        if response.status in _PASSING or response.status >= 500:
            raise _no_token(where)
        return response

    try:
        found = _service_account(where, account.credentials, scopes) or auth.default(scopes=scopes, request=request)[0]
        if hasattr(found, "with_always_use_jwt_access"):  # signed here: no server has to be asked for a token
            found = found.with_always_use_jwt_access(True)
        found.refresh(request)
    except exceptions.DefaultCredentialsError:
        raise FailedPrecondition(
            f"{where} names no secret and the driver's container has no credentials of Google; add secretName, or give "
            f"its service account a workload identity"
        ) from None
    except exceptions.GoogleAuthError as error:
        if error.retryable or isinstance(error, exceptions.TransportError):
            raise _no_token(where) from None
        raise PermissionDenied(
            f"Google gives no token for {where}; check the service account and its workload identity"
        ) from None
    return found


def _no_token(where: str) -> Unavailable:
    return Unavailable(f"Google gives no token for {where} at the moment; the call may be repeated")


def _service_account(where: str, text: str | None, scopes: tuple[str, ...]) -> Any:
    """The service account whose key that is; None where there is none."""
    if text is None:
        return None
    credentials = load("google.oauth2.service_account", where, EXTRA).Credentials
    try:
        return credentials.from_service_account_info(msgspec.json.decode(text), scopes=scopes)
    except Exception:  # noqa: BLE001 - whatever is made of what is no JSON, no object, or no key in one
        raise FailedPrecondition(
            f"the entry {CREDENTIALS} in the secret of {where} is no key of a service account; put the JSON file there "
            f"that Google made"
        ) from None


@contextmanager
def _told_of(where: str, name: str) -> Iterator[None]:
    """That what was wrapped is not taken back."""
    exceptions = load("google.api_core.exceptions", where, EXTRA)
    try:
        yield
    except exceptions.InvalidArgument:
        raise KeyLost(
            f"{where} does not unwrap the key of {name}: it is of another key, or of another volume; restore the "
            f"record from a backup"
        ) from None


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Errors of Google's client as ours."""
    exceptions = load("google.api_core.exceptions", where, EXTRA)
    try:
        yield
    except DriverError:
        raise
    except exceptions.GoogleAPICallError as error:
        if error.grpc_status_code is grpc.StatusCode.UNAVAILABLE and _TLS_FAILED.search(str(error)):
            raise tls_failed(where) from None
        code = error.grpc_status_code
        kind, words = _ERRORS.get(code, (FailedPrecondition, "does not take the request; check its entry"))
        raise kind(f"{where} {words} ({code.name if code else type(error).__name__})") from None
    except Exception as error:  # noqa: BLE001 - whatever the client makes of an answer, or of an address, that is none
        raise unreadable(where, error) from None
