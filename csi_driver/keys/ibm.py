"""KMS type `ibmkeyprotect`: DEKs wrapped by a root key of IBM Key Protect, with the volume's name as additional data.

Ceph-CSI sends a passphrase as if it were base64 already, and keeps the ciphertext in base64 once more. Ours begins with
`luks-csi:`, so the two are told apart.

The client asks once and follows no redirect; we ask again. Its login is watched: after one that failed, it would sleep
for a minute in each thread that wants a token (measured on ibm-cloud-sdk-core 3.28, findings/ibm-login-pause.sh).
"""

import base64
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from csi_driver.keys.base import SECONDS, EntryReader, Wrapped
from csi_driver.keys.clients import KeptClient, unreachable, unreadable
from csi_driver.keys.extras import load
from csi_driver.model.errors import DriverError, FailedPrecondition, KeyLost, PermissionDenied, Unavailable
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

EXTRA: Final = "ibm"
_OURS: Final = "luks-csi:"
_TOKEN_PATHS: Final = ("/identity/token", "/oidc/token")
"""Of IAM; both mean the same, and the client adds the first itself."""
_ACTIVE: Final = 1
_STATES: Final = {0: "not active yet", 2: "disabled", 3: "deactivated", 5: "destroyed"}
"""By NIST SP 800-57, as Key Protect numbers them."""
_LOST: Final = frozenset({404, 409, 410})
_FOREIGN: Final = frozenset({400, 422})
_PASSING: Final = frozenset({408, 429})


@dataclass(frozen=True)
class Instance:
    """An instance of Key Protect, its root key, and who may use it."""

    address: str
    token_address: str
    instance: str
    root_key: str
    api_key: str = field(repr=False)
    seconds: float = SECONDS


def instance_of(reader: EntryReader, secret: Mapping[str, str], secret_name: str) -> Instance:
    """The instance that an entry and its secret name. Raises FailedPrecondition."""
    entries = EntryReader(f"the secret {secret_name} of {reader.where}", secret)
    token_address = reader.text("IBM_KP_TOKEN_URL", "https://iam.cloud.ibm.com/identity/token").rstrip("/")
    found = next((path for path in _TOKEN_PATHS if token_address.endswith(path)), None)
    if found is None:
        raise FailedPrecondition(
            f"the field IBM_KP_TOKEN_URL of {reader.where} must end with {' or '.join(_TOKEN_PATHS)}, as IAM's does"
        )
    return Instance(
        reader.text("IBM_KP_BASE_URL", "https://us-south.kms.cloud.ibm.com"),
        token_address.removesuffix(found),
        reader.text("IBM_KP_SERVICE_INSTANCE_ID"),
        entries.text("IBM_KP_CUSTOMER_ROOT_KEY").strip(),
        entries.text("IBM_KP_SERVICE_API_KEY").strip(),
        reader.seconds("timeoutSeconds", SECONDS),
    )


class _Client:
    """IBM's client of an instance."""

    def __init__(self, where: str, instance: Instance) -> None:
        self.root_key = instance.root_key
        self._where = where
        self._instance = instance.instance
        self._lock = threading.Lock()
        authenticators = load("ibm_cloud_sdk_core.authenticators", where, EXTRA)
        services = load("keyprotect.ibm_key_protect_api_v2", where, EXTRA)
        try:
            authenticator = authenticators.IAMAuthenticator(instance.api_key, url=instance.token_address)
            self._service = services.IbmKeyProtectApiV2(authenticator)
            self._service.set_service_url(instance.address)
        except ValueError:
            raise FailedPrecondition(
                f"the API key or an address of {where} begins or ends with a brace or a quotation mark; take it away"
            ) from None
        self._tokens = authenticator.token_manager
        self._service.set_http_config({"timeout": instance.seconds, "allow_redirects": False})

    def act(self, action: str, key: str, document: object) -> dict[str, Any]:
        """What comes of `wrap`, `unwrap` or `rewrap` by that key."""
        self._log_in()
        body = {f"key_action_{action}_body": msgspec.json.encode(document)}
        return _document(getattr(self._service, f"{action}_key")(id=key, bluemix_instance=self._instance, **body))

    def metadata(self, key: str) -> dict[str, Any]:
        """What is said of a key, without its material."""
        self._log_in()
        return _document(self._service.get_key_metadata(id=key, bluemix_instance=self._instance))

    def close(self) -> None:
        self._service.get_http_client().close()

    def _log_in(self) -> None:
        """Have a token, one thread for all."""
        exceptions = load("ibm_cloud_sdk_core", self._where, EXTRA)
        with self._lock:
            try:
                self._tokens.get_token()
            except exceptions.ApiException as error:
                raise _login_refused(self._where, error.status_code) from None
            finally:
                self._tokens.request_time = 0  # else whoever comes next sleeps until it is a minute old


