"""KMS type `kmip`: DEKs wrapped by a symmetric key of a KMIP server (OASIS KMIP 1.4, Encrypt and Decrypt).

PyKMIP speaks the protocol. The connection is our own: its own looks at the certificate and not at the name in it, and
wants keys in files.
"""

import logging
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from csi_driver.keys.base import SECONDS, EntryReader, Wrapped
from csi_driver.keys.binding import bound, unbound
from csi_driver.keys.extras import load
from csi_driver.keys.http import Tls
from csi_driver.keys.metadata import Sealed, read_sealed
from csi_driver.keys.retries import retried
from csi_driver.model.errors import DriverError, FailedPrecondition, KeyLost, PermissionDenied, Unavailable
from csi_driver.model.secret import Passphrase
from csi_driver.model.text import one_line
from csi_driver.model.volume import KeyTrail

EXTRA: Final = "kmip"
_PORT: Final = 5696
_IV_BYTES: Final = 16
_ENTRIES: Final = ("CA_CERT", "CLIENT_CERT", "CLIENT_KEY", "UNIQUE_IDENTIFIER")
_MOST_QUOTED: Final = 200
_LOST: Final = frozenset({"ITEM_NOT_FOUND", "OBJECT_NOT_FOUND", "OBJECT_DESTROYED", "OBJECT_ARCHIVED"})
_STATES: Final = frozenset({"WRONG_KEY_LIFECYCLE_STATE", "INCOMPATIBLE_CRYPTOGRAPHIC_USAGE_MASK"})
_DENIED: Final = frozenset({"PERMISSION_DENIED", "NOT_AUTHORISED", "AUTHENTICATION_NOT_SUCCESSFUL"})
_PASSING: Final = frozenset({"GENERAL_FAILURE", "INTERNAL_SERVER_ERROR", "SERVER_LIMIT_EXCEEDED"})


@dataclass(frozen=True)
class Server:
    """A KMIP server, who we are there, and the key that wraps; nothing secret of it is shown."""

    host: str
    port: int
    key_id: str
    tls: Tls = field(repr=False)
    seconds: float = SECONDS


def server_of(reader: EntryReader, secret: Mapping[str, str], secret_name: str) -> Server:
    """The server that an entry and its secret name. Raises FailedPrecondition."""
    if lacking := [entry for entry in _ENTRIES if not secret.get(entry)]:
        raise FailedPrecondition(f"the secret {secret_name} of {reader.where} lacks the entry {lacking[0]}; add it")
    endpoint = reader.text("KMIP_ENDPOINT")
    host, _, port = endpoint.rpartition(":") if ":" in endpoint.rpartition("]")[2] else (endpoint, "", str(_PORT))
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise FailedPrecondition(
            f"the field KMIP_ENDPOINT of {reader.where} must be HOST:PORT, such as kmip.example:5696"
        )
    return Server(
        host.strip("[]"),
        int(port),
        secret["UNIQUE_IDENTIFIER"].strip(),
        Tls(
            ca=secret["CA_CERT"],
            certificate=secret["CLIENT_CERT"],
            key=secret["CLIENT_KEY"],
            server_name=reader.text("TLS_SERVER_NAME", "") or None,
        ),
        reader.seconds("READ_TIMEOUT", SECONDS),
    )


