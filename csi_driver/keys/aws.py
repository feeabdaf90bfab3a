"""KMS types `aws-metadata` and `aws-sts-metadata`: DEKs wrapped by a key of AWS KMS.

boto3 tries again by a budget of its own that time does not refill (measured on 1.44); so it is told not to, and we do.
"""

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from csi_driver.keys.base import SECONDS, Wrapped
from csi_driver.keys.clients import KeptClient, unreadable
from csi_driver.keys.extras import load
from csi_driver.model.errors import DriverError, FailedPrecondition, KeyLost, PermissionDenied, Unavailable
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

EXTRA: Final = "aws"
SESSION: Final = "luks-csi"
_CONTEXT: Final = "luks-csi-volume"

_LOST: Final = frozenset({"NotFoundException", "DisabledException", "KMSInvalidStateException"})
_DENIED: Final = frozenset(
    {
        "AccessDenied", "AccessDeniedException", "ExpiredToken", "ExpiredTokenException", "IncompleteSignature",
        "InvalidClientTokenId", "InvalidIdentityToken", "SignatureDoesNotMatch", "UnrecognizedClientException",
    }
)  # fmt: skip
_FOREIGN: Final = frozenset({"InvalidCiphertextException", "IncorrectKeyException"})
_PASSING: Final = frozenset(
    {"ThrottlingException", "Throttling", "LimitExceededException", "RequestLimitExceeded", "KeyUnavailableException"}
)


@dataclass(frozen=True)
class Account:
    """A key of AWS KMS and who may use it; nothing of it is shown."""

    region: str
    key: str = field(repr=False)
    credentials: dict[str, str] = field(repr=False)
    endpoint: str | None = None

    def client(self, where: str, service: str) -> Any:
        """A client of boto3."""
        config = load("botocore.config", where, EXTRA).Config(
            connect_timeout=SECONDS, read_timeout=SECONDS, retries={"total_max_attempts": 1}
        )
        session = load("boto3", where, EXTRA).session.Session()
        return session.client(
            service, region_name=self.region, endpoint_url=self.endpoint, config=config, **self.credentials
        )


class AwsWrapper:
    """Wraps by the key of an account, which `account` finds when a client is made.

    The volume's name is the encryption context: AWS unwraps for no other. What Ceph-CSI wrapped has none, and neither
    has a trail of it a name.
    """

    def __init__(self, where: str, account: Callable[[], Account]) -> None:
        self._where = where
        self._client = KeptClient(where, EXTRA, lambda: _Client(where, account()), lambda: _told(where))

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        def ask(client: Any, account: Account) -> Any:
            return client.encrypt(KeyId=account.key, Plaintext=key.reveal(), EncryptionContext=_context(name))

        return self._wrapped(self._ask(ask))

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        def ask(client: Any, account: Account) -> Any:
            return client.decrypt(
                CiphertextBlob=_blob(trail, self._where),
                EncryptionContext=_context(trail.name),
                **_recorded("KeyId", trail, account),
            )

        return Passphrase(self._member(self._ask(ask), "Plaintext"))

    def rewrap_there(self, trail: KeyTrail) -> Wrapped:
        def ask(client: Any, account: Account) -> Any:
            context = _context(trail.name)
            return client.re_encrypt(
                CiphertextBlob=_blob(trail, self._where),
                SourceEncryptionContext=context,
                DestinationKeyId=account.key,
                DestinationEncryptionContext=context,
                **_recorded("SourceKeyId", trail, account),
            )

        return self._wrapped(self._ask(ask))

    def check(self) -> str:
        found = self._ask(lambda client, account: client.describe_key(KeyId=account.key))
        state = self._member(self._member(found, "KeyMetadata"), "KeyState")
        if state != "Enabled":
            raise KeyLost(f"the key of {self._where} is {state}; enable it, or restore it before it is deleted")
        return "its key is enabled"

    def close(self) -> None:
        self._client.close()

    def _wrapped(self, found: Any) -> Wrapped:
        blob = self._member(found, "CiphertextBlob")
        return Wrapped(base64.b64encode(blob).decode(), str(self._member(found, "KeyId")))

    def _member(self, found: Any, name: str) -> Any:
        """A member of an answer; boto3 makes of one that ends early one without members."""
        if name not in found:
            raise Unavailable(f"{self._where} answered without {name}; check its address, the call may be repeated")
        return found[name]

    def _ask(self, call: Callable[[Any, Account], Any]) -> Any:
        return self._client.ask(lambda client: call(client.kms, client.account))


