"""Plain HTTP to a key management system: JSON out, JSON in, errors as sentences that name the KMS.

Bodies and headers carry keys and tokens: neither is ever quoted. What the server itself says is quoted only where
nothing secret was sent.
"""

import ssl
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from csi_driver.host.inmemory import in_memory
from csi_driver.keys.base import SECONDS
from csi_driver.keys.extras import load
from csi_driver.keys.retries import retried
from csi_driver.model.errors import FailedPrecondition, PermissionDenied, Unavailable
from csi_driver.model.reading import convert
from csi_driver.model.text import one_line

_LARGEST_ANSWER: Final = 1 << 20
_MOST_QUOTED: Final = 200
T = TypeVar("T")

_NONE: Final[Mapping[str, str]] = {}
_PASSING: Final = frozenset({408, 412, 425, 429})
"""412 is Vault's, of a standby that has not heard of a write yet."""
_TRUST: Final = "give its CA, or the name that is in the certificate, in the KMS configuration"
_RIGHTS: Final = "check the credentials, the role and its policy"


class NotTaken(FailedPrecondition):
    """HTTP 400: the server was reached, knows us, and cannot do what it was asked with what it was given."""


class NoRoute(FailedPrecondition):
    """HTTP 404 with words: the server has nothing that could have what was asked for."""