class KmipWrapper:
    """Wraps by a key of the server that `find` gives; one connection per question, as servers end idle ones."""

    def __init__(self, where: str, find: Callable[[], Server]) -> None:
        self._where = where
        self._find = find
        self._enums = load("kmip.core.enums", where, EXTRA)
        logging.getLogger("kmip").setLevel(logging.CRITICAL + 1)  # what fails is told by us, without what was sent

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        nonce = os.urandom(_IV_BYTES)

        def ask(proxy: Any, key_id: str) -> Any:
            return proxy.encrypt(bound(name, key), key_id, self._parameters(), nonce)

        found, key_id = self._ask(ask, quotes=False)
        return Wrapped(msgspec.json.encode(Sealed(dek=found["data"], nonce=nonce)).decode(), key_id)

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        sealed = read_sealed(trail.wrapped, self._where)

        def ask(proxy: Any, key_id: str) -> Any:
            return proxy.decrypt(sealed.dek, trail.key_id or key_id, self._parameters(), sealed.nonce)

        found, _ = self._ask(ask)
        return unbound(self._where, trail.name, found["data"]) if trail.name else Passphrase(found["data"])

    def check(self) -> str:
        def ask(proxy: Any, key_id: str) -> Any:
            found = proxy.get_attributes(key_id, ["State"])
            state = found.attributes[0].attribute_value.value.name if found.attributes else "unknown"
            return {
                "result_status": found.result_status.value,
                "result_reason": getattr(found.result_reason, "value", None),
                "result_message": getattr(found.result_message, "value", ""),
                "state": state,
            }

        state = self._ask(ask)[0]["state"]
        if state != "ACTIVE":
            raise KeyLost(f"the key of {self._where} is {state.lower()}; activate it, or name another one")
        return "its key is active"

    def close(self) -> None:
        """Nothing stays open."""

    def _parameters(self) -> Any:
        attributes = load("kmip.core.attributes", self._where, EXTRA)
        return attributes.CryptographicParameters(
            block_cipher_mode=self._enums.BlockCipherMode.CBC,
            padding_method=self._enums.PaddingMethod.PKCS5,
            cryptographic_algorithm=self._enums.CryptographicAlgorithm.AES,
        )

    def _ask(self, call: Callable[[Any, str], Any], *, quotes: bool = True) -> tuple[Any, str]:
        def once() -> tuple[Any, str]:
            server = self._find()
            with connected(self._where, server) as connection:
                proxy = proxy_on(self._where, server, connection, self._enums)
                try:
                    found = call(proxy, server.key_id)
                except OSError as error:
                    raise _unreachable(self._where, server, error) from None
                except DriverError:
                    raise
                except Exception as error:  # noqa: BLE001 - whatever PyKMIP makes of an answer that is none
                    raise Unavailable(
                        f"{self._where} answered with what is no KMIP or ends early ({type(error).__name__}); check "
                        f"its address, the call may be repeated"
                    ) from None
                finally:
                    proxy.socket = None  # it would close it again when it is collected
            if found["result_status"] is not self._enums.ResultStatus.SUCCESS:
                raise _refusal(self._where, found, quotes=quotes)
            return found, server.key_id

        return retried(self._where, EXTRA, once)


def connected(where: str, server: Server) -> ssl.SSLSocket:
    """A TLS connection to the server, its name and certificate checked. Raises FailedPrecondition, Unavailable."""
    context = server.tls.context(where)
    plain = None
    try:
        plain = socket.create_connection((server.host, server.port), timeout=server.seconds)
        return context.wrap_socket(plain, server_hostname=server.tls.server_name or server.host)
    except OSError as error:
        if plain is not None:
            plain.close()
        raise _unreachable(where, server, error) from None


def proxy_on(where: str, server: Server, connection: ssl.SSLSocket, enums: Any) -> Any:
    """PyKMIP's client of that connection."""
    services = load("kmip.services.kmip_client", where, EXTRA)
    proxy = services.KMIPProxy(
        host=server.host,
        port=server.port,
        kmip_version=enums.KMIPVersion.KMIP_1_4,
        timeout=int(server.seconds) or 1,
        config_file=os.devnull,  # else it looks for files of its own, and complains where there are none
    )
    proxy.socket = connection
    proxy.protocol = services.KMIPProtocol(connection)
    return proxy


def _unreachable(where: str, server: Server, error: OSError) -> DriverError:
    place = f"{where} at {server.host}:{server.port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return FailedPrecondition(
            f"{place} shows a certificate that is not trusted ({error.verify_message}); correct CA_CERT in its secret, "
            f"or TLS_SERVER_NAME in the KMS configuration"
        )
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "unknown reason").lower().replace("_", " ")
        return FailedPrecondition(
            f"the TLS connection to {place} failed ({reason}); check its address and the certificates in its secret"
        )
    if isinstance(error, TimeoutError):
        return Unavailable(f"{place} did not answer within {server.seconds:g} s; look at it, the call may be repeated")
    said = error.strerror or type(error).__name__
    return Unavailable(f"{place} cannot be reached or broke off ({said}); the call may be repeated")


def _refusal(where: str, found: Mapping[str, Any], *, quotes: bool) -> DriverError:
    reason = getattr(found.get("result_reason"), "name", "unknown")
    message = found.get("result_message")
    said = f"{reason}: {one_line(message, _MOST_QUOTED)}" if quotes and isinstance(message, str) and message else reason
    if reason in _LOST:
        return KeyLost(f"{where} has the key no more ({said}); restore it there, or the record from a backup")
    if reason in _STATES:
        return KeyLost(f"the key of {where} may not be used for this ({said}); activate it, or name another one")
    if reason in _DENIED:
        return PermissionDenied(
            f"{where} refuses ({said}); check the client certificate, whose key it is, and that the key is active"
        )
    if reason in _PASSING:
        return Unavailable(f"{where} failed ({said}); look at its log, the call may be repeated")
    return KeyLost(f"{where} does not do it ({said}); check the key, its usage mask and the volume's record")
