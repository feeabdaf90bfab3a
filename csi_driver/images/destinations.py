"""Where a download may go: URLs, the addresses behind their names, and connections to exactly those addresses.

A name is resolved once per connection, every address it has is judged, and a judged address is connected to as it is:
a name server that answers differently the second time (DNS rebinding) is never asked a second time. Redirects come
through the same door.
"""

import http.client
import io
import ipaddress
import queue
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urljoin, urlsplit

from csi_driver.model.errors import InvalidArgument

SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
Resolve = Callable[[str, int], Sequence[SocketAddress]]
"""All addresses of a host for TCP, as getaddrinfo(3) gives them. Raises OSError."""
Judge = Callable[[str], str | None]
"""Why an IP address is not connected to, None if it may be."""

_PORTS: Final = {"http": 80, "https": 443}
_MOST_ADDRESSES = 4
_HEAD_BYTES = 256 << 10
_METADATA = "a cloud's metadata address"
_REFUSED: Final = tuple(
    (ipaddress.ip_network(network), what)
    for network, what in (
        ("0.0.0.0/8", "an unspecified address"),
        ("127.0.0.0/8", "a loopback address"),
        ("169.254.169.254/32", _METADATA),
        ("169.254.0.0/16", "a link-local address"),
        ("224.0.0.0/4", "a multicast address"),
        ("240.0.0.0/4", "a reserved address"),
        ("100.100.100.200/32", _METADATA),  # Alibaba
        ("168.63.129.16/32", _METADATA),  # Azure
        ("192.0.0.192/32", _METADATA),  # Oracle
        ("::/128", "an unspecified address"),
        ("::1/128", "a loopback address"),
        ("fe80::/10", "a link-local address"),
        ("ff00::/8", "a multicast address"),
        ("fd00:ec2::/32", _METADATA),  # Amazon
        ("fd00:c1::a9fe:a9fe/128", _METADATA),  # Oracle
        ("fd20:ce::254/128", _METADATA),  # Google
        ("2001::/32", "behind a Teredo relay"),  # RFC 4380
        # RFC 8215: where in it the IPv4 address stands is the network's own choice, so it cannot be judged.
        ("64:ff9b:1::/48", "behind a NAT64 of the local network"),
    )
)
_CARRIES_IPV4: Final = tuple(
    (ipaddress.IPv6Network(network), shift)
    for network, shift in (
        ("::ffff:0:0/96", 0),  # mapped, RFC 4291
        ("::/96", 0),  # compatible, RFC 4291
        ("::ffff:0:0:0/96", 0),  # translated, RFC 2765
        ("64:ff9b::/96", 0),  # NAT64, RFC 6052
        ("2002::/16", 80),  # 6to4, RFC 3056
    )
)


@dataclass(frozen=True)
class Patience:
    """How long a download waits: `connect_seconds` for a name, a connection and a TLS handshake each; then
    `stall_bytes` must come in `stall_seconds` of waiting, so that a server that drips ends too.
    """

    connect_seconds: float = 30.0
    stall_seconds: float = 60.0
    stall_bytes: int = 64 << 10


@dataclass(frozen=True)
class Destination:
    """A URL taken apart; `target` is path and query as they are sent."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def url(self) -> str:
        """The whole URL. Its query may be a credential (pre-signed URLs): not for errors, logs or records."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port: who gets what is meant for this server (RFC 6454)."""
        return self.scheme, self.host, self.port

    def __str__(self) -> str:
        """The URL without its query."""
        return self.url.partition("?")[0]

    def __repr__(self) -> str:
        return f"Destination({self})"

    def redirected(self, location: str) -> "Destination":
        """Where a redirect from here leads, by the value of its Location field. Raises InvalidArgument."""
        try:
            raw = location.encode("latin-1")  # as http.client decodes fields
            there = parse_url(urljoin(self.url, quote(raw, safe=string.punctuation)))
        except (ValueError, InvalidArgument) as error:
            raise InvalidArgument(f"{self} redirects to somewhere that is no usable http or https URL") from error
        if (self.scheme, there.scheme) == ("https", "http"):
            raise InvalidArgument(f"{self} redirects to {there}, from https to unprotected http: refused")
        return there