class KeyProtect:
    """Wraps by the root key of an instance, which `find` finds when a client is made.

    What was wrapped by another key, which the record names, is unwrapped by that one.
    """

    def __init__(self, where: str, find: Callable[[], Instance]) -> None:
        self._where = where
        self._client = KeptClient(where, EXTRA, lambda: _Client(where, find()), lambda: _told(where))
        # What fails is told by us; it would tell of it too, and advise not to look at certificates.
        logging.getLogger("ibm-cloud-sdk-core").setLevel(logging.CRITICAL + 1)

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        document = {"plaintext": base64.b64encode(key.reveal()).decode()} | _bound(name)

        def ask(client: _Client) -> Wrapped:
            found = client.act("wrap", client.root_key, document)
            return Wrapped(_OURS + found["ciphertext"], client.root_key, _version(found, "keyVersion"))

        return self._client.ask(ask)

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        ciphertext, is_ours = self._ciphertext(trail)

        def ask(client: _Client) -> Passphrase:
            with _told_of(self._where, trail.name):
                document = {"ciphertext": ciphertext} | _bound(trail.name)
                found = client.act("unwrap", trail.key_id or client.root_key, document)
            plaintext = found["plaintext"].encode("ascii")
            return Passphrase(base64.b64decode(plaintext, validate=True) if is_ours else plaintext)

        return self._client.ask(ask)

    def rewrap_there(self, trail: KeyTrail) -> Wrapped:
        ciphertext, is_ours = self._ciphertext(trail)

        def ask(client: _Client) -> Wrapped | None:
            key = trail.key_id or client.root_key
            if key != client.root_key:
                return None
            with _told_of(self._where, trail.name):
                found = client.act("rewrap", key, {"ciphertext": ciphertext} | _bound(trail.name))
            text = found["ciphertext"]
            fresh = _OURS + text if is_ours else base64.b64encode(text.encode()).decode()
            return Wrapped(fresh, key, _version(found, "rewrappedKeyVersion"))

        # Key Protect wraps anew under the same root key only.
        return self._client.ask(ask) or self.wrap(trail.name, self.unwrap(trail))

    def check(self) -> str:
        state = self._client.ask(lambda client: client.metadata(client.root_key)["resources"][0]["state"])
        if state != _ACTIVE:
            said = _STATES.get(state if isinstance(state, int) else -1, "in an unknown state")
            raise KeyLost(f"the root key of {self._where} is {said}; enable or restore it, or name another one")
        return "its root key is active"

    def close(self) -> None:
        self._client.close()

    def _ciphertext(self, trail: KeyTrail) -> tuple[str, bool]:
        """What Key Protect gave, and whether we sent the key that it is of."""
        if trail.wrapped.startswith(_OURS):
            return trail.wrapped.removeprefix(_OURS), True
        try:
            return base64.b64decode(trail.wrapped, validate=True).decode("ascii"), False
        except ValueError:
            raise KeyLost(
                f"the wrapped key in the volume's record is none of {self._where}; restore the record from a backup"
            ) from None


def _bound(name: str) -> dict[str, list[str]]:
    return {"aad": [name]} if name else {}


def _version(found: Mapping[str, Any], name: str) -> str:
    version = found.get(name)
    return str(version.get("id", "")) if isinstance(version, dict) else ""


def _document(response: Any) -> dict[str, Any]:
    """The JSON object of an answer, which the client leaves as it came where its type is not application/json."""
    found = response.get_result()
    if found is not None and not isinstance(found, dict):
        found = msgspec.json.decode(found.content)
    if not isinstance(found, dict):
        raise TypeError
    return found


@contextmanager
def _told_of(where: str, name: str) -> Iterator[None]:
    """That what was wrapped is not taken back."""
    exceptions = load("ibm_cloud_sdk_core", where, EXTRA)
    try:
        yield
    except exceptions.ApiException as error:
        if error.status_code not in _FOREIGN:
            raise
        raise KeyLost(
            f"{where} does not unwrap the key of {name or 'the volume'} (HTTP {error.status_code}): it is of another "
            f"key, or of another volume; restore the record from a backup"
        ) from None


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Errors of IBM's client as ours."""
    exceptions = load("ibm_cloud_sdk_core", where, EXTRA)
    try:
        yield
    except DriverError:
        raise
    except exceptions.ApiException as error:
        raise _refused(where, error.status_code) from None
    except Exception as error:  # noqa: BLE001 - whatever the client makes of an answer, or of an address, that is none
        raise unreachable(where, EXTRA, error) or unreadable(where, error) from None


def _refused(where: str, status: int) -> DriverError:
    if status in (401, 403):
        return PermissionDenied(
            f"{where} refuses (HTTP {status}); check the API key and what its service ID may do there"
        )
    if status in _LOST:
        return KeyLost(
            f"{where} cannot use the root key (HTTP {status}): it is not there, disabled or deleted; enable or restore "
            f"it (Key Protect keeps deleted keys for a while), or correct IBM_KP_CUSTOMER_ROOT_KEY"
        )
    if status in _PASSING or status >= 500:
        return Unavailable(f"{where} is overloaded or broken (HTTP {status}); the call may be repeated")
    if status < 300:
        return Unavailable(f"{where} answered with what is no JSON; check its address, the call may be repeated")
    return FailedPrecondition(f"{where} does not take the request (HTTP {status}); check its entry")


def _login_refused(where: str, status: int) -> DriverError:
    """IAM says 400 of an API key that it does not know."""
    if status in (400, 401, 403):
        return PermissionDenied(f"IBM's IAM gives no token for {where} (HTTP {status}); check the API key")
    if status in _PASSING or status >= 500:
        return Unavailable(f"IBM's IAM is overloaded or broken (HTTP {status}), for {where}; the call may be repeated")
    return FailedPrecondition(
        f"IBM's IAM does not take the request for {where} (HTTP {status}); check IBM_KP_TOKEN_URL"
    )