class _Client:
    """A client of boto3 for the key of an account."""

    def __init__(self, where: str, account: Account) -> None:
        self.kms = account.client(where, "kms")
        self.account = account

    def close(self) -> None:
        self.kms.close()


def assume_role(where: str, account: Account, role: str, token: str) -> dict[str, str]:
    """Credentials of a role for who shows a web identity token (STS, AssumeRoleWithWebIdentity)."""
    unsigned = load("botocore", where, EXTRA).UNSIGNED
    config = load("botocore.config", where, EXTRA).Config(
        signature_version=unsigned, connect_timeout=SECONDS, read_timeout=SECONDS, retries={"total_max_attempts": 1}
    )
    with _told(where):
        client = (
            load("boto3", where, EXTRA)
            .session.Session()
            .client("sts", region_name=account.region, endpoint_url=account.endpoint, config=config)
        )
        found = client.assume_role_with_web_identity(RoleArn=role, RoleSessionName=SESSION, WebIdentityToken=token)[
            "Credentials"
        ]
        return {
            "aws_access_key_id": found["AccessKeyId"],
            "aws_secret_access_key": found["SecretAccessKey"],
            "aws_session_token": found["SessionToken"],
        }


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Errors of boto3 as ours. No text of its own is taken over: of an answer that it cannot read it quotes all."""
    exceptions = load("botocore.exceptions", where, EXTRA)
    try:
        yield
    except DriverError:
        raise
    except exceptions.ClientError as error:
        raise _refusal(where, error.response) from None
    except exceptions.BotoCoreError as error:
        raise _unreachable(where, error, exceptions) from None
    except Exception as error:  # noqa: BLE001 - whatever boto3 makes of an answer, or of an address, that is none
        raise unreadable(where, error) from None


def _context(name: str) -> dict[str, str]:
    return {_CONTEXT: name} if name else {}


def _recorded(parameter: str, trail: KeyTrail, account: Account) -> dict[str, str]:
    """The key that wrapped it, as AWS recommends: else a disabled or deleted one may be told as refused access.

    Not where the region has been changed since: there is another ARN for it.
    """
    return {parameter: trail.key_id} if f":kms:{account.region}:" in trail.key_id else {}


def _blob(trail: KeyTrail, where: str) -> bytes:
    try:
        return base64.b64decode(trail.wrapped, validate=True)
    except ValueError:
        raise KeyLost(
            f"the wrapped key in the volume's record is none of {where}; restore the record from a backup"
        ) from None


def _refusal(where: str, response: Any) -> DriverError:
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _LOST:
        return KeyLost(
            f"the key of {where} cannot be used ({code}); enable it, or restore it before it is deleted (AWS KMS keeps "
            f"deleted keys for a while)"
        )
    if code in _FOREIGN:
        return KeyLost(
            f"{where} does not unwrap the volume's key ({code}): it is of another key, or of another volume; "
            f"restore the record from a backup"
        )
    if code in _DENIED or status in (401, 403):
        return PermissionDenied(f"{where} refuses ({code}); check its credentials and the key's policy")
    if code in _PASSING or status == 429 or status >= 500:
        return Unavailable(f"{where} is overloaded or broken ({code or status}); the call may be repeated")
    return FailedPrecondition(f"{where} does not take the request ({code or status}); check its entry")


def _unreachable(where: str, error: Exception, exceptions: Any) -> DriverError:
    kind = type(error).__name__
    if isinstance(error, exceptions.SSLError):
        return FailedPrecondition(f"the TLS connection to {where} failed ({kind}); check its address and certificate")
    if isinstance(
        error,
        exceptions.ConnectionError
        | exceptions.HTTPClientError
        | exceptions.ConnectTimeoutError
        | exceptions.ReadTimeoutError,
    ):
        return Unavailable(f"{where} cannot be reached or broke off ({kind}); the call may be repeated")
    return FailedPrecondition(f"{where} cannot be asked ({kind}); check its entry and its secret")