def parse_url(url: str) -> Destination:
    """Take an http or https URL apart. Raises InvalidArgument, without repeating what may be a credential."""
    try:
        if any(ord(character) < 0x20 or ord(character) == 0x7F for character in url):
            raise ValueError
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port
    except ValueError:
        raise InvalidArgument("the image's URL is not valid; expected http://host/path or https://host/path") from None
    scheme = parts.scheme.lower()
    if scheme not in _PORTS or not host or port == 0:
        raise InvalidArgument(f"the image's URL has scheme {scheme!a} and host {host!a}; expected http or https, host")
    if parts.username is not None or parts.password is not None:
        raise InvalidArgument(f"the image's URL on {host} holds a user name or password: refused, as URLs are recorded")
    path = quote(parts.path or "/", safe=string.punctuation)
    query = f"?{quote(parts.query, safe=string.punctuation)}" if parts.query else ""
    return Destination(scheme, host, port or _PORTS[scheme], path + query)


def refusal(address: str) -> str | None:
    """Why an IP address is not connected to, such as "a loopback address"; None if it may be.

    IPv4 addresses that travel in IPv6 ones are judged as what they are.
    """
    ip = ipaddress.ip_address(address)
    for network, what in _REFUSED:
        if ip in network:
            return what
    if isinstance(ip, ipaddress.IPv6Address):
        for carrier, shift in _CARRIES_IPV4:
            if ip in carrier:
                return refusal(str(ipaddress.IPv4Address(int(ip) >> shift & 0xFFFFFFFF)))
    return None


def resolve(host: str, port: int) -> Sequence[SocketAddress]:
    """Ask the system's resolver; it has no time limit of its own."""
    return [found[4] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)]


class Connector:
    """Opens connections to allowed addresses only; `allow_local` lifts that. No proxy, whatever the environment says.

    `tls` replaces the usual trust: the system's certificates, host names checked. `cacert` is a file of certificates
    (PEM) in the place of the system's.
    """

    def __init__(
        self,
        *,
        allow_local: bool = False,
        tls: ssl.SSLContext | None = None,
        cacert: Path | None = None,
        patience: Patience | None = None,
        resolve: Resolve = resolve,
        judge: Judge = refusal,
    ) -> None:
        self._judge: Judge = (lambda _: None) if allow_local else judge
        self._tls = tls or (_trusting(cacert) if cacert else None)
        self._patience = patience or Patience()
        self._resolve = resolve

    def connect(self, to: Destination) -> "Connection":
        """Connect to where the name leads now.

        Raises InvalidArgument for addresses that are refused and for certificates that do not hold, else OSError.
        """
        addresses = self._addresses(to)
        failure: OSError | None = None
        for address in addresses[:_MOST_ADDRESSES]:
            try:
                return Connection(self._open(to, address), self._patience)
            except ssl.SSLCertVerificationError as error:
                raise InvalidArgument(
                    f"the certificate of {to.host} does not hold ({error.verify_message}); "
                    f"use a URL whose server has a trusted certificate, or --cacert for one of your own"
                ) from None
            except OSError as error:
                failure = error
        raise failure or OSError(f"{to.host} has no address")

    def _addresses(self, to: Destination) -> Sequence[SocketAddress]:
        answers: queue.SimpleQueue[Sequence[SocketAddress] | OSError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self._resolve(to.host, to.port))
            except OSError as error:
                answers.put(error)
            except UnicodeError:  # a label that is too long or empty
                answers.put(OSError(f"{to.host} is no host name"))

        threading.Thread(target=ask, name="resolve", daemon=True).start()
        try:
            answer = answers.get(timeout=self._patience.connect_seconds)
        except queue.Empty:
            raise TimeoutError(f"{to.host} was not resolved in {self._patience.connect_seconds:g} s") from None
        if isinstance(answer, OSError):
            raise answer
        for address in answer:
            if (reason := self._judge(str(address[0]))) is not None:
                raise InvalidArgument(
                    f"{to} leads to {address[0]}, {reason}: refused; images are not fetched from there unless "
                    f"the settings allow it"
                )
        return answer

    def _open(self, to: Destination, address: SocketAddress) -> socket.socket:
        family = socket.AF_INET6 if ":" in str(address[0]) else socket.AF_INET
        plain = socket.socket(family, socket.SOCK_STREAM)
        try:
            plain.settimeout(self._patience.connect_seconds)
            plain.connect(address)
            if to.scheme == "http":
                return plain
            return (self._tls or ssl.create_default_context()).wrap_socket(plain, server_hostname=to.host)
        except BaseException:
            plain.close()
            raise