@dataclass(frozen=True)
class Tls:
    """How a server is trusted. `ca`, `certificate` and `key` are PEM texts; without `ca` the system's decide."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = field(default=None, repr=False)
    verify: bool = True
    server_name: str | None = None

    def context(self, where: str) -> ssl.SSLContext:
        """A context for clients. Raises FailedPrecondition when a certificate or the key cannot be used."""
        try:
            context = ssl.create_default_context(cadata=self.ca)
        except (ssl.SSLError, ValueError):
            raise FailedPrecondition(f"the CA certificate for {where} is none; it must be PEM text") from None
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate is not None:
            with ExitStack() as stack:
                texts = (self.certificate, self.key)
                paths = [stack.enter_context(in_memory((each or "").encode())) for each in texts]
                try:
                    context.load_cert_chain(*paths)
                except (ssl.SSLError, OSError):
                    raise FailedPrecondition(
                        f"the client certificate and key for {where} cannot be used together; both must be PEM texts"
                    ) from None
        return context


class HttpService:
    """A server of JSON over HTTP at `base`; connections are kept. `where` names the KMS in errors.

    `trust` is what helps where its certificate is not trusted, `rights` where it refuses what it is asked. With
    `by_proxy` it is asked by the proxy that the environment names, if it names one.
    """

    def __init__(
        self,
        where: str,
        extra: str,
        base: str,
        tls: Tls,
        seconds: float = SECONDS,
        trust: str = _TRUST,
        rights: str = _RIGHTS,
        *,
        by_proxy: bool = True,
    ) -> None:
        self._where = where
        self._trust = trust
        self._rights = rights
        self._extra = extra
        self._base = base.rstrip("/")
        self._seconds = seconds
        self._httpx = load("httpx2", where, extra)
        self._extensions = {"sni_hostname": tls.server_name} if tls.server_name else {}
        self._client = self._httpx.Client(
            verify=tls.context(where), timeout=seconds, follow_redirects=False, trust_env=by_proxy
        )

    def ask(
        self,
        method: str,
        path: str,
        document: object = None,
        headers: Mapping[str, str] = _NONE,
        *,
        again: bool = True,
        quotes: bool = False,
        routes: bool = False,
    ) -> dict[str, Any] | None:
        """The answer's JSON object, {} for an answer without a body, None for 404.

        `again` asks once more after what passes by itself; `quotes` lets an error repeat what the server says; with
        `routes` a 404 that the server explains is NoRoute. Raises Unavailable, PermissionDenied (401, 403), NotTaken
        (400), FailedPrecondition (certificate, other refusals).
        """

        def once() -> dict[str, Any] | None:
            return self._once(method, path, document, headers, quotes=quotes, routes=routes)

        return retried(self._where, self._extra, once) if again else once()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _once(
        self, method: str, path: str, document: object, headers: Mapping[str, str], *, quotes: bool, routes: bool
    ) -> dict[str, Any] | None:
        body = None if document is None else msgspec.json.encode(document)
        sent = {"Accept-Encoding": "identity"} | ({"Content-Type": "application/json"} if body is not None else {})
        sent |= headers
        try:
            with self._client.stream(
                method, f"{self._base}/{path}", content=body, headers=sent, extensions=self._extensions
            ) as response:
                status, content = response.status_code, self._content(response)
        except (self._httpx.HTTPError, self._httpx.InvalidURL, self._httpx.StreamError) as error:
            raise self._unreachable(error) from None
        if status == 404:
            if routes and _said(content):
                raise NoRoute(f"{self._where} has nothing at {path} (HTTP 404); check its entry")
            return None
        if status >= 300:
            raise self._refused(status, content if quotes else b"")
        if not content.strip():
            return {}
        try:
            answer = msgspec.json.decode(content)
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors, and so is text that is no UTF-8
            answer = None
        if not isinstance(answer, dict):
            raise Unavailable(
                f"{self._where} answered with something that is no JSON object or ends early; check its address, the "
                f"call may be repeated"
            )
        return answer

    def _content(self, response: Any) -> bytes:
        """The body, bounded in size and time: httpx bounds each read alone."""
        end = time.monotonic() + self._seconds
        pieces, size = [], 0
        for piece in response.iter_raw():
            pieces.append(piece)
            size += len(piece)
            if size > _LARGEST_ANSWER:
                raise FailedPrecondition(
                    f"{self._where} answers with more than {_LARGEST_ANSWER} bytes; check its address"
                )
            if time.monotonic() > end:
                raise Unavailable(self._slow())
        return b"".join(pieces)

    def _slow(self) -> str:
        return f"{self._where} did not answer within {self._seconds:g} s; look at the server, the call may be repeated"

    def _unreachable(self, error: Exception) -> Exception:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return FailedPrecondition(
                    f"{self._where} shows a certificate that is not trusted ({cause.verify_message}); {self._trust}"
                )
            if isinstance(cause, ssl.SSLError):
                reason = cause.reason or "unknown reason"
                return FailedPrecondition(
                    f"the TLS connection to {self._where} failed ({reason.lower().replace('_', ' ')}); check its "
                    f"address and the certificates in the KMS configuration"
                )
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, self._httpx.TimeoutException):
            return Unavailable(self._slow())
        if isinstance(error, self._httpx.InvalidURL | self._httpx.UnsupportedProtocol):
            return FailedPrecondition(f"the address of {self._where} is no http or https URL; correct it")
        if isinstance(error, self._httpx.ConnectError):
            return Unavailable(
                f"{self._where} cannot be reached ({error}); check its address and that it runs, the call may be "
                f"repeated"
            )
        return Unavailable(
            f"the connection to {self._where} broke off ({type(error).__name__}); the call may be repeated"
        )

    def _refused(self, status: int, content: bytes) -> Exception:
        said = _said(content)
        if status in (401, 403):
            return PermissionDenied(
                f"{self._where} refuses (HTTP {status}{said}); {self._rights if status == 403 else _RIGHTS}"
            )
        if status == 429:
            return Unavailable(f"{self._where} has too many requests (HTTP 429{said}); the call may be repeated")
        if status in _PASSING or status >= 500:
            return Unavailable(f"{self._where} failed (HTTP {status}{said}); look at its log, the call may be repeated")
        kind = NotTaken if status == 400 else FailedPrecondition
        return kind(f"{self._where} does not take the request (HTTP {status}{said}); check its entry")


def shaped(where: str, answer: Mapping[str, Any], kind: type[T]) -> T:
    """An answer as what it has to be. Raises Unavailable where it is something else, as for one that is no JSON."""
    try:
        return convert(answer, kind)
    except msgspec.ValidationError:
        raise Unavailable(
            f"{where} answered with JSON of another shape than asked for; check its address, the call may be repeated"
        ) from None


def _said(content: bytes) -> str:
    """The server's own words, as Vault and Kubernetes put them."""
    try:
        answer = msgspec.json.decode(content)
    except (ValueError, RecursionError):
        return ""
    words: object = None
    if isinstance(answer, dict):
        errors = answer.get("errors")
        words = errors[0] if isinstance(errors, list) and errors else answer.get("message")
    return f": {one_line(words, _MOST_QUOTED)}" if isinstance(words, str) and words.strip() else ""
