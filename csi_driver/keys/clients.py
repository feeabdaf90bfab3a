"""What the sources that ask by a cloud's own client have in common: how long one is kept, and what keeps one away.

No text of a client or server is taken over into an error: of an answer that they cannot read they quote all.
"""

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

from csi_driver.keys.extras import load
from csi_driver.keys.retries import retried
from csi_driver.model.errors import DriverError, FailedPrecondition, Unavailable


class _Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=_Closable)
T = TypeVar("T")


class KeptClient(Generic[C]):
    """A client that `make` makes when it is needed, and anew after an error, as its credentials may have ended.

    `told` turns the client's errors into ours, when it is made and when it is asked. Safe for many threads.
    """

    def __init__(
        self, where: str, extra: str, make: Callable[[], C], told: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._where = where
        self._extra = extra
        self._make = make
        self._told = told
        self._made: C | None = None

    def ask(self, call: Callable[[C], T]) -> T:
        """What `call` returns, asked again after what passes by itself."""

        def once() -> T:
            made = self._made
            if made is None:
                with self._told():
                    made = self._made = self._make()
            try:
                with self._told():
                    return call(made)
            except DriverError:
                if self._made is made:  # others may be asking by it, so it is not closed here
                    self._made = None
                raise

        return retried(self._where, self._extra, once)

    def close(self) -> None:
        """Close the client; whoever asks again makes another one."""
        made, self._made = self._made, None
        if made is not None:
            made.close()


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was made of, and so on."""
    cause: Any = error
    while cause is not None:
        yield cause
        # Azure's errors have what they are made of as a member.
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__


def unreadable(where: str, error: Exception) -> Unavailable:
    """Whatever a client makes of an answer, or of an address, that is none."""
    return Unavailable(
        f"{where} cannot be asked or answered with what cannot be read ({type(error).__name__}); check its address, "
        f"the call may be repeated"
    )


def unreachable(where: str, extra: str, error: BaseException) -> DriverError | None:
    """What kept a client that asks by requests from its server; None where it was something else."""
    requests = load("requests.exceptions", where, extra)
    for cause in causes(error):
        if isinstance(cause, requests.SSLError | ssl.SSLError):
            return tls_failed(where)
        if isinstance(cause, requests.Timeout):
            return Unavailable(f"{where} did not answer in time; look at the service, the call may be repeated")
        if isinstance(cause, requests.InvalidURL | requests.MissingSchema | requests.InvalidSchema):
            return FailedPrecondition(f"an address of {where} is no http or https URL; correct it")
        if isinstance(
            cause, requests.ConnectionError | requests.ChunkedEncodingError | ConnectionError | socket.gaierror
        ):
            return Unavailable(
                f"{where} cannot be reached or broke off ({type(cause).__name__}); the call may be repeated"
            )
    return None


def tls_failed(where: str) -> FailedPrecondition:
    """A server whose certificate is not trusted, or that speaks no TLS."""
    return FailedPrecondition(
        f"the TLS connection to {where} failed; check its address, and that the driver's container trusts its "
        f"certificate"
    )