def _trusting(certificates: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(certificates))
    except OSError as error:  # ssl.SSLError is one
        raise InvalidArgument(
            f"the certificates in {certificates} cannot be used ({error.strerror or error}); expected PEM"
        ) from None


class Connection:
    """One request and its response over a connected socket, which it owns."""

    def __init__(self, connected: socket.socket, patience: Patience) -> None:
        self._socket = connected
        self._incoming = _Incoming(connected, patience)

    def get(self, to: Destination, headers: dict[str, str], most_bytes: int) -> http.client.HTTPResponse:
        """Send a GET and read the response's head; a body of at most `most_bytes` may be read from what comes back.

        Raises OSError or http.client.HTTPException, and so does reading the body.
        """
        request = http.client.HTTPConnection(to.host, to.port)
        request.default_port = _PORTS[to.scheme]
        request.auto_open = 0  # it never connects by itself
        request.sock = _Channel(self._socket, self._incoming)
        self._incoming.left_bytes = _HEAD_BYTES
        # It asks for no coding (Accept-Encoding: identity): the checksum is that of the stored bytes.
        request.request("GET", to.target, headers={"Connection": "close", "User-Agent": "luks-csi", **headers})
        response = request.getresponse()
        # Chunks cost bytes of their own; where they cost more than they bring, it is no honest transfer.
        self._incoming.left_bytes = _HEAD_BYTES + 2 * most_bytes
        return response

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class _Incoming(io.RawIOBase):
    """The bytes that a socket brings: a share in every span of waiting, and no more than `left_bytes`."""

    def __init__(self, connected: socket.socket, patience: Patience) -> None:
        self._socket = connected
        self._patience = patience
        self.left_bytes = 0
        self._begin_span()

    def _begin_span(self) -> None:
        self._span_bytes = 0
        self._span_left = self._patience.stall_seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # a collections.abc.Buffer, which Python has from 3.12 on
        while True:
            if self._span_left <= 0:
                if self._span_bytes < self._patience.stall_bytes:
                    raise TimeoutError(f"{self._span_bytes} bytes came in {self._patience.stall_seconds:g} s")
                self._begin_span()
            self._socket.settimeout(self._span_left)
            started = time.monotonic()
            try:
                count = self._socket.recv_into(buffer)
            except TimeoutError:
                self._span_left = 0
                continue
            self._span_left -= time.monotonic() - started
            self._span_bytes += count
            self.left_bytes -= count
            if self.left_bytes < 0:
                raise http.client.HTTPException("the server sends more than such a response can need")
            return count


@dataclass(frozen=True)
class _Channel:
    """What http.client asks of a socket."""

    socket: socket.socket
    incoming: _Incoming

    def sendall(self, data: bytes) -> None:
        self.socket.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self.incoming, 1 << 16)

    def close(self) -> None:
        """It is called when the head is read; the body is still to come, so the socket stays to its owner."""
