"""KMS type `kms-plugin`: Kubernetes' own interface to plug-ins of key management systems (KMS v2), on a unix socket.

Every plug-in that was written to encrypt the secrets in etcd works here too. The interface binds what is wrapped to
nothing, so the volume's name is wrapped with the key and compared.
"""

import uuid
from collections.abc import Callable
from typing import Any, Final, TypeVar

import grpc
import msgspec

from csi_driver.keys import kmsv2_pb2 as kms
from csi_driver.keys.base import SECONDS, EntryReader, Wrapped
from csi_driver.keys.binding import bound, unbound
from csi_driver.keys.kmsv2_pb2_grpc import KeyManagementServiceStub
from csi_driver.keys.retries import retried
from csi_driver.model.errors import DriverError, FailedPrecondition, KeyLost, PermissionDenied, Unavailable
from csi_driver.model.reading import decode
from csi_driver.model.secret import Passphrase
from csi_driver.model.text import one_line, printable
from csi_driver.model.volume import KeyTrail

T = TypeVar("T")

EXTRA: Final = "kubernetes"
_VERSIONS: Final = ("v2", "v2beta1")
_SCHEME: Final = "unix://"
_MOST_QUOTED: Final = 200

_ERRORS: Final[dict[grpc.StatusCode, tuple[type[DriverError], str]]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: (Unavailable, "did not answer in time; look at it, the call may be repeated"),
    grpc.StatusCode.UNAVAILABLE: (Unavailable, "cannot be reached; check that it runs, the call may be repeated"),
    grpc.StatusCode.INTERNAL: (Unavailable, "is broken; look at its log, the call may be repeated"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (Unavailable, "is overloaded; the call may be repeated"),
    grpc.StatusCode.PERMISSION_DENIED: (PermissionDenied, "refuses; check what its KMS allows it"),
    grpc.StatusCode.UNAUTHENTICATED: (PermissionDenied, "refuses; check its credentials"),
    grpc.StatusCode.NOT_FOUND: (KeyLost, "has the key no more; restore it in its KMS"),
}


class _Kept(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the volume's record holds of a wrapped key."""

    ciphertext: bytes
    annotations: dict[str, bytes] = {}


class PluginWrapper:
    """Wraps by the plug-in at the entry's `endpoint`, such as unix:///var/run/kmsplugin/socket.sock."""

    def __init__(self, reader: EntryReader) -> None:
        endpoint = reader.text("endpoint")
        if not endpoint.startswith(f"{_SCHEME}/"):
            raise FailedPrecondition(
                f"the field endpoint of {reader.where} must be the socket of a plug-in, such as unix:///run/kms.sock"
            )
        self._where = f"{reader.where} at {endpoint}"
        self._seconds = reader.seconds("timeoutSeconds", SECONDS)
        self._channel = grpc.insecure_channel(
            f"unix:{endpoint.removeprefix(_SCHEME)}",
            # Through no proxy, and a socket that appears late is found soon.
            options=[("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 1000)],
        )
        self._stub = KeyManagementServiceStub(self._channel)

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        request = kms.EncryptRequest(plaintext=bound(name, key), uid=str(uuid.uuid4()))
        found = self._ask(lambda: self._stub.Encrypt(request, timeout=self._seconds), quotes=False)
        kept = _Kept(found.ciphertext, dict(found.annotations))
        return Wrapped(msgspec.json.encode(kept).decode(), found.key_id)

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        try:
            kept = decode(trail.wrapped, _Kept)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            raise KeyLost(
                f"the wrapped key in the volume's record is none of {self._where}; restore the record from a backup"
            ) from None
        request = kms.DecryptRequest(
            ciphertext=kept.ciphertext, uid=str(uuid.uuid4()), key_id=trail.key_id, annotations=kept.annotations
        )
        plaintext = self._ask(lambda: self._stub.Decrypt(request, timeout=self._seconds)).plaintext
        return unbound(self._where, trail.name, plaintext)

    def check(self) -> str:
        found = self._ask(lambda: self._stub.Status(kms.StatusRequest(), timeout=self._seconds))
        if found.version not in _VERSIONS or found.healthz != "ok":
            said = printable(f"{found.version!r}, {found.healthz!r}")[:_MOST_QUOTED]
            raise FailedPrecondition(f"{self._where} says {said} of its version and health; look at the plug-in")
        return f"a plug-in of version {found.version} with the key {printable(found.key_id)[:_MOST_QUOTED]}"

    def close(self) -> None:
        self._channel.close()

    def _ask(self, call: Callable[[], T], *, quotes: bool = True) -> T:
        def once() -> T:
            try:
                return call()
            except grpc.RpcError as error:
                raise _refusal(self._where, error, quotes=quotes) from None

        return retried(self._where, EXTRA, once)


def _refusal(where: str, error: Any, *, quotes: bool) -> DriverError:
    code, details = error.code(), error.details() or ""  # what a call raises is the call too
    said = f" ({code.name}{f': {one_line(details, _MOST_QUOTED)}' if quotes and details else ''})"
    kind, words = _ERRORS.get(code, (FailedPrecondition, "does not take the request; look at its log"))
    return kind(f"{where} {words}{said}")
